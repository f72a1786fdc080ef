"""Test accuracy against size, for all methods: the frontiers."""

from collections.abc import Callable, Iterable

import pandas as pd
from matplotlib.figure import Figure

from experiments.report.style import (
    BOLD,
    FAINT,
    METHOD_STYLES,
    THICK,
    THIN,
    accuracy_axis,
    draw_line,
    legend,
    method_style,
    network_title,
    panels_and_spare,
    short_title,
    size_axis,
)
from experiments.report.tables import (
    FRACTIONS,
    METHOD_TITLES,
    NETWORK_TITLES,
    at_commonest_samples_and_ridge,
    in_order,
    with_all_seeds,
)
from experiments.report.variants import (
    A_SIZE,
    ALLOCATION_WORDS,
    AS_PUBLISHED,
    IMPROVED,
    NETWORK_REFIT,
    OURS,
    RIVALS,
    VARIANT_WORDS,
    best_variant,
    in_main_set,
    layer_by_layer,
    of_variant,
)


def frontier(sweeps: pd.DataFrame, counted: str) -> Figure | None:
    """Test accuracy against size, one panel per network, one tolerance for all layers.

    DDLR and Net-Trim have two lines, the variant as published, thin, and the best that was tried;
    ours have their best, and the baselines their only one. `counted` is a key of
    `experiments.report.tables.FRACTIONS`.
    """
    return _accuracy_by_size(layer_by_layer(sweeps), counted, _frontier_lines)


def frontier_goals(sweeps: pd.DataFrame, counted: str) -> Figure | None:
    """Test accuracy against size, one panel per network, sizes allocated to layers.

    Each method has its best form without network refit, and, thin, broken and hollow, with it. A
    point is a kept fraction that was asked for. What was not run with all seeds of its network is
    not drawn. `counted` is a key of `tables.FRACTIONS`.
    """
    allocated = with_all_seeds(in_main_set(sweeps[sweeps["goal"].isin(ALLOCATION_WORDS)]))
    return _accuracy_by_size(allocated, counted, _goal_lines)


Lines = Iterable[tuple[pd.DataFrame, dict]]  # the rows of each line, and its style


def _accuracy_by_size(
    sweeps: pd.DataFrame, counted: str, lines: Callable[[pd.DataFrame], Lines]
) -> Figure | None:
    sweeps = at_commonest_samples_and_ridge(sweeps)
    column = FRACTIONS[counted]
    models = in_order(sweeps["model"], NETWORK_TITLES)
    if not models:
        return None
    figure, panels, spare = panels_and_spare(len(models))
    for axes, model in zip(panels, models, strict=True):
        rows = sweeps[sweeps["model"] == model]
        for line, style in lines(rows):
            draw_line(axes, line, column, style)
        accuracy_axis(axes, rows["accuracy_dense"].mean())
        size_axis(axes, rows, column, f"{counted} kept (% of the dense layers)")
        axes.set_title(network_title(model))
    legend(figure, panels, spare)
    return figure


def _frontier_lines(rows: pd.DataFrame) -> Lines:
    for method in in_order(rows["method"], METHOD_STYLES):
        of_method = rows[rows["method"] == method]
        if method in OURS:
            best = best_variant(of_method)
            label = f"{short_title(method)}, {VARIANT_WORDS[best]}"
            yield of_variant(of_method, best), method_style(method, BOLD, label=label)
        elif method in RIVALS:
            for constraint in sorted(of_method["constraint"].unique(), reverse=True):
                yield from _rival_lines(method, of_method[of_method["constraint"] == constraint])
        else:
            yield of_method, method_style(method, FAINT, label=METHOD_TITLES[method])


def _rival_lines(method: str, rows: pd.DataFrame) -> Lines:
    """The lines of a rival in one output set: as published, and its best if that is another."""
    hinge = rows["constraint"].iloc[0] == "hinge"
    words, dotted = (", hinge set", {"linestyle": ":"}) if hinge else ("", {})
    improved = best_variant(rows, IMPROVED)
    for variant, weight in ((AS_PUBLISHED, THIN), (improved, THICK)):
        if variant and len(of_variant(rows, variant)):
            label = f"{short_title(method)}, {VARIANT_WORDS[variant]}{words}"
            yield of_variant(rows, variant), method_style(method, weight, **dotted, label=label)


def _of_last_allocation(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows allocated by roots where a method has such, else as they are."""
    by_roots = rows[rows["goal"] == f"{A_SIZE}_by_roots"]
    return by_roots if len(by_roots) else rows[rows["goal"] == A_SIZE]


def _goal_lines(rows: pd.DataFrame) -> Lines:
    for method in in_order(rows["method"], METHOD_STYLES):
        of_method = rows[rows["method"] == method]
        weight = BOLD if method in OURS else THICK if method in RIVALS else FAINT
        thin = THIN | {"zorder": weight.get("zorder", 2)}
        together = [(NETWORK_REFIT, order) for order in ("cascade", "parallel")]
        on_more = of_method["network_refit"] != ""
        for rows_of, variants, words, drawn in (
            (of_method[~on_more], (*IMPROVED, AS_PUBLISHED), "allocated", weight),
            (of_method[~on_more], together, "network refit", thin),
            (of_method[on_more], together, "refit on more samples", thin | {"linestyle": ":"}),
        ):
            best = best_variant(rows_of, variants)
            if best:
                label = f"{short_title(method)}, {words}"
                yield (
                    _of_last_allocation(of_variant(rows_of, best)),
                    method_style(method, drawn, label=label),
                )
