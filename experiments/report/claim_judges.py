"""The judges of the paper's claims: each says of a network and variant whether a claim holds."""

import pandas as pd

from experiments.report.markdown import NOT_MEASURED, spread
from experiments.report.outcomes import ClaimOutcome
from experiments.report.size_ratios import EQUAL_DROPS, compare_sizes
from experiments.report.tables import (
    FRACTIONS,
    NETWORK_TITLES,
    at_commonest_samples_and_ridge,
    at_one_tolerance,
    in_order,
    with_all_seeds,
)

# What has to be measured for the verdict to be complete.
COMPARED = ("lenet_300_100", "fc_nettrim", "lenet5", "convnet_nettrim", "vgg_small")
CHOSEN_WITHIN = 0.5  # points of held-out accuracy that choose a tolerance
LOSS_AT_MOST = 1.0  # points of test accuracy that are a small loss
KEPT_AT_MOST = 0.5  # of the weights, where they fall a lot
VIOLATION = 1e-3  # by which a solve may end above its bound, relative to it
HELD_OUT_FACTOR = 1.25  # of the promised error, on samples that no solve has seen
FASTER_BY = 1.1  # times; a repeated timing scatters by less


class Tables:
    """The tables, reduced to what verdicts are about.

    That is one tolerance for all layers, all seeds, and the commonest calibration samples and
    ridge. A table that is missing is empty.
    """

    def __init__(self, tables: dict[str, pd.DataFrame]):
        sweeps = at_one_tolerance(tables["sweeps"])
        self.sweeps = with_all_seeds(at_commonest_samples_and_ridge(sweeps))
        layers, sizes = tables.get("layers"), tables.get("sizes")
        nothing = pd.DataFrame()
        self.layers = nothing if layers is None else layers[layers["run"].isin(self.sweeps["run"])]
        self.sizes = (
            nothing if sizes is None else at_commonest_samples_and_ridge(at_one_tolerance(sizes))
        )
        self.inference = tables.get("inference", nothing)

    def networks(self) -> list[str]:
        return in_order([*COMPARED, *self.sweeps["model"]], NETWORK_TITLES)

    def of(
        self, table: pd.DataFrame, model: str, method: str, variant: tuple[str, str]
    ) -> pd.DataFrame:
        """The rows of a network, method and variant; in Net-Trim's output set where there are."""
        if table.empty:
            return table
        rows = table[(table["model"] == model) & (table["method"] == method)]
        refit, order = variant
        rows = rows[(rows["refit"] == refit) & (rows["order"] == order)]
        return rows[rows["constraint"] == rows["constraint"].max()]  # nettrim comes after hinge


def fewer_parameters(tables: Tables, model: str, variant: tuple[str, str]) -> ClaimOutcome:
    if tables.of(tables.sweeps, model, "ddlr", variant).empty or tables.sizes.empty:
        return ClaimOutcome(None)
    sizes = tables.of(tables.sizes, model, "ddlr", variant)
    chosen = sizes[(sizes["counted"] == "weights") & (sizes["largest_drop"] == CHOSEN_WITHIN)]
    if chosen.empty:
        return ClaimOutcome(False, ("no tolerance is within the held-out drop", "", "", ""))
    row = chosen.iloc[0]
    numbers = (
        spread(100 * row["fraction"], 100 * row["fraction_min"], 100 * row["fraction_max"], 1),
        spread(row["accuracy_drop"], row["accuracy_drop_min"], row["accuracy_drop_max"], 2),
        f"{row['wanted']:g}",
        f"{row['seeds']:.0f}",
    )
    small = row["fraction"] <= KEPT_AT_MOST and row["accuracy_drop"] <= LOSS_AT_MOST
    return ClaimOutcome(bool(small), numbers)


def promise_kept(tables: Tables, model: str, variant: tuple[str, str]) -> ClaimOutcome:
    layers = tables.of(tables.layers, model, "ddlr", variant)
    runs = tables.of(tables.sweeps, model, "ddlr", variant)
    if layers.empty or runs.empty:
        return ClaimOutcome(None)
    kept = layers["relative_error_read"] <= layers["relative_tolerance"] * (1 + VIOLATION)
    bounded = runs[runs["output_bound"].notna()]
    within = bounded["output_error"] <= bounded["output_bound"] * (1 + VIOLATION)
    used = (bounded["output_error"] / bounded["output_bound"]).median()
    numbers = (
        f"{kept.sum()} of {len(kept)}",
        f"{(layers['relative_error_read'] / layers['relative_tolerance']).max():.4f}",
        f"{within.sum()} of {len(within)}",
        f"{used:.3f}" if len(bounded) else "",
    )
    return ClaimOutcome(bool(kept.all() and within.all()), numbers)


def promise_kept_on_others(tables: Tables, model: str, variant: tuple[str, str]) -> ClaimOutcome:
    layers = tables.of(tables.layers, model, "ddlr", variant)
    if layers.empty:
        return ClaimOutcome(None)
    used = layers["relative_error_held_out"] / layers["relative_tolerance"]
    above = (used > 1 + VIOLATION).mean()
    numbers = (f"{used.max():.2f}", f"{used.median():.2f}", f"{100 * above:.0f}")
    return ClaimOutcome(bool(used.max() <= HELD_OUT_FACTOR), numbers)


def faster(tables: Tables, model: str, variant: tuple[str, str]) -> ClaimOutcome:
    times = tables.inference
    if times.empty:
        return ClaimOutcome(None)
    refit, order = variant
    times = times[(times["model"] == model) & (times["method"] == "ddlr") & (times["threads"] == 1)]
    times = times[(times["refit"] == refit) & (times["order"] == order)]
    if times.empty:
        return ClaimOutcome(None)
    # Each where it is fastest: in which engine, and of the compressed in which form.
    fastest = times.groupby("batch")[["microseconds", "microseconds_dense"]].min()
    speedup = fastest["microseconds_dense"] / fastest["microseconds"]
    first = times.iloc[0]
    numbers = (
        "; ".join(f"{times:.2f} at batch {batch}" for batch, times in speedup.items()),
        f"{first['promised']:.2f}",
        f"{100 * first['kept_fraction']:.1f}",
        f"{first['accuracy_drop_held_out']:.2f}",
    )
    return ClaimOutcome(bool((speedup >= FASTER_BY).all()), numbers)


def smaller_than_nettrim(
    tables: Tables, model: str, variant: tuple[str, str], counted: str
) -> ClaimOutcome:
    ddlr, nettrim = (
        tables.of(tables.sweeps, model, method, variant) for method in ("ddlr", "nettrim")
    )
    if ddlr.empty or nettrim.empty:
        return ClaimOutcome(None)
    column = FRACTIONS[counted]
    comparisons = [compare_sizes(ddlr, nettrim, column, drop) for drop in EQUAL_DROPS]
    words = [word for word, _ in comparisons]
    seeds = ddlr["seed"].nunique()
    numbers = tuple(f"{cell}: {word}" for word, cell in comparisons)
    tie = "tie" in words and not {"larger", "undecided"} & set(words)
    measured = [word for word in words if word != NOT_MEASURED]
    if not measured:
        return ClaimOutcome(None)
    return ClaimOutcome(all(word == "smaller" for word in measured), (*numbers, str(seeds)), tie)
