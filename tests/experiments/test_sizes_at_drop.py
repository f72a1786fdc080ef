"""Sizes at an equal drop, each target met and missed by a table made for it."""

import re

import pytest

from experiments.report.tables import CIFAR10, MNIST, NETWORK_TITLES
from made_up_curves import ALL_SEEDS, curve, judged

SIZE_TARGETS = [
    ("lenet_300_100", "LeNet-300-100.*weights kept.*no network refit", "layer", 0.023),
    ("lenet_300_100", "LeNet-300-100.*weights kept.*with network refit", "network", 0.018),
    ("lenet5", "LeNet-5 on.*weights kept.*no network refit", "layer", 0.0085),
    ("lenet5", "LeNet-5 on.*weights kept.*with network refit", "network", 0.006),
]


@pytest.mark.parametrize(("model", "what", "refit", "limit"), SIZE_TARGETS)
def test_the_size_at_a_drop(model, what, refit, limit):
    small, large = (
        curve("lowest_rank", limit * factor, model=model, refit=refit) for factor in (0.99, 1.01)
    )
    assert judged(what, small)["met"] == "yes"
    assert judged(what, large)["met"] == "no"
    # Not measured: by methods of others, to another goal, with another refit.
    others = [
        curve("svd", 0.01, model=model, refit=refit),
        curve("lowest_rank", 0.01, model=model, refit=refit, goal="relative_tolerance"),
        curve("lowest_rank", 0.01, model=model, refit="none" if refit == "network" else "network"),
    ]
    assert judged(what, *others)["measured"] == "not measured"


@pytest.mark.parametrize(("model", "limit"), [("lenet_300_100", 0.032), ("lenet5", 0.012)])
def test_the_size_in_bytes(model, limit):
    what = {"lenet_300_100": "LeNet-300-100", "lenet5": "LeNet-5 on"}[model] + ".*bytes kept"
    # More weights than are allowed, in few bytes, and the other way round.
    few, many = (
        curve("lowest_rank", weights, model=model).assign(
            bytes_fraction=lambda rows, of=size / weights: of * rows["kept_fraction"]
        )
        for weights, size in ((0.1, 0.99 * limit), (0.001, 1.01 * limit))
    )
    assert judged(what, few)["met"] == "yes"
    assert judged(what, many)["met"] == "no"
    assert judged(what, few)["test_drop"] == "1.00"


SIZE = SIZE_TARGETS[0][1]
VGG_OVER = "VGG.*our weights at a drop of at most 1 "


def test_the_size_says_what_it_is_of_and_what_it_costs_on_the_test_set():
    best = curve("fewest_weights", 0.08, order="cascade", test_drops=(3.2, 1.25, 0.3))
    best.loc[best["seed"] == 2, "kept_fraction"] *= 1.25
    row = judged(SIZE, curve("lowest_rank", 0.087), best)
    assert row["measured"] == (
        "8.67 % (8.00 to 10.00 over seeds), fewest weights (rank and inputs), refit none, cascade"
    )
    assert row["test_drop"] == "1.25"


def test_between_measured_sizes_the_test_drop_is_interpolated_as_the_held_out_one_is():
    # The drop of a point lies half way, on a logarithmic scale, from half the size to the size.
    rows = curve("lowest_rank", 0.1, drops=(1.5, 0.5, 0.1), test_drops=(2.0, 1.0, 0.1))
    row = judged(SIZE, rows)
    assert row["measured"].startswith("7.07 %, lowest rank")
    assert row["test_drop"] == "1.50"


def test_a_variant_counts_only_if_every_seed_keeps_the_drop():
    never = curve("lowest_rank", 0.01)
    never.loc[never["seed"] == 1, "accuracy_drop_held_out"] = 1.1
    assert judged(SIZE, never)["measured"] == "not measured"
    assert judged(SIZE, never, curve("fewest_weights", 0.08))["measured"].startswith("8.00 %")
    two_seeds = curve("lowest_rank", 0.01, seeds=(0, 1))
    assert judged(SIZE, two_seeds, curve("fewest_weights", 0.08))["measured"].startswith("8.00 %")


def test_a_size_that_may_be_smaller_still_says_so():
    within = curve("lowest_rank", 0.1, drops=(0.9, 0.5, 0.1))
    assert judged(SIZE, within)["measured"].startswith("at most 5.00 %")


