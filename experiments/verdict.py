"""What holds of the paper's claims, from the tables alone: ``python -m experiments.verdict``.

Writes `results/claims.md`: each claim of the abstract, the measure chosen for it, the numbers, and
the verdict for each network. A claim is judged for DDLR as published (Net-Trim's output set,
parallel order, no refit) and for the refits and orders that both methods are offered alike; "holds
with refit" is said of a claim that fails as published. The same tables give the same file.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.report.promises import section
from experiments.report.tables import (
    FRACTIONS,
    MADE_BY,
    NETWORK_TITLES,
    at_main_samples,
    at_one_tolerance,
    in_order,
    read_tables,
    size_at_drop,
    with_all_seeds,
)
from experiments.runs.records import write_whole

log = logging.getLogger(__name__)

HOLDS, FAILS, NOT_MEASURED = "holds", "does not hold", "not measured"
# What has to be measured for the verdict to be complete.
COMPARED = ("lenet_300_100", "fc_nettrim", "lenet5", "convnet_nettrim", "vgg_small")
AS_PUBLISHED = ("none", "parallel")
# Refit and order, from as published to the furthest from it, and what is said where they help.
VARIANTS = {
    AS_PUBLISHED: "",
    ("layer", "parallel"): "with refit",
    ("none", "cascade"): "in cascade",
    ("layer", "cascade"): "with refit in cascade",
}
IN_PARALLEL = [variant for variant in VARIANTS if variant[1] == "parallel"]

CHOSEN_WITHIN = 0.5  # points of held-out accuracy that choose a tolerance
LOSS_AT_MOST = 1.0  # points of test accuracy that are a small loss
KEPT_AT_MOST = 0.5  # of the weights, where they fall a lot
VIOLATION = 1e-3  # by which a solve may end above its bound, relative to it
HELD_OUT_FACTOR = 1.25  # of the promised error, on samples that no solve has seen
FASTER_BY = 1.1  # times; a repeated timing scatters by less
EQUAL_DROPS = (0.5, 1.0)  # points of held-out accuracy at which sizes are compared
SIZE_MARGIN = 0.05  # relative; at a certified gap of 1 % a size may be off by a few per cent

# Net-Trim on 784-300-1000-100-10: pruned fraction and test accuracy (%), as its authors report.
# Aghasi et al. (2020), arXiv 1806.06457; whether fine-tuned is not certain.
PUBLISHED = ((0.845, 98.55), (0.88, 98.40), (0.935, 98.07), (0.97, 96.52))
REPRODUCED_WITHIN = 0.3  # points below the published accuracy
_AFTERWARDS = {"none": "as solved", "layer": "refit", "finetuned": "fine-tuned"}


@dataclass(frozen=True)
class Outcome:
    """A claim on one network and variant: whether it holds (None: not measured), and on what."""

    holds: bool | None
    numbers: tuple[str, ...] = ()
    tie: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim, how it is measured, and the function that judges it on a network and variant."""

    title: str
    measure: str
    columns: tuple[str, ...]
    judge: Callable[["Tables", str, tuple[str, str]], Outcome]
    variants: tuple[tuple[str, str], ...] = tuple(VARIANTS)


class Tables:
    """The tables, reduced to what verdicts are about.

    That is one tolerance for all layers, all seeds, and the main number of samples.

    A table that is missing is empty.
    """

    def __init__(self, tables: dict[str, pd.DataFrame]):
        sweeps = at_one_tolerance(tables["sweeps"])
        self.sweeps = with_all_seeds(at_main_samples(sweeps))
        layers, sizes = tables.get("layers"), tables.get("sizes")
        nothing = pd.DataFrame()
        self.layers = nothing if layers is None else layers[layers["run"].isin(self.sweeps["run"])]
        self.sizes = nothing if sizes is None else at_main_samples(at_one_tolerance(sizes))
        self.inference = tables.get("inference", nothing)

    def networks(self) -> list[str]:
        return in_order([*COMPARED, *self.sweeps["model"]], NETWORK_TITLES)

    def of(
        self, table: pd.DataFrame, model: str, method: str, variant: tuple[str, str]
    ) -> pd.DataFrame:
        """The rows of a network, method and variant; in Net-Trim's output set where there are."""
        if table.empty:
            return table
        own = table[(table["model"] == model) & (table["method"] == method)]
        refit, order = variant
        own = own[(own["refit"] == refit) & (own["order"] == order)]
        return own[own["constraint"] == own["constraint"].max()]  # nettrim comes after hinge


