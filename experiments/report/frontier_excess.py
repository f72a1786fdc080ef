"""Targets of the frontier: by how much a baseline is above the best of ours, at any size."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.report.curves import at_sizes
from experiments.report.outcomes import TargetOutcome
from experiments.report.tables import FRACTIONS, GROUP, ONE_TOLERANCE
from experiments.report.variants import (
    ALLOCATION_WORDS,
    LAYER_REFITS,
    OURS,
    is_baseline,
    variant_words,
)

FAR_FROM_DENSE = 5.0  # points of test accuracy; a frontier is compared where ours is closer
SINGLE_SEED_MARGIN = 0.2  # points, where there is no spread over seeds
SIZES = np.geomspace(0.002, 1, 128)  # kept fractions at which frontiers are compared, 5 % apart


def on_the_frontier(sweeps: pd.DataFrame, model: str, counted: str = "weights") -> TargetOutcome:
    """No baseline is above the best of ours at any size by more than the spread over seeds.

    Ours at a size is the one that is best there on held-out samples. A baseline is compared on the
    seeds that it was run with, at every number of calibration samples that it was run with.
    `counted` is a key of `tables.FRACTIONS`.
    """
    fraction = FRACTIONS[counted]
    if fraction not in sweeps:
        return TargetOutcome()
    runs = sweeps[sweeps["model"] == model]
    runs = runs[
        runs["refit"].isin(LAYER_REFITS) & runs["goal"].isin([*ALLOCATION_WORDS, ONE_TOLERANCE])
    ]
    are_ours = runs["method"].isin(OURS)
    ours = curves(runs[are_ours], fraction)
    baselines = curves(runs[is_baseline(runs)], fraction)
    if not ours or not baselines:
        return TargetOutcome()
    dense = runs.groupby("seed")["accuracy_dense"].first()
    excesses = pd.concat(
        [excess(ours, baseline, dense).assign(variant=baseline.variant) for baseline in baselines],
        ignore_index=True,
    )
    if excesses.empty:
        return TargetOutcome()
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
    return TargetOutcome(beyond.empty, text)


@dataclass(frozen=True)
class Curve:
    """A method, variant and goal in words, and its measures at `SIZES`, one column per seed.

    `accuracy` is on the test set, `drop` that of the accuracy on held-out samples.
    """

    variant: str
    accuracy: pd.DataFrame
    drop: pd.DataFrame


def curves(runs: pd.DataFrame, fraction: str = "kept_fraction") -> list[Curve]:
    """A curve for each method, variant and goal of the runs, over one of `tables.FRACTIONS`."""
    of_groups = []
    for key, rows in runs.groupby(GROUP):
        by_seed = list(rows.groupby("seed"))
        accuracy, drop = (
            pd.DataFrame(
                {seed: at_sizes(rows, column, SIZES, fraction) for seed, rows in by_seed},
                index=SIZES,
            )
            for column in ("accuracy", "accuracy_drop_held_out")
        )
        of_groups.append(Curve(variant_words(GROUP, key), accuracy, drop))
    return of_groups


def excess(ours: list[Curve], baseline: Curve, dense: pd.Series) -> pd.DataFrame:
    """By how much a baseline is above the best of ours, at each size where that can be told.

    The best of ours is chosen on held-out samples, and compared on the test set. `margin` is half
    the range over seeds of the two, the larger one. `dense` is by seed.
    """
    seeds = list(baseline.accuracy.columns)
    rivals = [curve for curve in ours if set(seeds) <= set(curve.accuracy.columns)]
    lowest = dense[seeds].mean() - FAR_FROM_DENSE
    at_each_size = []
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
        at_each_size.append((size, theirs.mean() - best.mean(), margin, len(seeds)))
    return pd.DataFrame(at_each_size, columns=["size", "excess", "margin", "seeds"])
