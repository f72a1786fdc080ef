"""The report on times at equal drops: the faster form of each method, and whose is the fastest."""

import pandas as pd
import pytest

from experiments.report.figures_time import times_at_drop
from experiments.report.times_at_drop import fastest_is_ours, over_seeds


def times(microseconds: dict[str, list[float]], *, batch: int = 256) -> pd.DataFrame:
    """Rows of some methods, one a seed and form; the fused form takes 10 microseconds more."""
    rows = [
        {
            **{"dataset": "mnist", "model": "lenet5", "largest_drop": 1.0, "batch": batch},
            **{"method": method, "seed": seed, "form": form},
            "microseconds": each + added,
            "speedup": 100 / (each + added),
        }
        for method, of_seeds in microseconds.items()
        for seed, each in enumerate(of_seeds)
        for form, added in (("stored", 0), ("fused", 10))
    ]
    return pd.DataFrame(rows)


def test_each_seed_counts_with_its_faster_form():
    (row,) = over_seeds(times({"alps": [20.0, 30.0]})).to_dict("records")
    assert row["microseconds"] == 25
    assert (row["low"], row["high"]) == pytest.approx((100 / 30, 5))


def test_a_method_that_lacks_a_seed_is_left_out():
    table = over_seeds(times({"alps": [20.0, 30.0], "svd": [5.0]}))
    assert list(table["method"]) == ["alps"]


@pytest.mark.parametrize(("ours", "met"), [(19.0, True), (21.0, False)])
def test_the_fastest_of_ours_stands_against_the_fastest_baseline(ours, met):
    measured = times(
        {"fewest_weights": [ours], "lowest_rank": [90.0], "alps": [20.0], "svd": [50.0]}
    )
    outcome = fastest_is_ours(measured, "lenet5", 1.0, 256)
    assert outcome.met is met
    assert f"{ours:.0f} microseconds" in outcome.measured
    assert "fastest baseline 20 microseconds" in outcome.measured


def test_without_times_of_either_side_nothing_is_judged():
    for method in ("fewest_weights", "alps"):
        assert fastest_is_ours(times({method: [1.0]}), "lenet5", 1.0, 256).met is None
    both = times({"fewest_weights": [1.0], "alps": [2.0]}, batch=1)
    assert fastest_is_ours(both, "lenet5", 1.0, 256).met is None


def test_the_figure_has_a_bar_for_each_method_above_or_below_the_dense_time():
    measured = times({"fewest_weights": [10.0, 20.0], "alps": [200.0, 200.0]})
    (axes,) = times_at_drop(measured).axes
    heights = {bars.get_label(): bars[0].get_height() for bars in axes.containers if len(bars) == 1}
    bars = [patch for patch in axes.patches if patch.get_height()]
    assert [round(bar.get_y() + bar.get_height(), 3) for bar in bars] == [7.5, 0.5], heights
    assert times_at_drop(measured.iloc[:0]) is None