def fewer_parameters(tables: Tables, model: str, variant: tuple[str, str]) -> Outcome:
    if tables.of(tables.sweeps, model, "ddlr", variant).empty or tables.sizes.empty:
        return Outcome(None)
    sizes = tables.of(tables.sizes, model, "ddlr", variant)
    chosen = sizes[(sizes["counted"] == "weights") & (sizes["largest_drop"] == CHOSEN_WITHIN)]
    if chosen.empty:
        return Outcome(False, ("no tolerance is within the held-out drop", "", "", ""))
    row = chosen.iloc[0]
    numbers = (
        _spread(100 * row["fraction"], 100 * row["fraction_min"], 100 * row["fraction_max"], 1),
        _spread(row["accuracy_drop"], row["accuracy_drop_min"], row["accuracy_drop_max"], 2),
        f"{row['wanted']:g}",
        f"{row['seeds']:.0f}",
    )
    small = row["fraction"] <= KEPT_AT_MOST and row["accuracy_drop"] <= LOSS_AT_MOST
    return Outcome(bool(small), numbers)


def promise_kept(tables: Tables, model: str, variant: tuple[str, str]) -> Outcome:
    layers = tables.of(tables.layers, model, "ddlr", variant)
    runs = tables.of(tables.sweeps, model, "ddlr", variant)
    if layers.empty or runs.empty:
        return Outcome(None)
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
    return Outcome(bool(kept.all() and within.all()), numbers)


def promise_kept_on_others(tables: Tables, model: str, variant: tuple[str, str]) -> Outcome:
    layers = tables.of(tables.layers, model, "ddlr", variant)
    if layers.empty:
        return Outcome(None)
    used = layers["relative_error_held_out"] / layers["relative_tolerance"]
    above = (used > 1 + VIOLATION).mean()
    numbers = (f"{used.max():.2f}", f"{used.median():.2f}", f"{100 * above:.0f}")
    return Outcome(bool(used.max() <= HELD_OUT_FACTOR), numbers)


def faster(tables: Tables, model: str, variant: tuple[str, str]) -> Outcome:
    runs = tables.of(tables.sweeps, model, "ddlr", variant)
    if runs.empty or tables.inference.empty:
        return Outcome(None)
    times = tables.inference[
        (tables.inference["model"] == model) & (tables.inference["method"] == "ddlr")
    ]
    if times.empty:
        return Outcome(None)
    drops = runs.groupby("relative_tolerance")["accuracy_drop_held_out"].mean()
    within = drops[drops <= CHOSEN_WITHIN].index
    usable = times[times["relative_tolerance"].isin(within)]
    if usable.empty:
        return Outcome(False, ("no timed tolerance is within the held-out drop", "", ""))
    chosen = usable[usable["relative_tolerance"] == usable["relative_tolerance"].max()]
    by_batch = chosen.groupby("batch")["speedup"].median()
    numbers = (
        "; ".join(f"{speedup:.2f} at batch {batch}" for batch, speedup in by_batch.items()),
        f"{chosen['relative_tolerance'].iloc[0]:g}",
        f"{100 * chosen['kept_fraction'].iloc[0]:.1f}",
    )
    return Outcome(bool((by_batch >= FASTER_BY).all()), numbers)


def smaller_than_nettrim(
    tables: Tables, model: str, variant: tuple[str, str], counted: str
) -> Outcome:
    own, rival = (
        tables.of(tables.sweeps, model, method, variant) for method in ("ddlr", "nettrim")
    )
    if own.empty or rival.empty:
        return Outcome(None)
    column = FRACTIONS[counted]
    comparisons = [compare_sizes(own, rival, column, drop) for drop in EQUAL_DROPS]
    words = [word for word, _ in comparisons]
    seeds = own["seed"].nunique()
    numbers = tuple(f"{cell}: {word}" for word, cell in comparisons)
    tie = "tie" in words and not {"larger", "undecided"} & set(words)
    measured = [word for word in words if word != NOT_MEASURED]
    if not measured:
        return Outcome(None)
    return Outcome(all(word == "smaller" for word in measured), (*numbers, str(seeds)), tie)


