"""The claims of the paper's abstract, the measure of each, and the text of `claims.md`."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from experiments.report.claim_judges import (
    CHOSEN_WITHIN,
    FASTER_BY,
    HELD_OUT_FACTOR,
    KEPT_AT_MOST,
    LOSS_AT_MOST,
    VIOLATION,
    Tables,
    faster,
    fewer_parameters,
    promise_kept,
    promise_kept_on_others,
    smaller_than_nettrim,
)
from experiments.report.markdown import NOT_MEASURED, markdown_table
from experiments.report.outcomes import ClaimOutcome
from experiments.report.promises import section
from experiments.report.published_curve import against_published
from experiments.report.size_ratios import EQUAL_DROPS, SIZE_MARGIN
from experiments.report.tables import FRACTIONS, NETWORK_TITLES, in_order
from experiments.report.variants import AS_PUBLISHED

HOLDS, FAILS = "holds", "does not hold"


# Refit and order, from as published to the furthest from it, and what is said where they help.
VARIANTS = {
    AS_PUBLISHED: "",
    ("layer", "parallel"): "with refit",
    ("none", "cascade"): "in cascade",
    ("layer", "cascade"): "with refit in cascade",
}

IN_PARALLEL = [variant for variant in VARIANTS if variant[1] == "parallel"]


@dataclass(frozen=True)
class Claim:
    """A claim, how it is measured, and the function that judges it on a network and variant."""

    title: str
    measure: str
    columns: tuple[str, ...]
    judge: Callable[["Tables", str, tuple[str, str]], ClaimOutcome]
    variants: tuple[tuple[str, str], ...] = tuple(VARIANTS)


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
        f"Time of the dense fully connected layers over that of the compressed ones, one CPU "
        f"thread, of DDLR's smallest timed network within a held-out drop of a point. Both are "
        f"timed in the same rounds, each in the engine where it is fastest (torch, compiled, ONNX "
        f"Runtime), the compressed one as stored or with its layers fused. It holds where it is at "
        f"least {FASTER_BY:g} at every batch size: faster has to be more than the scatter of "
        f"timings, and not at a single batch size alone. Promised is the ratio of the operation "
        f"counts. Only the variant that is timed is judged.",
        ("times as fast", "promised", "weights kept (%)", "held-out drop (points)"),
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


def report(results: dict[str, pd.DataFrame]) -> str:
    """The whole of `claims.md`, from the tables by their names."""
    tables = Tables(results)
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
        markdown_table(["claim", *titles], summary),
        *carried_over(tables.sweeps),
        *(_section(claim, tables, networks) for claim in CLAIMS),
        section(results.get("layers", pd.DataFrame())),
        against_published(results["sweeps"], results.get("finetune", pd.DataFrame())),
    ]
    return "\n\n".join(parts) + "\n"


def carried_over(sweeps: pd.DataFrame) -> list[str]:
    """A paragraph on the rows that earlier code has made, if there are any."""
    rivals = sweeps[sweeps["method"].isin(["ddlr", "nettrim"])]
    earlier = rivals[rivals["earlier"].astype(bool)] if "earlier" in rivals else rivals[:0]
    if earlier.empty:
        return []
    networks = in_order(earlier["model"], NETWORK_TITLES)
    counts = [
        f"{NETWORK_TITLES.get(model, model)} {(earlier['model'] == model).sum()} of "
        f"{(rivals['model'] == model).sum()}"
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
    numbers = markdown_table(header, rows) if rows else "Not measured."
    return f"## {claim.title}\n\n{claim.measure}\n\n{numbers}"
