"""Targets of guarantees: ranks at an equal bound, drops told beforehand, times of the solvers."""

import pandas as pd

from experiments.report.outcomes import TargetOutcome
from experiments.report.tables import (
    MNIST,
    NETWORK_TITLES,
    ONE_TOLERANCE,
    VARIANT,
    at_commonest_samples_and_ridge,
)
from experiments.report.variants import OURS, USUAL_SAMPLES, variant_words
from experiments.runs.records import USUAL_RIDGE

RANK_TOLERANCES = (0.05, 0.3)  # from and to
RANK_RATIO = 0.8
ACCURACY_DROP = 0.5  # points that a network is compressed to
NETWORKS = 3 * len(MNIST)  # three seeds of each


def lower_rank(sweeps: pd.DataFrame, layers: pd.DataFrame) -> TargetOutcome:
    """Our rank over that of the activation-aware SVD, at the same bound on a hidden layer."""
    ratios = rank_ratios(sweeps, layers)
    compared = ratios[ratios["ratio"].notna()]
    if set(compared["model"]) != set(MNIST):
        return TargetOutcome()
    worst = compared.loc[compared["ratio"].idxmax()]
    within = (compared["ratio"] <= RANK_RATIO).sum()
    text = (
        f"{within} of {len(compared)} layers and tolerances; from {compared['ratio'].min():.2f} to "
        f"{worst['ratio']:.2f} ({worst['layer']} of {NETWORK_TITLES[worst['model']]} at "
        f"{worst['relative_tolerance']:g}); {len(ratios) - len(compared)} left out, stored dense"
    )
    return TargetOutcome(bool(within == len(compared)), text)


def rank_ratios(sweeps: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """The mean ratio over seeds by network, layer and tolerance; NaN where stored dense."""
    runs = sweeps[
        (sweeps["goal"] == ONE_TOLERANCE)
        & (sweeps["calibration_samples"] == USUAL_SAMPLES)
        & (sweeps["ridge"] == USUAL_RIDGE)
        & (sweeps["refit"] == "none")
        & (sweeps["order"] == "parallel")
        & sweeps["model"].isin(MNIST)
        & sweeps["wanted"].between(*RANK_TOLERANCES)
    ]
    layers = layers[layers["run"].isin(runs["run"]) & (layers["activation"] == "relu")]
    at = ["model", "layer", "relative_tolerance"]
    ours, rival = (
        layers.loc[layers["method"] == method, [*at, "seed", "rank", "form"]]
        for method in ("lowest_rank", "activation_svd")
    )
    pairs = ours.merge(rival, on=[*at, "seed"], suffixes=("", "_svd"))
    dense = (pairs["form"] == "dense") | (pairs["form_svd"] == "dense")
    pairs["ratio"] = (pairs["rank"] / pairs["rank_svd"]).mask(dense)
    means = pairs.groupby(at)["ratio"].agg(lambda each: each.mean(skipna=False))
    return means.round(9).reset_index()  # equal ratios have themselves as their mean


def told_beforehand(sweeps: pd.DataFrame) -> TargetOutcome:
    """The test drop of each network lies in the interval that its compression reported.

    Every variant counts that compressed all networks on all seeds.
    """
    runs = sweeps[(sweeps["goal"] == "max_accuracy_drop") & (sweeps["wanted"] == ACCURACY_DROP)]
    runs = at_commonest_samples_and_ridge(
        runs[runs["method"].isin(OURS) & runs["model"].isin(MNIST)]
    )
    all_within, words = True, []
    for key, rows in runs.groupby(VARIANT):
        if len(rows) == NETWORKS:
            within = rows["accuracy_drop"].between(rows["goal_low"], rows["goal_high"]).sum()
            all_within &= within == NETWORKS
            words.append(f"{within} of {NETWORKS}, {variant_words(VARIANT, key)}")
    return TargetOutcome(bool(all_within), "; ".join(words)) if words else TargetOutcome()


def benchmarked(targets: pd.DataFrame, what: str) -> TargetOutcome:
    """What the benchmark of the solvers says of its own target."""
    rows = targets[targets["what"] == what]
    if rows.empty:
        return TargetOutcome()
    row = rows.iloc[0]
    return TargetOutcome(row["met"] == "yes", f"{row['measured']} pairs")
