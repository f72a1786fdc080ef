"""Values read off a method's curve between the sizes at which it was measured.

Between two measured points a value is interpolated linearly in the logarithm of the size. It is
not extrapolated.
"""

import numpy as np
import pandas as pd


def size_at_drop(sizes: np.ndarray, drops: np.ndarray, drop: float) -> float:
    """The smallest size on a method's frontier whose drop of accuracy is at most `drop`.

    Between measured points, taken in the order of their sizes, the drop is interpolated linearly
    in the logarithm of the size. It is not extrapolated. A network without weights, which has no
    logarithm, counts where it is within the drop itself, but nothing is interpolated towards it.

    Parameters
    ----------
    sizes, drops : ndarray, shape (points,)
        Fractions kept, and drops of accuracy in points.
    drop : float
        In points.

    Returns
    -------
    float
        NaN where no point keeps to `drop`.
    """
    order = np.argsort(sizes, kind="stable")
    sizes, drops = sizes[order], drops[order]
    within = np.flatnonzero(drops <= drop)
    if not len(within):
        return float("nan")
    first = within[0]
    if first == 0 or sizes[first - 1] <= 0:
        return float(sizes[first])
    share = (drop - drops[first]) / (drops[first - 1] - drops[first])
    low, high = np.log(sizes[first - 1]), np.log(sizes[first])
    return float(np.exp(high + share * (low - high)))


def at_sizes(
    rows: pd.DataFrame,
    column: str,
    sizes: float | np.ndarray,
    fraction: str = "kept_fraction",
) -> np.ndarray:
    """A column of one seed's runs at given fractions kept, interpolated in their logarithm.

    NaN outside the measured ones. A network without weights is left out: it has no logarithm.
    `fraction` is the column that has the sizes, one of `FRACTIONS`.
    """
    points = rows[rows[fraction] > 0].sort_values(fraction)
    measured = np.log(points[fraction])
    return np.interp(np.log(sizes), measured, points[column], left=np.nan, right=np.nan)


def sizes_by_seed(
    rows: pd.DataFrame, drop: float, fraction: str = "kept_fraction"
) -> tuple[list[float], list[float], bool]:
    """The size at a held-out drop for each seed of a variant, and what it costs on the test set.

    `fraction` is the column that has the sizes, one of `FRACTIONS`.

    Returns
    -------
    sizes, test_drops : list of float
        One per seed; NaN for a seed that is never within the drop.
    at_most : bool
        Whether some seed's smallest network measured is within the drop already.
    """
    sizes, test_drops, at_most = [], [], False
    for _, of_seed in rows.groupby("seed"):
        kept = of_seed[fraction].to_numpy()
        size = size_at_drop(kept, of_seed["accuracy_drop_held_out"].to_numpy(), drop)
        sizes.append(size)
        # Not outside the measured sizes by a rounding error.
        within = np.clip(size, kept.min(), kept.max())
        test_drops.append(at_sizes(of_seed, "accuracy_drop", within, fraction))
        at_most |= size == kept.min()
    return sizes, test_drops, at_most
