"""Made-up curves of size against drop, and the row of the only target that they are judged by."""

import pandas as pd

from experiments.report.tables import MNIST
from experiments.report.targets import measured_targets

# Of three networks with sizes half, once and twice a given one: the middle one drops by a point.
DROPS = (3.0, 1.0, 0.2)
ALL_SEEDS = (0, 1, 2)


def curve(
    method: str,
    size: float,
    *,
    model: str = "lenet_300_100",
    refit: str = "none",
    order: str = "parallel",
    goal: str = "kept_fraction",
    seeds: tuple[int, ...] = ALL_SEEDS,
    samples: int = 5000,
    ridge: float = 0.01,
    drops: tuple[float, ...] = DROPS,
    test_drops: tuple[float, ...] | None = None,
) -> pd.DataFrame:
    rows = [
        {"seed": seed, "wanted": kept, "kept_fraction": kept, "bytes_fraction": 1.2 * kept}
        | {"accuracy_drop_held_out": drop, "accuracy_drop": test, "accuracy": 98 - test}
        for kept, drop, test in zip(
            (size / 2, size, 2 * size), drops, test_drops or drops, strict=True
        )
        for seed in seeds
    ]
    about = {"dataset": "any", "model": model, "method": method, "constraint": "hinge"}
    about |= {
        "refit": refit,
        "order": order,
        "ridge": ridge,
        "cascade_bound": "tolerance",
        "network_refit": "",
        "goal": goal,
    }
    about |= {"calibration_samples": samples}
    return pd.DataFrame(rows).assign(**about, accuracy_dense=98.0)


def judged(what: str, *parts: pd.DataFrame, **tables: pd.DataFrame) -> pd.Series:
    """The row of the only target whose words match."""
    if parts:
        tables["sweeps"] = pd.concat(parts, ignore_index=True)
    found = measured_targets(tables)
    (row,) = found[found["what"].str.contains(what)].to_dict("records")
    return pd.Series(row)


def to_a_drop(test_drop: float, **about) -> pd.DataFrame:
    rows = [{"model": model, "seed": seed} for model in MNIST for seed in ALL_SEEDS]
    runs = pd.DataFrame(rows).assign(dataset="mnist", method="lowest_rank", constraint="hinge")
    runs = runs.assign(
        refit="layer",
        order="parallel",
        ridge=0.01,
        cascade_bound="tolerance",
        network_refit="",
        calibration_samples=5000,
    )
    runs = runs.assign(goal="max_accuracy_drop", wanted=0.5, kept_fraction=0.1)
    runs = runs.assign(accuracy=98.0 - test_drop, accuracy_dense=98.0, accuracy_drop=test_drop)
    runs = runs.assign(accuracy_drop_held_out=0.5, goal_low=0.2, goal_high=0.8)
    return runs.assign(**about)
