"""Guarantees, each target met and missed by a table made for it."""

import pandas as pd
import pytest

from experiments.report.solver_targets import ONE_RANK, RANK_SEARCH, SUM_OF_STRUCTURES
from experiments.report.tables import MNIST
from made_up_curves import ALL_SEEDS, judged, to_a_drop


def of_rank(
    method: str, rank: int, *, tolerances: tuple[float, ...] = (0.05, 0.3), form: str = "low_rank"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs of the three MNIST networks and their layers, one of them hidden."""
    runs = pd.DataFrame(
        [
            {"run": f"{method}-{model}-{tolerance}-{seed}", "model": model, "seed": seed}
            | {"wanted": tolerance, "relative_tolerance": tolerance, "method": method}
            for model in MNIST
            for tolerance in tolerances
            for seed in ALL_SEEDS
        ]
    ).assign(refit="none", order="parallel", goal="relative_tolerance", calibration_samples=5000)
    runs = runs.assign(dataset="mnist", constraint="hinge", ridge=0.01, cascade_bound="tolerance")
    runs["network_refit"] = ""
    columns = ["run", "model", "seed", "method", "relative_tolerance"]
    hidden = runs[columns].assign(layer="fc1", activation="relu", rank=rank, form=form)
    last = runs[columns].assign(layer="fc2", activation="none", rank=1, form="low_rank")
    return runs, pd.concat([hidden, last], ignore_index=True)


def ranks_judged(*pairs: tuple[pd.DataFrame, pd.DataFrame]) -> pd.Series:
    runs, layers = (pd.concat(tables, ignore_index=True) for tables in zip(*pairs, strict=True))
    # Of the frontier and sizes, other targets, these runs know nothing.
    runs = runs.assign(kept_fraction=0.5, accuracy=98.0, accuracy_dense=98.0)
    runs = runs.assign(accuracy_drop=0.0, accuracy_drop_held_out=2.0)
    return judged("our rank", sweeps=runs, layers=layers)


def test_the_rank_at_an_equal_bound():
    rival = of_rank("activation_svd", 100, tolerances=(0.03, 0.05, 0.3, 0.5))
    row = ranks_judged(of_rank("lowest_rank", 80, tolerances=(0.05, 0.3, 0.5)), rival)
    assert row["met"] == "yes"
    assert row["measured"].startswith("6 of 6 layers and tolerances; from 0.80 to 0.80")
    runs, layers = of_rank("lowest_rank", 60)
    worst = (layers["model"] == "lenet5") & (layers["relative_tolerance"] == 0.3)
    layers.loc[worst, "rank"] = 90
    row = ranks_judged((runs, layers), rival)
    assert row["met"] == "no"
    assert row["measured"] == (
        "5 of 6 layers and tolerances; from 0.60 to 0.90 (fc1 of LeNet-5 on MNIST, FC layers at "
        "0.3); 0 left out, stored dense"
    )


def test_layers_stored_dense_have_no_rank_and_are_counted():
    rival = of_rank("activation_svd", 100)
    runs, layers = of_rank("lowest_rank", 60)
    dense = (layers["model"] == "fc_nettrim") & (layers["relative_tolerance"] == 0.05)
    layers.loc[dense & (layers["seed"] == 1), ["form", "rank"]] = "dense", 300
    row = ranks_judged((runs, layers), rival)
    assert row["met"] == "yes"
    assert row["measured"].startswith("5 of 5 layers")
    assert row["measured"].endswith("1 left out, stored dense")


def test_ranks_take_both_methods_on_all_networks():
    rival, (runs, layers) = of_rank("activation_svd", 100), of_rank("lowest_rank", 60)
    assert ranks_judged(rival)["measured"] == "not measured"
    assert ranks_judged((runs, layers), of_rank("activation_svd", 9, form="dense"))["met"] == ""
    two = (runs[runs["model"] != "lenet5"], layers)
    assert ranks_judged(two, rival)["measured"] == "not measured"


def test_the_test_drop_lies_in_the_interval_reported():
    what = "compressed to a drop"
    row = judged(what, to_a_drop(0.75), to_a_drop(0.2, method="fewest_weights", refit="none"))
    assert row["met"] == "yes"
    assert row["measured"] == (
        "9 of 9, fewest weights (rank and inputs), refit none, parallel; "
        "9 of 9, lowest rank, refit layer, parallel"
    )
    missed = to_a_drop(0.75)
    missed.loc[4, "accuracy_drop"] = 0.85
    row = judged(what, missed, to_a_drop(0.2, refit="network"))
    assert row["met"] == "no"
    assert row["measured"].startswith("8 of 9, lowest rank, refit layer")
    # A variant that lacks a network, another drop and another method do not count.
    others = to_a_drop(0.9).iloc[1:], to_a_drop(0.9, wanted=1.0), to_a_drop(0.9, method="svd")
    assert judged(what, *others)["measured"] == "not measured"
    assert judged(what, *others, to_a_drop(0.3, refit="none"))["met"] == "yes"


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("best weight of one rank", ONE_RANK),
        ("whole search", RANK_SEARCH),
        ("low rank plus sparse, convex", SUM_OF_STRUCTURES),
    ],
)
def test_times_are_those_of_the_benchmark(what, named):
    rows = [("another", "<= 3", "> 19.5", "no"), (named, "<= 12", "9.31", "yes")]
    table = pd.DataFrame(rows, columns=["what", "target", "measured", "met"])
    row = judged(what, benchmark_targets=table)
    assert (row["measured"], row["met"]) == ("9.31 pairs", "yes")
    row = judged(what, benchmark_targets=table.assign(measured="14", met="no"))
    assert (row["measured"], row["met"]) == ("14 pairs", "no")
    assert judged(what, benchmark_targets=table.iloc[:1])["measured"] == "not measured"
