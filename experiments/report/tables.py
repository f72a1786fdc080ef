"""How the tables of results are read: names and their order, settings and variants.

Needs neither torch nor a network. A *setting* is everything about a run but its seed; a *variant*
is a method with its output set, refit and order. What a run was to reach is its *goal* and the
value *wanted*: one relative tolerance for all layers, or a goal for the network, for which each
layer has its own.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from experiments.runs.records import (
    ONE_TOLERANCE,
    USUAL_CASCADE_BOUND,
    USUAL_RIDGE,
    write_whole,
)

NETWORK_TITLES = {
    "lenet_300_100": "LeNet-300-100 on MNIST",
    "fc_nettrim": "784-300-1000-100-10 on MNIST",
    "lenet5": "LeNet-5 on MNIST, FC layers",
    "fc_nettrim_fashion": "784-300-1000-100-10 on Fashion-MNIST",
    "convnet_nettrim": "Net-Trim's conv net on CIFAR-10, FC layers",
    "vgg_small": "VGG-style net on CIFAR-10, FC layers",
    "mlp_digits": "MLP 64-48-32-10 on digits",
}
MNIST = ("lenet_300_100", "fc_nettrim", "lenet5")
FASHION = ("fc_nettrim_fashion",)
CIFAR10 = ("vgg_small", "convnet_nettrim")
# One architecture on several data sets is several networks. These have a name of their own.
_NETWORKS_BY_DATASET = {("fashion_mnist", "fc_nettrim"): "fc_nettrim_fashion"}
# For axes, in two lines at most.
SHORT_TITLES = {
    "lenet_300_100": "LeNet-\n300-100",
    "fc_nettrim": "784-300-\n1000-100-10",
    "lenet5": "LeNet-5,\nFC layers",
    "fc_nettrim_fashion": "784-300-\n..., Fashion",
    "convnet_nettrim": "Net-Trim's\nconv net",
    "vgg_small": "VGG-style\nnet",
    "mlp_digits": "MLP on\ndigits",
}
METHOD_TITLES = {
    "fewest_weights": "fewest weights (rank and inputs)",
    "fewest_nonzeros": "fewest nonzeros",
    "smallest": "smallest form",
    "smallest_bytes": "smallest form, by bytes",
    "smallest_latency": "fastest form",
    "lowest_rank": "lowest rank",
    "ddlr": "DDLR (nuclear norm)",
    "nettrim": "Net-Trim (l1)",
    "nettrim_protocol": "Net-Trim, its own protocol",
    "svd": "SVD of the weights",
    "activation_svd": "activation-aware SVD",
    "activation_svd_selected": "activation-aware SVD on selected inputs",
    "alps": "ALPS",
    "sparsegpt": "SparseGPT",
    "osscar": "OSSCAR and low rank",
    "double_sparse": "double sparse factors",
    "sparse_low_rank": "sparse plus low rank",
    "low_rank_plus_sparse": "low rank plus sparse, convex",
    "magnitude": "magnitude, a threshold a layer",
    "magnitude_global": "magnitude, one threshold",
    "ddlr_cvxpy": "DDLR, cone solver",
    "nettrim_cvxpy": "Net-Trim, cone solver",
}
# What is counted to the column that holds it, as a fraction of the dense layers.
FRACTIONS = {"weights": "kept_fraction", "bytes": "bytes_fraction"}
# Table to the command that makes it.
MADE_BY = {
    "sweeps": "python -m experiments.compress, then python -m experiments.collect",
    "layers": "python -m experiments.compress, then python -m experiments.collect",
    "sizes": "python -m experiments.collect",
    "ablation": "python -m experiments.collect",
    "inference": "python -m experiments.inference",
    "times_at_drop": "python -m experiments.times_at_drop",
    "spectrum": "python -m experiments.spectrum",
    "finetune": "python -m experiments.finetune",
    "benchmark_targets": "python -m experiments.benchmark",
}
VARIANT = ["method", "constraint", "refit", "order"]
GROUP = [
    *("dataset", "model", *VARIANT, "cascade_bound", "ridge", "calibration_samples"),
    *("network_refit", "goal"),
]
SETTING = [*GROUP, "wanted"]


def read_table(path: Path) -> pd.DataFrame:
    """A table, with the keys of runs as text also where they consist of digits.

    A `model` that is trained on several data sets is named as one network for each.
    """
    table = pd.read_csv(path, dtype={"run": str})
    for (dataset, model), name in _NETWORKS_BY_DATASET.items():
        if {"dataset", "model"} <= set(table):
            is_network = (table["dataset"] == dataset) & (table["model"] == model)
            table.loc[is_network, "model"] = name
    if "relative_tolerance" in table and "calibration_samples" in table:
        table = with_choices(table)
    if "network_refit" in table:  # what is as usual is written as nothing
        table["network_refit"] = table["network_refit"].astype(object).fillna("")
    if {"bytes_stored", "bytes_dense"} <= set(table):
        table["bytes_fraction"] = table["bytes_stored"] / table["bytes_dense"]
    return table


def with_choices(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with what those lack that were written down before it was a choice.

    `earlier` marks rows that are carried over from before weights that no output depends on were
    removed for every method, and before certificates had two sides. `chosen_by_factors` marks those
    of which the size was decided by former counts, see `experiments.runs.recounting`.
    """
    marks = ["earlier", "chosen_by_factors"]
    named = ["goal", "wanted", "ridge", "cascade_bound", "network_refit"]
    choices = runs.reindex(columns=[*named, *marks])
    return runs.assign(
        goal=choices["goal"].astype(object).fillna(ONE_TOLERANCE),
        wanted=choices["wanted"].fillna(runs["relative_tolerance"]),
        ridge=choices["ridge"].fillna(USUAL_RIDGE),
        cascade_bound=choices["cascade_bound"].astype(object).fillna(USUAL_CASCADE_BOUND),
        network_refit=choices["network_refit"].astype(object).fillna(""),
        **{mark: choices[mark].astype(object).fillna(False).astype(bool) for mark in marks},
    )


