"""The project's own targets, and what the tables say of each: ``python -m experiments.targets``.

Prints and writes `results/targets.md` and `results/targets.csv`, a row a target: what is aimed at,
what was measured, and whether it was met, from the tables in `results/` alone. The same tables give
the same files.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.report.tables import (
    GROUP,
    METHOD_TITLES,
    NETWORK_TITLES,
    ONE_TOLERANCE,
    VARIANT,
    at_main_samples,
    read_tables,
    size_at_drop,
    with_all_seeds,
    write_table,
)
from experiments.runs.records import USUAL_CASCADE_BOUND, USUAL_RIDGE, write_whole

log = logging.getLogger(__name__)

NOT_MEASURED = "not measured"
OURS = ("lowest_rank", "fewest_weights")
# Ours without its search, run for the ablation: no rival of ours, and not what is aimed at.
STEPS_OF_OURS = ("activation_svd_selected",)
ALONE, TOGETHER = ("none", "layer"), ("network",)  # refits of layer by layer, and of the network
MNIST = ("lenet_300_100", "fc_nettrim", "lenet5")
CIFAR10 = ("vgg_small", "convnet_nettrim")
A_SIZE = "kept_fraction"  # the goal of runs that are to be of a given size

LARGEST_DROP = 1.0  # points of held-out accuracy at which sizes are compared
FAR_FROM_DENSE = 5.0  # points of test accuracy; a frontier is compared where ours is closer
SINGLE_SEED_MARGIN = 0.2  # points, where there is no spread over seeds
SIZES = np.geomspace(0.002, 1, 128)  # kept fractions at which frontiers are compared, 5 % apart
RANK_TOLERANCES = (0.05, 0.3)  # from and to
USUAL_SAMPLES = 5000  # of calibration
RANK_RATIO = 0.8
ACCURACY_DROP = 0.5  # points that a network is compressed to
NETWORKS = 3 * len(MNIST)  # three seeds of each

# As `benchmark_targets.csv` has them.
ONE_RANK = "lowest rank of a trained layer: pairs for one rank"
RANK_SEARCH = "lowest rank of a trained layer: pairs for the whole search, at the slowest tolerance"


@dataclass(frozen=True)
class Outcome:
    """What was measured and whether that meets the target (None: not measured)."""

    met: bool | None = None
    measured: str = NOT_MEASURED
    test_drop: str = ""  # at a size that held-out samples chose


@dataclass(frozen=True)
class Target:
    """What is aimed at, in words, and the function of some tables that judges it."""

    what: str
    target: str
    judge: Callable[..., Outcome]
    tables: tuple[str, ...] = ("sweeps",)


@dataclass(frozen=True)
class Size:
    """The size of a method in one variant at a held-out drop, over seeds, and its test drop.

    `at_most`: of some seed the smallest network measured is within the drop already.
    """

    variant: str
    mean: float
    low: float
    high: float
    test_drop: float
    at_most: bool

    @property
    def percent(self) -> str:
        text = f"{'at most ' if self.at_most else ''}{100 * self.mean:.2f} %"
        if self.low != self.high:
            text += f" ({100 * self.low:.2f} to {100 * self.high:.2f} over seeds)"
        return f"{text}, {self.variant}"


# --- sizes at an equal drop ------------------------------------------------------------------


def small_enough(
    sweeps: pd.DataFrame, model: str, refits: tuple[str, ...], limit: float
) -> Outcome:
    """The smallest size of ours at the drop is within the limit."""
    best = smallest(our_sizes(sweeps, model, refits))
    if best is None:
        return Outcome()
    return Outcome(bool(best.mean <= limit), best.percent, f"{best.test_drop:.2f}")


def smaller_than_baselines(sweeps: pd.DataFrame, model: str, limit: float) -> Outcome:
    """Our size at the drop over that of the best baseline, both without refit of the network.

    Each is the best of all numbers of calibration samples and ridges, by the held-out size. Where
    the baseline may be smaller still than it was measured, the target is not met.
    """
    runs = with_all_seeds(sweeps)
    runs = runs[(runs["model"] == model) & is_baseline(runs) & runs["refit"].isin(ALONE)]
    ours, best = smallest(our_sizes(sweeps, model, ALONE)), smallest(sizes(runs))
    if ours is None or best is None:
        return Outcome()
    ratio = ours.mean / best.mean
    word = "at least " if best.at_most else ""
    seeds = runs["seed"].nunique()
    alone = "; of one seed, whose spread is not known" if seeds == 1 else ""
    return Outcome(
        bool(ratio <= limit and not best.at_most),
        f"{word}{ratio:.2f}: {ours.percent}; best baseline {best.percent}{alone}",
        f"{ours.test_drop:.2f}; baseline {best.test_drop:.2f}",
    )


def our_sizes(sweeps: pd.DataFrame, model: str, refits: tuple[str, ...]) -> list[Size]:
    runs = with_all_seeds(sweeps)
    runs = runs[runs["model"] == model]
    own = runs["method"].isin(OURS) & runs["refit"].isin(refits) & (runs["goal"] == A_SIZE)
    return sizes(runs[own])


def sizes(runs: pd.DataFrame) -> list[Size]:
    """The size at the drop of each method, variant and goal; not where a seed is never within."""
    found = [_size(key, rows) for key, rows in runs.groupby(GROUP)]
    return [size for size in found if size is not None]


def _size(key: tuple, rows: pd.DataFrame) -> Size | None:
    at_drop, test_drops, at_most = [], [], False
    for _, own in rows.groupby("seed"):
        kept, drops = own["kept_fraction"].to_numpy(), own["accuracy_drop_held_out"].to_numpy()
        size = size_at_drop(kept, drops, LARGEST_DROP)
        at_drop.append(size)
        # Not outside the measured sizes by a rounding error.
        test_drops.append(at_sizes(own, "accuracy_drop", np.clip(size, kept.min(), kept.max())))
        at_most |= size == kept.min()
    if np.isnan(at_drop).any():
        return None
    over_seeds = (np.mean(at_drop), min(at_drop), max(at_drop))
    return Size(variant_words(GROUP, key), *over_seeds, np.mean(test_drops), at_most)


def smallest(found: Iterable[Size]) -> Size | None:
    return min(found, key=lambda size: size.mean, default=None)


def is_baseline(runs: pd.DataFrame) -> pd.Series:
    return ~runs["method"].isin([*OURS, *STEPS_OF_OURS])


def variant_words(names: Sequence[str], key: tuple) -> str:
    """A method and variant in words, from a key of runs and the names of its parts."""
    about = dict(zip(names, key, strict=True))
    words = [METHOD_TITLES.get(about["method"], about["method"])]
    words += [f"refit {about['refit']}", about["order"]]
    if about["method"] in ("ddlr", "nettrim") and about["constraint"] == "hinge":
        words.append("hinge set")
    if about.get("goal") == ONE_TOLERANCE:
        words.append("one tolerance")
    if about.get("cascade_bound", USUAL_CASCADE_BOUND) != USUAL_CASCADE_BOUND:
        words.append("its own rule for the bounds")
    if about.get("ridge", USUAL_RIDGE) != USUAL_RIDGE:
        words.append(f"ridge {about['ridge']:g}")
    if about.get("calibration_samples", USUAL_SAMPLES) != USUAL_SAMPLES:
        words.append(f"{about['calibration_samples']} samples")
    return ", ".join(words)


def at_sizes(rows: pd.DataFrame, column: str, wanted: float | np.ndarray) -> np.ndarray:
    """A column of one seed's runs at kept fractions, interpolated in their logarithm.

    NaN outside the measured ones.
    """
    points = rows.sort_values("kept_fraction")
    measured = np.log(points["kept_fraction"])
    return np.interp(np.log(wanted), measured, points[column], left=np.nan, right=np.nan)


# --- the frontier ----------------------------------------------------------------------------


def on_the_frontier(sweeps: pd.DataFrame, model: str) -> Outcome:
    """No baseline is above the best of ours at any size by more than the spread over seeds.

    Ours at a size is the one that is best there on held-out samples. A baseline is compared on the
    seeds that it was run with, at every number of calibration samples that it was run with.
    """
    runs = sweeps[sweeps["model"] == model]
    runs = runs[runs["refit"].isin(ALONE) & runs["goal"].isin([A_SIZE, ONE_TOLERANCE])]
    own = runs["method"].isin(OURS)
    ours, baselines = curves(runs[own]), curves(runs[is_baseline(runs)])
    if not ours or not baselines:
        return Outcome()
    dense = runs.groupby("seed")["accuracy_dense"].first()
    excesses = pd.concat(
        [excess(ours, baseline, dense).assign(variant=baseline.variant) for baseline in baselines],
        ignore_index=True,
    )
    if excesses.empty:
        return Outcome()
    worst = excesses.loc[excesses["excess"].idxmax()]
    beyond = excesses[excesses["excess"] > excesses["margin"]]
    allowed = "margin" if worst["seeds"] == 1 else "spread"
    margin = "one seed, a margin of" if worst["seeds"] == 1 else "seed spread"
    text = (
        f"largest excess {worst['excess']:+.2f} points at {100 * worst['size']:.2f} % "
        f"({margin} {worst['margin']:.2f}): {worst['variant']}; compared from "
        f"{100 * excesses['size'].min():.2f} to {100 * excesses['size'].max():.2f} %"
    )
    if len(beyond):
        at = beyond["size"]
        text += (
            f"; beyond the {allowed} at {at.nunique()} of {excesses['size'].nunique()} sizes, "
            f"within {100 * at.min():.2f} to {100 * at.max():.2f} %, by "
            f"{beyond['variant'].nunique()} of {len(baselines)} baselines in their variants"
        )
    return Outcome(beyond.empty, text)


@dataclass(frozen=True)
class Curve:
    """A method, variant and goal in words, and its measures at `SIZES`, a column a seed.

    `accuracy` is on the test set, `drop` that of the accuracy on held-out samples.
    """

    variant: str
    accuracy: pd.DataFrame
    drop: pd.DataFrame


def curves(runs: pd.DataFrame) -> list[Curve]:
    found = []
    for key, rows in runs.groupby(GROUP):
        by_seed = list(rows.groupby("seed"))
        accuracy, drop = (
            pd.DataFrame({seed: at_sizes(own, column, SIZES) for seed, own in by_seed}, index=SIZES)
            for column in ("accuracy", "accuracy_drop_held_out")
        )
        found.append(Curve(variant_words(GROUP, key), accuracy, drop))
    return found


def excess(ours: list[Curve], baseline: Curve, dense: pd.Series) -> pd.DataFrame:
    """By how much a baseline is above the best of ours, at each size where that can be told.

    The best of ours is chosen on held-out samples, and compared on the test set. `margin` is half
    the range over seeds of the two, the larger one. `dense` is by seed.
    """
    seeds = list(baseline.accuracy.columns)
    rivals = [curve for curve in ours if set(seeds) <= set(curve.accuracy.columns)]
    lowest = dense[seeds].mean() - FAR_FROM_DENSE
    found = []
    for size, theirs in baseline.accuracy.dropna().iterrows():
        drops = {
            index: curve.drop.loc[size, seeds].mean(skipna=False)
            for index, curve in enumerate(rivals)
        }
        drops = {index: drop for index, drop in drops.items() if not np.isnan(drop)}
        if not drops:
            continue
        best = rivals[min(drops, key=drops.get)].accuracy.loc[size, seeds]
        if best.mean() < lowest:
            continue
        margin = max(each.max() - each.min() for each in (theirs, best)) / 2
        margin = SINGLE_SEED_MARGIN if len(seeds) == 1 else margin
        found.append((size, theirs.mean() - best.mean(), margin, len(seeds)))
    return pd.DataFrame(found, columns=["size", "excess", "margin", "seeds"])


# --- guarantees ------------------------------------------------------------------------------


def lower_rank(sweeps: pd.DataFrame, layers: pd.DataFrame) -> Outcome:
    """Our rank over that of the activation-aware SVD, at the same bound on a hidden layer."""
    ratios = rank_ratios(sweeps, layers)
    compared = ratios[ratios["ratio"].notna()]
    if set(compared["model"]) != set(MNIST):
        return Outcome()
    worst = compared.loc[compared["ratio"].idxmax()]
    within = (compared["ratio"] <= RANK_RATIO).sum()
    text = (
        f"{within} of {len(compared)} layers and tolerances; from {compared['ratio'].min():.2f} to "
        f"{worst['ratio']:.2f} ({worst['layer']} of {NETWORK_TITLES[worst['model']]} at "
        f"{worst['relative_tolerance']:g}); {len(ratios) - len(compared)} left out, stored dense"
    )
    return Outcome(bool(within == len(compared)), text)


def rank_ratios(sweeps: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """By network, layer and tolerance, the mean over seeds; NaN where a layer is stored dense."""
    runs = sweeps[
        (sweeps["goal"] == ONE_TOLERANCE)
        & (sweeps["calibration_samples"] == USUAL_SAMPLES)
        & (sweeps["ridge"] == USUAL_RIDGE)
        & (sweeps["refit"] == "none")
        & (sweeps["order"] == "parallel")
        & sweeps["model"].isin(MNIST)
        & sweeps["wanted"].between(*RANK_TOLERANCES)
    ]
    layers = layers[layers["run"].isin(runs["run"]) & (layers["activation"] == "relu")]
    at = ["model", "layer", "relative_tolerance"]
    own, rival = (
        layers.loc[layers["method"] == method, [*at, "seed", "rank", "form"]]
        for method in ("lowest_rank", "activation_svd")
    )
    pairs = own.merge(rival, on=[*at, "seed"], suffixes=("", "_svd"))
    dense = (pairs["form"] == "dense") | (pairs["form_svd"] == "dense")
    pairs["ratio"] = (pairs["rank"] / pairs["rank_svd"]).mask(dense)
    means = pairs.groupby(at)["ratio"].agg(lambda each: each.mean(skipna=False))
    return means.round(9).reset_index()  # equal ratios have themselves as their mean


def told_beforehand(sweeps: pd.DataFrame) -> Outcome:
    """The test drop of each network lies in the interval that its compression reported.

    Of every variant that compressed all networks, all seeds.
    """
    runs = sweeps[(sweeps["goal"] == "max_accuracy_drop") & (sweeps["wanted"] == ACCURACY_DROP)]
    runs = at_main_samples(runs[runs["method"].isin(OURS) & runs["model"].isin(MNIST)])
    all_within, words = True, []
    for key, rows in runs.groupby(VARIANT):
        if len(rows) == NETWORKS:
            within = rows["accuracy_drop"].between(rows["goal_low"], rows["goal_high"]).sum()
            all_within &= within == NETWORKS
            words.append(f"{within} of {NETWORKS}, {variant_words(VARIANT, key)}")
    return Outcome(bool(all_within), "; ".join(words)) if words else Outcome()


def benchmarked(targets: pd.DataFrame, what: str) -> Outcome:
    """What the benchmark of the solvers says of its own target."""
    rows = targets[targets["what"] == what]
    if rows.empty:
        return Outcome()
    row = rows.iloc[0]
    return Outcome(row["met"] == "yes", f"{row['measured']} pairs")


# --- the table -------------------------------------------------------------------------------


def _size_target(model: str, refits: tuple[str, ...], limit: float) -> Target:
    refit = "no network refit" if refits == ALONE else "with network refit"
    return Target(
        f"{NETWORK_TITLES[model]}: weights kept at a drop of at most {LARGEST_DROP:g} point, "
        f"{refit}",
        f"<= {100 * limit:g} %",
        partial(small_enough, model=model, refits=refits, limit=limit),
    )


TARGETS = (
    _size_target("lenet_300_100", ALONE, 0.09),
    _size_target("lenet_300_100", TOGETHER, 0.075),
    _size_target("lenet5", ALONE, 0.026),
    _size_target("lenet5", TOGETHER, 0.021),
    *(
        Target(
            f"{NETWORK_TITLES[model]}: our size at a drop of at most {LARGEST_DROP:g} point over "
            f"that of the best baseline, no network refit",
            "<= 0.7",
            partial(smaller_than_baselines, model=model, limit=0.7),
        )
        for model in CIFAR10
    ),
    *(
        Target(
            f"{NETWORK_TITLES[model]}: baselines above ours at any size, no network refit",
            "none, beyond the seed spread",
            partial(on_the_frontier, model=model),
        )
        for model in (*MNIST, *CIFAR10)
    ),
    Target(
        "MNIST networks, hidden layers: our rank over that of the activation-aware SVD at the same "
        f"bound, tolerances {RANK_TOLERANCES[0]:g} to {RANK_TOLERANCES[1]:g}",
        f"<= {RANK_RATIO:g} for every layer",
        lower_rank,
        ("sweeps", "layers"),
    ),
    Target(
        "LeNet-5's layer of 800 x 500, 5000 samples: the best weight of one rank",
        "<= 12 pairs",
        partial(benchmarked, what=ONE_RANK),
        ("benchmark_targets",),
    ),
    Target(
        "the same layer: the whole search for the lowest rank, at tolerances 0.1, 0.2 and 0.3",
        "<= 50 pairs",
        partial(benchmarked, what=RANK_SEARCH),
        ("benchmark_targets",),
    ),
    Target(
        f"MNIST networks compressed to a drop of {ACCURACY_DROP:g} points: test drop within the "
        f"interval reported",
        f"{NETWORKS} of {NETWORKS}",
        told_beforehand,
    ),
)
_EXPLANATION = f"""\
Made by `python -m experiments.targets` from the tables in this folder; not edited by hand. *Ours*:
{" and ".join(METHOD_TITLES[method] for method in OURS)};
{" and ".join(METHOD_TITLES[method] for method in STEPS_OF_OURS)}, a step of the ablation, counts on
neither side. A *network refit* trains all layers together, without labels. Sizes are fractions of
the fully connected layers' weights, at a drop on held-out samples, interpolated in the logarithm of
the size, means over seeds: of each method the smallest of its refits, orders, numbers of
calibration samples and ridges. A variant of which a seed is never within the drop does not count.
*On the test set*: the drop there, in points, at the size that held-out samples chose. Frontiers:
mean test accuracy at the same size, where ours is within {FAR_FROM_DENSE:g} points of dense and
both were measured. Ours at a size is the variant that is best there on held-out samples. Each
baseline in each variant counts, on the seeds it ran with, and is above ours if by more than half
the range over seeds (the larger one of the two), or {SINGLE_SEED_MARGIN:g} points where there is
one seed. *One tolerance*: for all layers of a network; else each has its own. *Samples*, where
named: of calibration; else {USUAL_SAMPLES}. *Ridge*, where named: of fits and refits; else
{USUAL_RIDGE:g}. A *pair* is the time of the two matrix products of the dense layer's size that no
iteration of a solver can avoid."""


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="targets")
def main(cfg: DictConfig) -> None:
    results = Path(cfg.results_dir)
    tables = read_tables(results)
    found = measured_targets(tables)
    write_table(results / "targets.csv", found)
    text = report(found)
    write_whole(results / "targets.md", lambda scratch: scratch.write_text(text, encoding="utf-8"))
    log.info("%s\n%s", results / "targets.md", text)


def measured_targets(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row a target. A table that is missing, or has no rows for it, leaves it unmeasured."""
    rows = []
    for target in TARGETS:
        there = set(target.tables) <= set(tables)
        outcome = target.judge(*(tables[name] for name in target.tables)) if there else Outcome()
        met = {True: "yes", False: "no", None: ""}[outcome.met]
        rows.append((target.what, target.target, outcome.measured, outcome.test_drop, met))
    return pd.DataFrame(rows, columns=["what", "target", "measured", "test_drop", "met"])


def report(found: pd.DataFrame) -> str:
    """The whole of `targets.md`, from the rows of `measured_targets`."""
    header = ["what", "target", "measured", "at that size, on the test set", "met"]
    lines = [header, ["---"] * len(header), *found.to_numpy().tolist()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# The project's targets\n\n{_EXPLANATION}\n\n{table}\n"


if __name__ == "__main__":
    main()