@pytest.mark.parametrize("model", [*CIFAR10, *MNIST])
def test_the_size_over_that_of_the_best_baseline(model):
    what = f"{re.escape(NETWORK_TITLES[model])}: our weights at a drop of at most 1 "
    one = {"model": model, "seeds": (0,)}
    limit = 0.7 if model in CIFAR10 else 0.8
    ours = curve("lowest_rank", 0.1 * (limit - 0.05), **one)
    baseline = curve("ddlr", 0.1, refit="layer", goal="relative_tolerance", **one)
    worse = curve("activation_svd", 0.2, **one)
    row = judged(what, ours, baseline, worse)
    assert row["met"] == "yes"
    assert row["measured"] == (
        f"{limit - 0.05:.2f}: {100 * (0.1 * (limit - 0.05)):.2f} %, lowest rank, refit none, "
        "parallel; best baseline 10.00 %, DDLR (nuclear "
        "norm), refit layer, parallel, hinge set, one tolerance; of one seed, whose spread is not "
        "known"
    )
    assert row["test_drop"] == "1.00; baseline 1.00"
    assert judged(what, ours, curve("nettrim", 0.09, **one), worse)["met"] == "no"
    assert judged(what, ours)["measured"] == "not measured"
    assert judged(what, baseline)["measured"] == "not measured"
    # The refit of the network is not counted, of neither side.
    refitted = curve("svd", 0.01, refit="network", **one)
    assert judged(what, ours, baseline, refitted)["met"] == "yes"
    assert judged(what, curve("lowest_rank", 0.01, refit="network", **one), baseline)["met"] == ""


def test_ours_without_its_search_is_no_baseline_and_not_ours():
    step, one = "activation_svd_selected", {"model": "vgg_small", "seeds": (0,)}
    ours, baseline = curve("fewest_weights", 0.065, **one), curve("svd", 0.1, **one)
    smaller = curve(step, 0.01, **one)
    for what in (VGG_OVER, "VGG.*baselines above.*weights"):
        without, beside = judged(what, ours, baseline), judged(what, ours, baseline, smaller)
        assert without["met"] == "yes"
        assert without.to_dict() == beside.to_dict()
    assert judged(VGG_OVER, smaller, baseline)["measured"] == "not measured"


def test_a_baseline_that_may_be_smaller_than_it_was_measured_leaves_the_target_unmet():
    one = {"model": "vgg_small", "seeds": (0,)}
    within = curve("svd", 0.2, drops=(0.9, 0.5, 0.1), **one)
    row = judged(VGG_OVER, curve("lowest_rank", 0.01, **one), within)
    assert row["measured"].startswith("at least 0.10")
    assert row["met"] == "no"


@pytest.mark.parametrize("what", [VGG_OVER, "VGG.*above ours.*weights"])
def test_baselines_count_at_any_number_of_samples(what):
    one = {"model": "vgg_small", "seeds": (0,)}
    ours = curve("lowest_rank", 0.06, samples=20000, **one)
    # Most of the baseline's rows are at the usual number.
    usual = [curve("svd", 0.1, goal=goal, **one) for goal in ("kept_fraction", "max_parameters")]
    assert judged(what, ours, *usual)["met"] == "yes"
    row = judged(what, ours, *usual, curve("svd", 0.05, samples=10000, **one))
    assert row["met"] == "no"
    assert "SVD of the weights, refit none, parallel, 10000 samples" in row["measured"]


def test_of_two_ridges_the_one_that_is_smaller_on_held_out_samples_is_ours_and_is_named():
    one = {"model": "vgg_small", "seeds": (0,)}
    ours = curve("lowest_rank", 0.06, ridge=1.0, **one)
    larger = curve("lowest_rank", 0.08, **one)
    better_on_test = larger.assign(accuracy=99.9, accuracy_drop=-1.9)
    row = judged(VGG_OVER, ours, better_on_test, curve("svd", 0.1, **one))
    assert row["measured"].startswith("0.60: 6.00 %, lowest rank, refit none, parallel, ridge 1;")


def test_a_size_is_at_most_where_a_single_seed_was_within_the_drop_throughout():
    for seed in ALL_SEEDS:
        rows = curve("lowest_rank", 0.08)
        own = (rows["seed"] == seed) & (rows["kept_fraction"] == 0.04)
        rows.loc[own, "accuracy_drop_held_out"] = 0.9
        assert judged(SIZE, rows)["measured"].startswith("at most 6.67 % (4.00 to 8.00")
