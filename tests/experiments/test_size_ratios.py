"""Sizes at one drop, compared seed by seed."""

import numpy as np
import pandas as pd
import pytest

from experiments.report.size_ratios import compare_sizes
from made_up_claims import SMALL, curve


def seeds_of(method: str, *factors: float, **about) -> pd.DataFrame:
    """A curve whose sizes are those of `SMALL`, times a factor for each seed."""
    rows = curve(method, SMALL, seeds=len(factors), **about)
    return rows.assign(kept_fraction=rows["kept_fraction"] * np.take(factors, rows["seed"]))


def compared(own: pd.DataFrame, rival: pd.DataFrame) -> tuple[str, str]:
    return compare_sizes(own, rival, "kept_fraction", 0.8)


@pytest.mark.parametrize(
    ("ratios", "word"),
    [
        ((0.9, 0.93, 0.96), "smaller"),
        ((0.94, 0.96, 0.97), "tie"),  # in every seed, but by too little on average
        ((0.7, 0.8, 1.01), "tie"),  # by much on average, but not in every seed
        ((1.1, 1.07, 1.04), "larger"),
        ((1.06, 1.04, 1.03), "tie"),
        ((1.3, 1.2, 0.99), "tie"),
        ((1.0, 1.0, 1.0), "tie"),
    ],
)
def test_a_word_for_sizes_takes_every_seed_and_a_margin(ratios, word):
    mean, low, high = np.mean(ratios), min(ratios), max(ratios)
    cell = f"{mean:.2f}" if low == high else f"{mean:.2f} ({low:.2f} to {high:.2f})"
    assert compared(seeds_of("ddlr", *ratios), seeds_of("nettrim", 1, 1, 1)) == (word, cell)


def test_sizes_are_compared_on_the_seeds_that_both_were_run_with():
    own, rival = seeds_of("ddlr", 0.9, 0.8, 9.0), seeds_of("nettrim", 1, 1)
    assert compared(own, rival) == ("smaller", "0.85 (0.80 to 0.90)")
    assert compared(rival, own) == ("larger", "1.18 (1.11 to 1.25)")


def test_of_a_method_that_keeps_no_drop_only_a_bound_on_its_size_is_known():
    """Of one seed: more than the largest size it was measured at."""

    def never(rows: pd.DataFrame) -> pd.DataFrame:
        lost = rows["accuracy_drop_held_out"].where(rows["seed"] > 0, 9.0)
        return rows.assign(accuracy_drop_held_out=lost)

    half, whole = seeds_of("ddlr", 0.5, 0.5, 0.5), seeds_of("nettrim", 1, 1, 1)
    # The rival's size of that seed is above 0.6 of all weights, its largest; ours is 0.3 of them.
    word, cell = compared(seeds_of("ddlr", 1.0, 0.5, 0.5), never(whole))
    assert (word, cell) == ("smaller", "0.50; Net-Trim outside the grid in 1 of 3 seeds")
    word, cell = compared(seeds_of("ddlr", 3, 3, 3), never(whole))
    assert (word, cell) == ("undecided", "3.00; Net-Trim outside the grid in 1 of 3 seeds")
    word, cell = compared(never(half), whole)
    assert (word, cell) == ("undecided", "0.50; DDLR outside the grid in 1 of 3 seeds")
    word, cell = compared(never(seeds_of("ddlr", 3, 3, 3)), whole)
    assert (word, cell) == ("larger", "3.00; DDLR outside the grid in 1 of 3 seeds")
    # Where neither keeps the drop nothing is known of that seed; the others count.
    assert compared(never(half), never(whole)) == ("smaller", "0.50")
