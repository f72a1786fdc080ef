"""Baselines above and below the frontier of ours, by tables made for it."""

import pandas as pd
import pytest

from experiments.report.frontier_excess import SINGLE_SEED_MARGIN, Curve, excess
from made_up_curves import ALL_SEEDS, curve, judged

FRONTIERS = {
    "lenet_300_100": "LeNet-300-100.*above ours.*weights",
    "fc_nettrim": "784-300.*above ours.*weights",
    "lenet5": "LeNet-5 on.*above ours.*weights",
    "convnet_nettrim": "conv net.*above ours.*weights",
    "vgg_small": "VGG.*above ours.*weights",
}


@pytest.mark.slow
@pytest.mark.parametrize("model", FRONTIERS)
@pytest.mark.parametrize("seeds", [ALL_SEEDS, (0,)])
def test_no_baseline_is_above_the_frontier(model, seeds):
    own = {"model": model, "seeds": seeds}
    ours, worse = curve("lowest_rank", 0.1, **own), curve("svd", 0.12, **own)
    assert judged(FRONTIERS[model], ours, worse)["met"] == "yes"
    better = curve("nettrim", 0.08, refit="layer", goal="relative_tolerance", **own)
    row = judged(FRONTIERS[model], ours, worse, better)
    assert row["met"] == "no"
    assert "Net-Trim (l1), refit layer, parallel, hinge set, one tolerance" in row["measured"]
    # A second curve of ours is the frontier where it is the better one.
    as_good = curve("fewest_weights", 0.08, **own)
    assert judged(FRONTIERS[model], ours, better, as_good)["met"] == "yes"
    for alone in (ours, better, curve("magnitude", 0.1, refit="network", **own)):
        assert judged(FRONTIERS[model], alone)["measured"] == "not measured"


def raised(rows: pd.DataFrame, points: float) -> pd.DataFrame:
    return rows.assign(accuracy=rows["accuracy"] + points)


def test_a_baseline_may_be_above_by_the_seed_spread():
    what = FRONTIERS["lenet5"]
    ours, baseline = (curve(method, 0.1, model="lenet5") for method in ("lowest_rank", "svd"))
    ours["accuracy"] += 0.5 * (ours["seed"] - 1)  # a range of 1 point
    row = judged(what, ours, raised(baseline, 0.49))
    assert row["met"] == "yes"
    assert row["measured"].startswith("largest excess +0.49 points at ")
    assert "(seed spread 0.50): SVD of the weights, refit none, parallel" in row["measured"]
    assert "; compared from 5." in row["measured"]
    row = judged(what, ours, raised(baseline, 0.51))
    assert row["met"] == "no"
    assert "; beyond the spread at 29 of 29 sizes, within 5." in row["measured"]
    assert row["measured"].endswith("by 1 of 1 baselines in their variants")


def test_ours_at_a_size_is_the_one_that_held_out_samples_choose():
    what = FRONTIERS["lenet5"]
    ours, baseline = (curve(method, 0.1, model="lenet5") for method in ("lowest_rank", "svd"))
    lucky = curve("fewest_weights", 0.1, model="lenet5")
    lucky = lucky.assign(accuracy=lucky["accuracy"] + 2)  # on the test set alone
    lucky["accuracy_drop_held_out"] += 0.5
    row = judged(what, ours, raised(baseline, 1.0), lucky)
    assert row["measured"].startswith("largest excess +1.00 points at ")
    assert row["met"] == "no"


def test_weights_and_bytes_have_a_frontier_each():
    in_weights = FRONTIERS["lenet5"]
    in_bytes = in_weights.replace("weights", "bytes")
    ours, baseline = (curve(method, 0.1, model="lenet5") for method in ("lowest_rank", "svd"))
    few_bytes = baseline.assign(bytes_fraction=0.8 * baseline["bytes_fraction"])
    assert judged(in_weights, ours, few_bytes)["met"] == "yes"
    assert judged(in_bytes, ours, few_bytes)["met"] == "no"
    many_bytes = baseline.assign(
        kept_fraction=0.8 * baseline["kept_fraction"], bytes_fraction=baseline["bytes_fraction"]
    )
    assert judged(in_weights, ours, many_bytes)["met"] == "no"
    assert judged(in_bytes, ours, many_bytes)["met"] == "yes"
    without = [rows.drop(columns="bytes_fraction") for rows in (ours, baseline)]
    assert judged(in_bytes, *without)["measured"] == "not measured"


