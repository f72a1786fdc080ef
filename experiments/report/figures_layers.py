"""Layers one by one: what is left of each, and errors as promised and as measured."""

from itertools import product

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.style import (
    METHOD_STYLES,
    bare,
    legend,
    over_seeds,
    panel_grid,
    plain_ticks,
    seed_range,
    short_title,
    title_columns,
)
from experiments.report.tables import NETWORK_TITLES, at_commonest_samples_and_ridge, in_order
from experiments.report.variants import (
    AS_PUBLISHED,
    LAYER_REFITS,
    RIVALS,
    in_main_set,
    layer_by_layer,
    of_methods,
    of_variant,
    refit_words,
)

# Layers are told apart by shade, from the input to the output.
_LAYER_COLOURS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#CC79A7")
_TOLERANCE_TICKS = (0.03, 0.05, 0.1, 0.2, 0.5)


def layers(sweeps: pd.DataFrame, layers: pd.DataFrame) -> Figure | None:
    """Rank of DDLR's layers and nonzeros of Net-Trim's against tolerance, as published."""
    rows = of_variant(_rival_layers(sweeps, layers), AS_PUBLISHED)
    if rows.empty:
        return None
    full = rows[["in_features", "out_features"]].min(axis=1)
    rows = rows.assign(
        rank_share=100 * rows["rank"] / full,
        nonzero_share=100 * rows["nonzeros"] / rows["parameters_dense"],
    )
    quantities = {
        "ddlr": ("rank_share", "DDLR: rank (% of the full rank)"),
        "nettrim": ("nonzero_share", "Net-Trim: nonzeros (% of the weights)"),
    }
    methods = [method for method in quantities if method in set(rows["method"])]
    models = in_order(rows["model"], NETWORK_TITLES)
    figure, grid = panel_grid(len(methods), len(models), sharey="row")
    for row, method in zip(grid, methods, strict=True):
        column, label = quantities[method]
        for axes, model in zip(row, models, strict=True):
            here = rows[(rows["model"] == model) & (rows["method"] == method)]
            names = list(dict.fromkeys(here["layer"]))
            for name, colour in zip(names, _LAYER_COLOURS, strict=False):
                points = over_seeds(here[here["layer"] == name], "relative_tolerance", column)
                marker = METHOD_STYLES[method]["marker"]
                axes.errorbar(
                    points.index,
                    points["mean"],
                    yerr=seed_range(points),
                    **{"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4},
                    label=_layer_label(here, name),
                )
            axes.legend(frameon=False, fontsize=8)
            _tolerance_axis(axes)
            axes.set_ylim(0, None)
        row[0].set_ylabel(label)
    title_columns(grid, models)
    return figure


def _layer_label(rows: pd.DataFrame, name: str) -> str:
    shape = rows[rows["layer"] == name].iloc[0]
    return f"{name}, {shape['in_features']}-{shape['out_features']}"


def _rival_layers(sweeps: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """The rivals' rows of layers, at the commonest samples and ridge and in the main output set.

    Their runs have one tolerance for all layers, none of which knows of the layers after it.
    """
    runs = at_commonest_samples_and_ridge(layer_by_layer(sweeps))
    return in_main_set(of_methods(layers[layers["run"].isin(runs["run"])], *RIVALS))


def bound(sweeps: pd.DataFrame, layers: pd.DataFrame) -> Figure | None:
    """Measured relative errors against promised ones, one point per layer, or per run.

    Panels are layers on calibration samples, layers on held-out samples, and the networks' outputs.
    All is in parallel order, where promises are about the original network's activations.
    """
    layer_rows = _rival_layers(sweeps, layers)
    layer_rows = layer_rows[layer_rows["order"] == "parallel"]
    runs = at_commonest_samples_and_ridge(of_methods(layer_by_layer(sweeps), *RIVALS))
    runs = runs[(runs["order"] == "parallel") & runs["output_bound"].notna()]
    if layer_rows.empty or runs.empty:
        return None
    panels = (
        (layer_rows, "relative_tolerance", "relative_error_read", "layers, calibration samples"),
        (layer_rows, "relative_tolerance", "relative_error_held_out", "layers, held-out samples"),
        (runs, "output_bound", "output_error", "whole networks, calibration samples"),
    )
    figure, row = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    for axes, (rows, promised, measured, title) in zip(row, panels, strict=True):
        for place, (method, refit) in enumerate(product(RIVALS, LAYER_REFITS)):
            shown = rows[(rows["method"] == method) & (rows["refit"] == refit)]
            # Where many promise the same they are set apart, along the diagonal.
            apart = 1.05 ** (place - 1.5) if promised == "relative_tolerance" else 1.0
            if len(shown):
                points = (shown[promised] * apart, shown[measured] * apart)
                _draw_points(axes, *points, method, refit)
        _diagonal(axes, rows[promised], rows[measured])
        axes.set_title(title)
        axes.set_xlabel("promised relative error")
        bare(axes)
    row[0].set_ylabel("measured relative error")
    legend(figure, [row[0]])
    return figure


def _draw_points(axes: Axes, x: pd.Series, y: pd.Series, method: str, refit: str) -> None:
    style = METHOD_STYLES[method]
    axes.scatter(
        x,
        y,
        s=14,
        marker=style["marker"],
        facecolors="none" if refit == "none" else style["color"],
        edgecolors=style["color"],
        linewidths=0.7,
        alpha=0.7,
        label=f"{short_title(method)}, {refit_words(refit)}",
    )


def _diagonal(axes: Axes, promised: pd.Series, measured: pd.Series) -> None:
    ends = [0.7 * promised.min(), 1.4 * promised.max()]
    axes.plot(ends, ends, color="black", linewidth=1, linestyle=":")
    axes.annotate("as promised", (ends[1], ends[1]), ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*ends)
    # A layer that stayed as it is has no error, and would stretch the axis without end.
    least = max(measured[measured > 0].min(), 1e-3 * promised.min())
    axes.set_ylim(0.6 * least, 1.4 * max(ends[1], measured.max()))
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        steps = (1,) if high > 100 * low else (1, 2, 5)
        plain_ticks(axis, [step * 10.0**power for power in range(-6, 6) for step in steps])


def _tolerance_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, _TOLERANCE_TICKS)
    axes.set_xlabel("relative tolerance")
    bare(axes)