def compare_sizes(
    own: pd.DataFrame, rival: pd.DataFrame, column: str, drop: float
) -> tuple[str, str]:
    """Sizes of two methods at one held-out drop, seed by seed; the word for it, and the ratios.

    "smaller" and "larger" take all seeds, which share a network and a calibration set, to agree,
    and the mean to differ by `SIZE_MARGIN`; else it is a "tie". A method of which no tolerance
    keeps the drop is known to need more than the largest size it was measured at, and no more than
    that: where this does not tell which is smaller, it is "undecided".
    """
    sizes = [_sizes_at_drop(table, column, drop) for table in (own, rival)]
    bounds = [
        _ratio(sizes[0][seed], sizes[1][seed]) for seed in sorted(set(sizes[0]) & set(sizes[1]))
    ]
    low, high = np.array([each for each in bounds if each != (0, np.inf)]).reshape(-1, 2).T
    if not len(low):
        return NOT_MEASURED, "-"
    exact = low[low == high]
    if (high < 1).all() and high.mean() <= 1 - SIZE_MARGIN:
        word = "smaller"
    elif (low > 1).all() and low.mean() >= 1 + SIZE_MARGIN:
        word = "larger"
    else:
        word = "tie" if len(exact) == len(low) else "undecided"
    cell = _spread(exact.mean(), exact.min(), exact.max(), 2) if len(exact) else "-"
    for method, missing in (("DDLR", np.isinf(high).sum()), ("Net-Trim", (low == 0).sum())):
        cell += f"; {method} outside the grid in {missing} of {len(low)} seeds" if missing else ""
    return word, cell


def _sizes_at_drop(rows: pd.DataFrame, column: str, drop: float) -> dict[int, tuple[float, bool]]:
    """By seed the size at a drop; or the largest measured, and False, where none keeps the drop."""
    found = {}
    for seed, own in rows.groupby("seed"):
        size = size_at_drop(own[column].to_numpy(), own["accuracy_drop_held_out"].to_numpy(), drop)
        kept = not np.isnan(size)
        found[seed] = (size if kept else own[column].max(), kept)
    return found


def _ratio(own: tuple[float, bool], rival: tuple[float, bool]) -> tuple[float, float]:
    """Bounds on the ratio of two such sizes, which agree where both are known."""
    ratio = own[0] / rival[0]
    return (ratio if rival[1] else 0, ratio if own[1] else np.inf)