def at_one_tolerance(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with one tolerance for all layers."""
    return runs[runs["goal"] == ONE_TOLERANCE]


def read_tables(results: Path) -> dict[str, pd.DataFrame]:
    """The tables of a folder of results that are there, by their names."""
    paths = {name: results / f"{name}.csv" for name in MADE_BY}
    return {name: read_table(path) for name, path in paths.items() if path.is_file()}


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table whole or not at all."""
    write_whole(path, lambda scratch: table.to_csv(scratch, index=False, float_format="%.8g"))


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names once each, in the order of the known ones; others come last, by the alphabet."""
    known = list(known)
    places = {name: place for place, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (places.get(name, len(known)), name))


def with_all_seeds(sweeps: pd.DataFrame) -> pd.DataFrame:
    """The rows of settings that were run with every seed of their network."""
    of_network = sweeps.groupby(["dataset", "model"])["seed"].transform("nunique")
    return sweeps[sweeps.groupby(SETTING)["seed"].transform("nunique") == of_network]


def at_commonest_samples_and_ridge(sweeps: pd.DataFrame) -> pd.DataFrame:
    """The rows at the calibration samples and ridge that a network and method has most rows of.

    Where two have as many rows, the larger ones are taken.
    """
    of, chosen = ["model", "method"], ["calibration_samples", "ridge"]
    counts = sweeps.groupby([*of, *chosen]).size().reset_index(name="n")
    commonest = counts.sort_values(["n", *chosen]).drop_duplicates(of, keep="last")
    at_commonest = sweeps.set_index([*of, *chosen]).index.isin(
        commonest.set_index([*of, *chosen]).index
    )
    return sweeps[at_commonest]
