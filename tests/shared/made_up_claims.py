"""Made-up runs at four tolerances, of one method on one network, for the claims of the paper."""

import pandas as pd

NETWORK = "lenet_300_100"
SMALL, LARGE = [0.6, 0.4, 0.3, 0.2], [0.9, 0.8, 0.6, 0.5]


def curve(
    method: str,
    sizes: list[float],
    *,
    drops: tuple[float, ...] = (0.1, 0.4, 0.8, 2.0),
    variant: tuple[str, str] = ("none", "parallel"),
    seeds: int = 3,
    wobble: float = 0.0,
) -> pd.DataFrame:
    """Rows of a method at four tolerances; `wobble` moves the sizes of the seeds apart."""
    refit, order = variant
    rows = [
        {
            "run": f"{method}-{refit}-{order}-{tolerance}-{seed}",
            "seed": seed,
            "goal": "relative_tolerance",
            "wanted": tolerance,
            "relative_tolerance": tolerance,
            "kept_fraction": size * (1 + wobble * (seed - (seeds - 1) / 2)),
            "accuracy_drop_held_out": drop,
            "accuracy_drop": drop,
            "output_error": tolerance,
            "output_bound": 2 * tolerance,
            "accuracy": 98.0 - drop,
        }
        for tolerance, size, drop in zip((0.05, 0.1, 0.2, 0.3), sizes, drops, strict=True)
        for seed in range(seeds)
    ]
    about = {"dataset": "mnist", "model": NETWORK, "method": method, "constraint": "nettrim"}
    about |= {"refit": refit, "order": order, "cascade_bound": "tolerance", "ridge": 0.01}
    about["network_refit"] = ""
    table = pd.DataFrame(rows).assign(**about)
    return table.assign(bytes_fraction=table["kept_fraction"], calibration_samples=5000)