CLAIMS = (
    Claim(
        "Parameters fall a lot for a small loss of accuracy",
        f"The tolerance that keeps the fewest weights at a mean held-out drop of at most "
        f"{CHOSEN_WITHIN:g} points. It holds where at most {100 * KEPT_AT_MOST:g} % of the weights "
        f"of the fully connected layers are kept and the test accuracy drops by at most "
        f"{LOSS_AT_MOST:g} point on average: the test set, which chose nothing, has to confirm "
        f"what the held-out samples chose. A low-rank layer's bytes fall as its weights do.",
        ("weights kept (%)", "test drop (points)", "tolerance", "seeds"),
        fewer_parameters,
    ),
    Claim(
        "The loss is controlled, on the calibration samples",
        f"Of every layer of every run, the relative error of its output against the tolerance "
        f"asked for; of every run, that of the network's output against the bound that follows "
        f"from the layers'. It holds where none is exceeded by more than {100 * VIOLATION:g} %, "
        f"the violation at which a solve ends: to control a loss is to promise it and keep the "
        f"promise. In parallel order, where promises are about the original network's activations.",
        ("layers within", "worst error / promise", "networks within", "median error / bound"),
        promise_kept,
        tuple(IN_PARALLEL),
    ),
    Claim(
        "The loss is controlled, on samples never seen",
        f"The same errors of the layers on held-out samples, against the same promises. It holds "
        f"where no layer of any run exceeds its promise by more than a factor of "
        f"{HELD_OUT_FACTOR:g}: a promise is of use if it carries over to new inputs, for which "
        f"nothing is proven.",
        ("worst error / promise", "median", "layers above (%)"),
        promise_kept_on_others,
        tuple(IN_PARALLEL),
    ),
    Claim(
        "Inference gets faster",
        f"Time of the dense fully connected layers over that of the low-rank ones, one CPU thread, "
        f"at the largest timed tolerance with a mean held-out drop of at most {CHOSEN_WITHIN:g} "
        f"points. It holds where it is at least {FASTER_BY:g} at every batch size: faster has to "
        f"be more than the scatter of timings, and not at a single batch size alone. The refit "
        f"does not change a rank, so it changes only which tolerances are within the drop.",
        ("times as fast", "tolerance", "weights kept (%)"),
        faster,
        tuple(IN_PARALLEL),
    ),
    *(
        Claim(
            f"DDLR beats Net-Trim in size and accuracy alike, {counted} counted",
            f"{counted.capitalize()} that DDLR keeps over those that Net-Trim keeps at an equal "
            f"held-out drop, {EQUAL_DROPS[0]:g} and {EQUAL_DROPS[1]:g} points, each on its own "
            f"curve of size against drop (interpolated in the logarithm of the size), seed by "
            f"seed, both with the same refit and order. It holds where DDLR is smaller at both: in "
            f"every seed, and by {100 * SIZE_MARGIN:g} % on average, since less is within what the "
            f"certified gap leaves open. Outside the grid: the smallest tolerance still drops by "
            f"more. At an equal drop the smaller size is also, along a falling curve, the higher "
            f"accuracy at an equal size.",
            (*(f"ratio at {drop:g} points" for drop in EQUAL_DROPS), "seeds"),
            lambda tables, model, variant, counted=counted: smaller_than_nettrim(
                tables, model, variant, counted
            ),
        )
        for counted in FRACTIONS
    ),
)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="verdict")
def main(cfg: DictConfig) -> None:
    results = Path(cfg.results_dir)
    found = read_tables(results)
    if "sweeps" not in found:
        raise FileNotFoundError(
            f"there is no {results / 'sweeps.csv'}; make it with {MADE_BY['sweeps']}"
        )
    text = report(found)
    write_whole(results / "claims.md", lambda scratch: scratch.write_text(text, encoding="utf-8"))
    log.info("%s", results / "claims.md")


def report(found: dict[str, pd.DataFrame]) -> str:
    """The whole of `claims.md`, from the tables by their names."""
    tables = Tables(found)
    networks = tables.networks()
    verdicts = [[verdict(claim, tables, model) for model in networks] for claim in CLAIMS]
    titles = [NETWORK_TITLES.get(model, model) for model in networks]
    summary = [[claim.title, *row] for claim, row in zip(CLAIMS, verdicts, strict=True)]
    parts = [
        "# The claims of the abstract, judged",
        "Made by `python -m experiments.verdict` from the tables in this folder; not edited by "
        "hand. *Holds*: for DDLR as published, in parallel order and without refit. *With refit*, "
        "*in cascade*: not as published, but so; *as published only*: not where both methods are "
        "given these. Ranges are over seeds. Held-out samples are "
        "training samples that no network was trained on.",
        _table(["claim", *titles], summary),
        *carried_over(tables.sweeps),
        *(_section(claim, tables, networks) for claim in CLAIMS),
        section(found.get("layers", pd.DataFrame())),
        _against_published(found["sweeps"], found.get("finetune", pd.DataFrame())),
    ]
    return "\n\n".join(parts) + "\n"


def carried_over(sweeps: pd.DataFrame) -> list[str]:
    """A paragraph on the rows that earlier code has made, if there are any."""
    own = sweeps[sweeps["method"].isin(["ddlr", "nettrim"])]
    earlier = own[own["earlier"].astype(bool)] if "earlier" in own else own[:0]
    if earlier.empty:
        return []
    networks = in_order(earlier["model"], NETWORK_TITLES)
    counts = [
        f"{NETWORK_TITLES.get(model, model)} {(earlier['model'] == model).sum()} of "
        f"{(own['model'] == model).sum()}"
        for model in networks
    ]
    return [
        "Rows of DDLR and Net-Trim that are carried over from earlier code (`earlier` in "
        f"`sweeps.csv`): {'; '.join(counts)}. Their solves end at a gap of 1 % on one side alone, "
        "with weights up to 0.1 % above the bound. What no output depends on is counted there, so "
        "that sizes of Net-Trim are upper bounds."
    ]


