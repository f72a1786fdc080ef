"""The methods and variants that are compared, and the rows of tables that are theirs.

A *variant* is a refit and an order. DDLR and Net-Trim are *rivals*: each is offered the same ones.
"""

from collections.abc import Iterable, Sequence

import pandas as pd

from experiments.report.tables import METHOD_TITLES, at_one_tolerance
from experiments.runs.records import ONE_TOLERANCE, USUAL_CASCADE_BOUND, USUAL_RIDGE

# The two that are compared, and offered each refit and order alike.
RIVALS = ("ddlr", "nettrim")
# The strongest of today, beside which ours stand in the bars at an equal drop.
TODAYS_RIVALS = ("osscar", "alps", "sparse_low_rank", "double_sparse")
# What this project puts beside them, from the more to the fewer weights.
OURS = (
    "lowest_rank",
    "fewest_weights",
    "smallest_latency",
    "fewest_nonzeros",
    "smallest_bytes",
    "smallest",
)
# Ours without its search, run for the ablation, and the convex program that ours of both structures
# stands beside: no rivals of ours, and not what is aimed at.
STEPS_OF_OURS = ("activation_svd_selected", "low_rank_plus_sparse")
# Refit and order: as in the paper, then from the best that was tried downwards.
AS_PUBLISHED = ("none", "parallel")
IMPROVED = (("layer", "cascade"), ("layer", "parallel"), ("none", "cascade"))
# Refits of one layer after the other, and that of all layers together.
LAYER_REFITS = ("none", "layer")
NETWORK_REFIT = "network"
A_SIZE = "kept_fraction"  # the goal of runs that are to be of a given size
# By how it is allocated to layers.
ALLOCATION_WORDS = {
    A_SIZE: "",
    f"{A_SIZE}_by_roots": "allocated by roots",
    f"{A_SIZE}_by_energy": "allocated by energy, as BALF does",
}
USUAL_SAMPLES = 5000  # of calibration
CASCADE_BOUND_WORDS = {
    "inherited": "its own rule for the bounds",
    "reached": "sizes of parallel order",
}
VARIANT_WORDS = {
    ("none", "parallel"): "parallel, no refit",
    ("none", "cascade"): "cascade, no refit",
    ("layer", "parallel"): "parallel, refit",
    ("layer", "cascade"): "cascade, refit",
}


def layer_by_layer(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with one tolerance for all layers, none of which knows of the layers after it."""
    runs = at_one_tolerance(runs)
    return runs[runs["refit"].isin(LAYER_REFITS)]


def best_variant(
    rows: pd.DataFrame, variants: Iterable[tuple[str, str]] = (*IMPROVED, AS_PUBLISHED)
) -> tuple[str, str] | None:
    """The first of the variants, from the best one downwards, that there are rows of."""
    return next((each for each in variants if len(of_variant(rows, each))), None)


def of_methods(rows: pd.DataFrame, *methods: str) -> pd.DataFrame:
    return rows[rows["method"].isin(methods)]


def of_variant(rows: pd.DataFrame, variant: tuple[str, str]) -> pd.DataFrame:
    refit, order = variant
    return rows[(rows["refit"] == refit) & (rows["order"] == order)]


def in_main_set(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows without those of the rivals in another output set than the main one."""
    rival = rows["method"].isin(RIVALS)
    return rows[~rival | (rows["constraint"] == _main_constraint(rows[rival]))]


def _main_constraint(rows: pd.DataFrame) -> str | None:
    """Net-Trim's set, as the paper reads, where there are rows of it."""
    return max(rows["constraint"], default=None)  # nettrim comes after hinge


def refit_words(refit: str) -> str:
    return "no refit" if refit == "none" else "refit"


def is_baseline(runs: pd.DataFrame) -> pd.Series:
    """For each run, whether its method is one that ours is measured against."""
    return ~runs["method"].isin([*OURS, *STEPS_OF_OURS])


def variant_words(names: Sequence[str], key: tuple) -> str:
    """A method and variant in words, from a key of runs and the names of its parts."""
    settings = dict(zip(names, key, strict=True))
    words = [METHOD_TITLES.get(settings["method"], settings["method"])]
    words += [f"refit {settings['refit']}", settings["order"]]
    if settings.get("network_refit"):
        words[1] += f" ({settings['network_refit']})"
    if settings["method"] in ("ddlr", "nettrim") and settings["constraint"] == "hinge":
        words.append("hinge set")
    if settings.get("goal") == ONE_TOLERANCE:
        words.append("one tolerance")
    if ALLOCATION_WORDS.get(settings.get("goal")):
        words.append(ALLOCATION_WORDS[settings["goal"]])
    bound = settings.get("cascade_bound", USUAL_CASCADE_BOUND)
    if bound != USUAL_CASCADE_BOUND:
        words.append(CASCADE_BOUND_WORDS[bound])
    if settings.get("ridge", USUAL_RIDGE) != USUAL_RIDGE:
        words.append(f"ridge {settings['ridge']:g}")
    if settings.get("calibration_samples", USUAL_SAMPLES) != USUAL_SAMPLES:
        words.append(f"{settings['calibration_samples']} samples")
    return ", ".join(words)
