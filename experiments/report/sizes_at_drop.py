"""Targets of size: weights or bytes kept at an equal drop of accuracy, ours and the baselines'."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.report.curves import sizes_by_seed
from experiments.report.outcomes import TargetOutcome
from experiments.report.tables import FRACTIONS, GROUP, with_all_seeds
from experiments.report.variants import (
    ALLOCATION_WORDS,
    LAYER_REFITS,
    OURS,
    is_baseline,
    variant_words,
)


@dataclass(frozen=True)
class Asked:
    """Which sizes are asked for: of a network, at a held-out drop in points, counted so."""

    model: str
    drop: float = 1.0
    refits: tuple[str, ...] = LAYER_REFITS
    counted: str = "weights"  # or "bytes"


@dataclass(frozen=True)
class Size:
    """The size of a method in one variant at a held-out drop, over seeds, and its test drop.

    `at_most` says that some seed's smallest network measured is within the drop already, `earlier`
    that some of the runs were made by earlier code.
    """

    method: str
    variant: str
    mean: float
    low: float
    high: float
    test_drop: float
    at_most: bool
    earlier: bool = False

    @property
    def percent(self) -> str:
        text = f"{'at most ' if self.at_most else ''}{100 * self.mean:.2f} %"
        if self.low != self.high:
            text += f" ({100 * self.low:.2f} to {100 * self.high:.2f} over seeds)"
        return f"{text}, {self.variant}"


def small_enough(sweeps: pd.DataFrame, asked: Asked, limit: float) -> TargetOutcome:
    """The smallest size of ours at the drop is within the limit."""
    best = smallest(our_sizes(sweeps, asked))
    if best is None:
        return TargetOutcome()
    return TargetOutcome(bool(best.mean <= limit), best.percent, f"{best.test_drop:.2f}")


def smaller_than_baselines(sweeps: pd.DataFrame, asked: Asked, limit: float) -> TargetOutcome:
    """Our size at the drop over that of the best baseline.

    Each is the best of all numbers of calibration samples and ridges, by the held-out size. Where
    the baseline may be smaller still than it was measured, the target is not met.
    """
    ours, best = smallest(our_sizes(sweeps, asked)), smallest(baseline_sizes(sweeps, asked))
    if ours is None or best is None:
        return TargetOutcome()
    ratio = ours.mean / best.mean
    word = "at least " if best.at_most else ""
    seeds = runs_of(sweeps, asked)["seed"].nunique()
    alone = "; of one seed, whose spread is not known" if seeds == 1 else ""
    return TargetOutcome(
        bool(ratio <= limit and not best.at_most),
        f"{word}{ratio:.2f}: {ours.percent}; best baseline {best.percent}{alone}",
        f"{ours.test_drop:.2f}; baseline {best.test_drop:.2f}",
    )


def our_sizes(sweeps: pd.DataFrame, asked: Asked) -> list[Size]:
    runs = runs_of(sweeps, asked)
    return sizes(runs[runs["method"].isin(OURS) & runs["goal"].isin(ALLOCATION_WORDS)], asked)


def baseline_sizes(sweeps: pd.DataFrame, asked: Asked) -> list[Size]:
    runs = runs_of(sweeps, asked)
    return sizes(runs[is_baseline(runs)], asked)


def sizes(runs: pd.DataFrame, asked: Asked) -> list[Size]:
    """The size at the drop of each method, variant and goal; not where a seed is never within."""
    of_groups = [_size(key, rows, asked) for key, rows in runs.groupby(GROUP)]
    return [size for size in of_groups if size is not None]


def runs_of(sweeps: pd.DataFrame, asked: Asked) -> pd.DataFrame:
    """The runs with all seeds that are asked for; none of a table that does not count so."""
    runs = with_all_seeds(sweeps)
    if FRACTIONS[asked.counted] not in runs:
        return runs.iloc[:0]
    return runs[(runs["model"] == asked.model) & runs["refit"].isin(asked.refits)]


def _size(key: tuple, rows: pd.DataFrame, asked: Asked) -> Size | None:
    at_drop, test_drops, at_most = sizes_by_seed(rows, asked.drop, FRACTIONS[asked.counted])
    if np.isnan(at_drop).any():
        return None
    earlier = "earlier" in rows and bool(rows["earlier"].any())
    over_seeds = (np.mean(at_drop), min(at_drop), max(at_drop))
    method = key[GROUP.index("method")]
    words = variant_words(GROUP, key)
    return Size(method, words, *over_seeds, np.mean(test_drops), at_most, earlier)


def smallest(sizes: Iterable[Size]) -> Size | None:
    return min(sizes, key=lambda size: size.mean, default=None)
