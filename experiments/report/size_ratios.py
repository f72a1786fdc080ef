"""The sizes of two methods at one drop of accuracy, compared seed by seed."""

import numpy as np
import pandas as pd

from experiments.report.curves import size_at_drop
from experiments.report.markdown import NOT_MEASURED, spread

EQUAL_DROPS = (0.5, 1.0)  # points of held-out accuracy at which sizes are compared
SIZE_MARGIN = 0.05  # relative; at a certified gap of 1 % a size may be off by a few per cent


def compare_sizes(
    rows: pd.DataFrame, rival: pd.DataFrame, column: str, drop: float
) -> tuple[str, str]:
    """Sizes of two methods at one held-out drop, seed by seed; the word for it, and the ratios.

    "smaller" and "larger" take all seeds, which share a network and a calibration set, to agree,
    and the mean to differ by `SIZE_MARGIN`; else it is a "tie". A method of which no tolerance
    keeps the drop is known to need more than the largest size it was measured at, and no more than
    that: where this does not tell which is smaller, it is "undecided".
    """
    sizes = [_sizes_at_drop(table, column, drop) for table in (rows, rival)]
    bounds = [
        _ratio(sizes[0][seed], sizes[1][seed]) for seed in sorted(set(sizes[0]) & set(sizes[1]))
    ]
    low, high = np.array([each for each in bounds if each != (0, np.inf)]).reshape(-1, 2).T
    if not len(low):
        return NOT_MEASURED, "-"
    exact = low[low == high]
    if (high < 1).all() and high.mean() <= 1 - SIZE_MARGIN:
        word = "smaller"
    elif (low > 1).all() and low.mean() >= 1 + SIZE_MARGIN:
        word = "larger"
    else:
        word = "tie" if len(exact) == len(low) else "undecided"
    cell = spread(exact.mean(), exact.min(), exact.max(), 2) if len(exact) else "-"
    for method, missing in (("DDLR", np.isinf(high).sum()), ("Net-Trim", (low == 0).sum())):
        cell += f"; {method} outside the grid in {missing} of {len(low)} seeds" if missing else ""
    return word, cell


def _sizes_at_drop(rows: pd.DataFrame, column: str, drop: float) -> dict[int, tuple[float, bool]]:
    """By seed the size at a drop; or the largest measured, and False, where none keeps the drop."""
    sizes = {}
    for seed, of_seed in rows.groupby("seed"):
        size = size_at_drop(
            of_seed[column].to_numpy(), of_seed["accuracy_drop_held_out"].to_numpy(), drop
        )
        kept = not np.isnan(size)
        sizes[seed] = (size if kept else of_seed[column].max(), kept)
    return sizes


def _ratio(size: tuple[float, bool], rival: tuple[float, bool]) -> tuple[float, float]:
    """Bounds on the ratio of two such sizes, which agree where both are known."""
    ratio = size[0] / rival[0]
    return (ratio if rival[1] else 0, ratio if size[1] else np.inf)