def verdict(claim: Claim, tables: Tables, model: str) -> str:
    """In words: whether the claim holds on a network, and in which variant."""
    outcomes = {variant: claim.judge(tables, model, variant) for variant in claim.variants}
    measured = {variant: each for variant, each in outcomes.items() if each.holds is not None}
    if not measured:
        return NOT_MEASURED
    held = [variant for variant, outcome in measured.items() if outcome.holds]
    if held == [AS_PUBLISHED] and len(measured) > 1:
        return f"{HOLDS} as published only"
    if held:
        return f"{HOLDS} {VARIANTS[held[0]]}".strip()
    ties = [variant for variant, outcome in measured.items() if outcome.tie]
    return f"{FAILS} ({f'a tie {VARIANTS[ties[0]]}'.strip()})" if ties else FAILS


def _section(claim: Claim, tables: Tables, networks: list[str]) -> str:
    rows = []
    for model in networks:
        for variant in claim.variants:
            outcome = claim.judge(tables, model, variant)
            if outcome.holds is not None:
                title = NETWORK_TITLES.get(model, model)
                words = VARIANTS[variant] or "as published"
                rows.append([title, words, *outcome.numbers, "yes" if outcome.holds else "no"])
    header = ["network", "DDLR", *claim.columns, "holds"]
    numbers = _table(header, rows) if rows else "Not measured."
    return f"## {claim.title}\n\n{claim.measure}\n\n{numbers}"


def _against_published(sweeps: pd.DataFrame, finetuned: pd.DataFrame) -> str:
    """Net-Trim's reimplementation, in its authors' protocol, against the curve they report."""
    title = "## Net-Trim's reimplementation against its published curve"
    measure = (
        "784-300-1000-100-10, Net-Trim in its authors' protocol (the bias penalised, cascade, only "
        "the first layer with a tolerance, 20 000 of their training samples), as solved, and "
        "fine-tuned with labels afterwards. Test accuracy at the published pruned fractions, "
        "interpolated in the logarithm of the kept one, seed by seed. "
        f"Reproduced: not more than {REPRODUCED_WITHIN:g} points below on average. Whether the "
        "published networks were fine-tuned is not certain."
    )
    rows = pd.concat([sweeps, finetuned])
    rows = rows[(rows["model"] == "fc_nettrim") & (rows["method"] == "nettrim_protocol")]
    rows = with_all_seeds(at_main_samples(rows))
    lines = [
        line
        for refit, own in rows.groupby("refit", sort=False)
        for line in _published_lines(own, _AFTERWARDS[refit])
    ]
    header = ["variant", "pruned (%)", "published (%)", "here (%)", "difference", "reproduced"]
    body = _table(header, lines) if lines else f"{NOT_MEASURED.capitalize()}."
    return f"{title}\n\n{measure}\n\n{body}"


def _published_lines(rows: pd.DataFrame, variant: str) -> list[list[str]]:
    lines = []
    for pruned, published in PUBLISHED:
        here = np.array([accuracy_at(own, 1 - pruned) for _, own in rows.groupby("seed")])
        cells = [variant, f"{100 * pruned:.1f}", f"{published:.2f}"]
        if np.isnan(here).any():
            lines.append([*cells, "outside the measured sizes", "", NOT_MEASURED])
            continue
        difference = here - published
        reproduced = difference.mean() >= -REPRODUCED_WITHIN
        lines.append(
            [
                *cells,
                _spread(here.mean(), here.min(), here.max(), 2),
                _spread(difference.mean(), difference.min(), difference.max(), 2),
                "yes" if reproduced else "no",
            ]
        )
    return lines


def accuracy_at(rows: pd.DataFrame, kept: float) -> float:
    """Test accuracy (%) at a kept fraction, between the measured ones; NaN outside them."""
    points = rows.sort_values("kept_fraction")
    sizes, accuracies = np.log(points["kept_fraction"]), points["accuracy"]
    return float(np.interp(np.log(kept), sizes, accuracies, left=np.nan, right=np.nan))


def _spread(mean: float, low: float, high: float, digits: int) -> str:
    text = f"{mean:.{digits}f}"
    return text if low == high else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