def test_with_one_seed_a_baseline_may_be_above_by_a_named_margin():
    what, one = FRONTIERS["vgg_small"], {"model": "vgg_small", "seeds": (0,)}
    ours, baseline = (curve(method, 0.1, **one) for method in ("lowest_rank", "svd"))
    row = judged(what, ours, raised(baseline, 0.19))
    assert row["met"] == "yes"
    assert "(one seed, a margin of 0.20)" in row["measured"]
    assert judged(what, ours, raised(baseline, 0.21))["met"] == "no"


def test_a_baseline_of_one_seed_is_compared_on_that_seed():
    what = FRONTIERS["fc_nettrim"]
    ours = curve("lowest_rank", 0.1, model="fc_nettrim")
    ours.loc[ours["seed"] == 0, "accuracy"] += 0.5
    single = curve("nettrim_protocol", 0.1, model="fc_nettrim", seeds=(0,))
    assert judged(what, ours, raised(single, 0.6))["met"] == "yes"
    assert judged(what, ours, raised(single, 0.8))["met"] == "no"


def test_far_from_dense_and_outside_the_measured_sizes_nothing_is_compared():
    what = FRONTIERS["lenet5"]
    low = {"model": "lenet5", "test_drops": (30.0, 20.0, 10.0)}
    ours, better = curve("lowest_rank", 0.1, **low), curve("svd", 0.1, model="lenet5")
    assert judged(what, ours, better)["measured"] == "not measured"
    elsewhere = curve("svd", 0.01, model="lenet5")
    assert judged(what, curve("lowest_rank", 0.1, model="lenet5"), elsewhere)["met"] == ""


def a_curve(columns: dict[int, list[float]], sizes: tuple[float, ...] = (0.1, 0.2)) -> Curve:
    """Test accuracies at sizes, a column a seed; on held-out samples they are the same."""
    accuracy = pd.DataFrame(columns, index=sizes)
    return Curve("a curve", accuracy, 98.0 - accuracy)


DENSE = pd.Series({0: 98.0, 1: 98.0, 2: 80.0})


def rows_of(found: pd.DataFrame) -> list[tuple]:
    return [tuple(round(float(each), 9) for each in row) for row in found.to_numpy()]


def test_the_excess_is_over_the_best_of_ours_and_the_margin_half_the_wider_range():
    better = a_curve({0: [95.0, 97.0], 1: [96.0, 97.5]})
    worse = a_curve({0: [94.0, 97.4], 1: [94.0, 97.5]})
    baseline = a_curve({0: [95.8, 97.5], 1: [96.0, 98.3]})
    for ours in ([better, worse], [worse, better]):
        # At the second size `worse` is the better one; its range is narrower than the baseline's.
        assert rows_of(excess(ours, baseline, DENSE)) == [(0.1, 0.4, 0.5, 2), (0.2, 0.45, 0.4, 2)]


def test_an_excess_is_told_on_the_baselines_seeds_where_both_were_measured():
    nan = float("nan")
    ours = [a_curve({0: [95.0, nan], 1: [97.0, 97.0], 2: [50.0, 97.0]})]
    single = a_curve({0: [95.5, 96.0]})
    assert rows_of(excess(ours, single, DENSE)) == [(0.1, 0.5, SINGLE_SEED_MARGIN, 1)]
    # Of two seeds the baseline lacks one at the first size, and ours one at the second.
    pair = a_curve({0: [nan, 96.0], 1: [96.0, 96.0]})
    assert excess(ours, pair, DENSE).empty
    # A curve of ours that lacks a seed of the baseline's is no rival.
    lacking = [a_curve({0: [99.0, 99.0]})]
    both = a_curve({0: [95.5, 96.0], 1: [97.5, 96.0]})
    assert rows_of(excess(ours + lacking, both, DENSE)) == [(0.1, 0.5, 1.0, 2)]
    assert excess(lacking, both, DENSE).empty


def test_where_ours_is_far_from_the_dense_networks_of_those_seeds_nothing_is_told():
    """Near is within five points of the mean over the baseline's seeds."""
    ours = [a_curve({0: [92.9, 93.1], 1: [92.9, 93.1]})]
    baseline = a_curve({0: [97.0, 97.0], 1: [97.0, 97.0]})
    assert rows_of(excess(ours, baseline, DENSE)) == [(0.2, 3.9, 0.0, 2)]
    low = [a_curve({2: [76.0, 76.0]})]
    assert len(excess(low, a_curve({2: [77.0, 77.0]}), DENSE)) == 2
