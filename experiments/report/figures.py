"""The figures of the comparison, each a function of the tables. Needs neither torch nor a network.

A function returns None where the tables hold no rows for its figure. Lines are means over seeds,
bars the range over them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.report.tables import (
    FRACTIONS,
    METHOD_TITLES,
    NETWORK_TITLES,
    SHORT_TITLES,
    at_main_samples,
    at_one_tolerance,
    in_order,
)

# One style a method in all figures; colours of Okabe and Ito, a purple and a grey, told apart by
# every kind of sight.
METHOD_STYLES = {
    "fewest_weights": {"color": "#000000", "marker": "*"},
    "lowest_rank": {"color": "#6A1B7A", "marker": "d"},
    "ddlr": {"color": "#0072B2", "marker": "o"},
    "nettrim": {"color": "#D55E00", "marker": "s"},
    "nettrim_protocol": {"color": "#E69F00", "marker": "D"},
    "svd": {"color": "#56B4E9", "marker": "^"},
    "activation_svd": {"color": "#009E73", "marker": "v"},
    "activation_svd_selected": {"color": "#009E73", "marker": "<"},
    "magnitude": {"color": "#CC79A7", "marker": "P"},
    "magnitude_global": {"color": "#4D4D4D", "marker": "X"},
    "ddlr_cvxpy": {"color": "#0072B2", "marker": "x"},
    "nettrim_cvxpy": {"color": "#D55E00", "marker": "+"},
}
# The two that are compared, and offered each refit and order alike.
RIVALS = ("ddlr", "nettrim")
# What this project puts beside them.
OURS = ("fewest_weights", "lowest_rank")
# Refit and order: as in the paper, then from the best that was tried downwards.
AS_PUBLISHED = ("none", "parallel")
IMPROVED = (("layer", "cascade"), ("layer", "parallel"), ("none", "cascade"))
# Refits of one layer after the other, and that of all layers together.
LAYER_REFITS = ("none", "layer")
NETWORK_REFIT = "network"
VARIANT_WORDS = {
    ("none", "parallel"): "parallel, no refit",
    ("none", "cascade"): "cascade, no refit",
    ("layer", "parallel"): "parallel, refit",
    ("layer", "cascade"): "cascade, refit",
}
_THIN = {"linewidth": 1.0, "markersize": 4, "linestyle": "--", "markerfacecolor": "white"}
_THICK = {"linewidth": 2.0, "markersize": 6}
_OWN = {"linewidth": 2.6, "markersize": 6.5, "zorder": 3}
_BASELINE = {"linewidth": 1.1, "markersize": 4.5, "alpha": 0.9}
# Layers are told apart by shade, from the input to the output.
_LAYER_COLOURS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#CC79A7")
# Accuracies further below the dense network are of no use to anybody and would flatten the rest.
_POINTS_SHOWN = 5
_SIZE_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100)
_INCHES_AN_ENTRY, _INCHES_A_ROW = 2.9, 0.22  # of a legend
_TIME_TICKS = tuple(step * 10**power for power in range(7) for step in (1, 2, 3, 5, 7))
_TOLERANCE_TICKS = (0.03, 0.05, 0.1, 0.2, 0.5)


def frontier(sweeps: pd.DataFrame, counted: str) -> Figure | None:
    """Test accuracy against size, one panel a network, all methods, one tolerance for all layers.

    Of DDLR and Net-Trim the variant as published, thin, and the best that was tried; of ours the
    best; of the baselines their one. `counted` is a key of `experiments.report.tables.FRACTIONS`.
    """
    return _accuracy_by_size(_layer_by_layer(sweeps), counted, _frontier_lines)


def frontier_goals(sweeps: pd.DataFrame, counted: str) -> Figure | None:
    """Test accuracy against size, one panel a network, sizes allocated to layers for a kept share.

    Of each method its best form without network refit, and, thin, broken and hollow, with it. A
    point is a share that was asked for. `counted` is a key of `tables.FRACTIONS`.
    """
    allocated = _in_main_set(sweeps[sweeps["goal"] == "kept_fraction"])
    return _accuracy_by_size(allocated, counted, _goal_lines)


Lines = Iterable[tuple[pd.DataFrame, dict]]  # the rows of each line, and its style


def _accuracy_by_size(
    sweeps: pd.DataFrame, counted: str, lines: Callable[[pd.DataFrame], Lines]
) -> Figure | None:
    sweeps = at_main_samples(sweeps)
    column = FRACTIONS[counted]
    models = in_order(sweeps["model"], NETWORK_TITLES)
    if not models:
        return None
    figure, panels, spare = _panels(len(models))
    for axes, model in zip(panels, models, strict=True):
        rows = sweeps[sweeps["model"] == model]
        for line, style in lines(rows):
            _draw_line(axes, line, column, style)
        _accuracy_axis(axes, rows["accuracy_dense"].mean())
        _size_axis(axes, rows, column, f"{counted} kept (% of the dense layers)")
        axes.set_title(_network(model))
    _legend(figure, panels, spare)
    return figure


def _frontier_lines(rows: pd.DataFrame) -> Lines:
    for method in in_order(rows["method"], METHOD_STYLES):
        of_method = rows[rows["method"] == method]
        if method in OURS:
            best = _best_variant(of_method)
            label = f"{_short(method)}, {VARIANT_WORDS[best]}"
            yield _variant(of_method, best), _style(method, _OWN, label=label)
        elif method in RIVALS:
            for constraint in sorted(of_method["constraint"].unique(), reverse=True):
                yield from _rival_lines(method, of_method[of_method["constraint"] == constraint])
        else:
            yield of_method, _style(method, _BASELINE, label=METHOD_TITLES[method])


def _rival_lines(method: str, rows: pd.DataFrame) -> Lines:
    """As published, and at its best where that is another variant; in one output set."""
    hinge = rows["constraint"].iloc[0] == "hinge"
    words, dotted = (", hinge set", {"linestyle": ":"}) if hinge else ("", {})
    improved = _best_variant(rows, IMPROVED)
    for variant, weight in ((AS_PUBLISHED, _THIN), (improved, _THICK)):
        if variant and len(_variant(rows, variant)):
            label = f"{_short(method)}, {VARIANT_WORDS[variant]}{words}"
            yield _variant(rows, variant), _style(method, weight, **dotted, label=label)


def _goal_lines(rows: pd.DataFrame) -> Lines:
    for method in in_order(rows["method"], METHOD_STYLES):
        of_method = rows[rows["method"] == method]
        weight = _OWN if method in OURS else _THICK if method in RIVALS else _BASELINE
        together = [(NETWORK_REFIT, order) for order in ("cascade", "parallel")]
        for variants, words, drawn in (
            ((*IMPROVED, AS_PUBLISHED), "allocated", weight),
            (together, "network refit", _THIN | {"zorder": weight.get("zorder", 2)}),
        ):
            best = _best_variant(of_method, variants)
            if best:
                label = f"{_short(method)}, {words}"
                yield _variant(of_method, best), _style(method, drawn, label=label)


def _layer_by_layer(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with one tolerance for all layers, none of which knows of the layers after it."""
    runs = at_one_tolerance(runs)
    return runs[runs["refit"].isin(LAYER_REFITS)]


def _best_variant(
    rows: pd.DataFrame, variants: Iterable[tuple[str, str]] = (*IMPROVED, AS_PUBLISHED)
) -> tuple[str, str] | None:
    """The first of the variants, from the best one downwards, that there are rows of."""
    return next((each for each in variants if len(_variant(rows, each))), None)


def _of(rows: pd.DataFrame, *methods: str) -> pd.DataFrame:
    return rows[rows["method"].isin(methods)]


def _variant(rows: pd.DataFrame, variant: tuple[str, str]) -> pd.DataFrame:
    refit, order = variant
    return rows[(rows["refit"] == refit) & (rows["order"] == order)]


def _draw_line(axes: Axes, rows: pd.DataFrame, column: str, style: dict) -> None:
    """Accuracy against size over the tolerances, or the values of another goal."""
    points = rows.groupby("wanted")[[column, "accuracy"]].agg(["mean", "min", "max"])
    size, accuracy = 100 * points[column], points["accuracy"]
    axes.plot(size["mean"], accuracy["mean"], **style)
    if rows["seed"].nunique() > 1:
        bars = {"xerr": _range(size), "yerr": _range(accuracy), "fmt": "none", "alpha": 0.6}
        axes.errorbar(size["mean"], accuracy["mean"], ecolor=style["color"], linewidth=0.8, **bars)


def _range(table: pd.DataFrame) -> list[pd.Series]:
    """What `errorbar` takes: how far the range over seeds reaches below and above the mean."""
    mean, low, high = table["mean"], table["min"], table["max"]
    # Not below zero, where a mean of equal values is rounded.
    return [(mean - low).clip(lower=0), (high - mean).clip(lower=0)]


def equal_drop(sizes: pd.DataFrame) -> Figure | None:
    """The least that each method keeps within a held-out drop of accuracy, bars by network.

    DDLR and Net-Trim as published; then each method in the order, refit of layers and goal with
    which it keeps least, network by network; last ours with network refit. A panel a drop and what
    is counted.
    """
    sizes = _in_main_set(at_main_samples(sizes))
    bars = _bars(sizes)
    if not bars:
        return None
    models = in_order(pd.concat([bar.rows["model"] for bar in bars]), NETWORK_TITLES)
    panels = [
        (drop, counted) for drop in sorted(sizes["largest_drop"].unique()) for counted in FRACTIONS
    ]
    figure, grid = _grid(len(panels), 1, width=max(8.0, 2.4 * len(models)), height=2.8)
    width = 0.86 / len(bars)
    for axes, (drop, counted) in zip(grid.flat, panels, strict=True):
        for index, bar in enumerate(bars):
            shown = bar.rows[(bar.rows["largest_drop"] == drop) & (bar.rows["counted"] == counted)]
            shown = _smallest(shown).set_index("model").reindex(models)
            places = np.arange(len(models)) + (index - (len(bars) - 1) / 2) * width
            _draw_bars(axes, shown, places, width, bar)
        names = [SHORT_TITLES.get(model, model) for model in models]
        axes.set_xticks(range(len(models)), names, fontsize=10)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.5, len(models) - 0.5)
        axes.set_ylabel(f"{counted} kept\n(% of the dense layers)")
        axes.set_title(f"{counted}, held-out drop of at most {drop:.1f} points")
        bare(axes)
        axes.grid(False, axis="x")
    _legend(figure, [grid[0][0]], None)
    return figure


@dataclass(frozen=True)
class _Bar:
    """A bar of each network: the smallest of `rows`, in the colour of `method`."""

    method: str
    label: str
    rows: pd.DataFrame
    fill: str  # "hatched", "full" or "light"


def _bars(sizes: pd.DataFrame) -> list[_Bar]:
    """The bars of `equal_drop` that there are rows of, in their order."""
    published = _variant(at_one_tolerance(sizes), AS_PUBLISHED)
    alone = sizes[sizes["refit"].isin(LAYER_REFITS)]
    together = sizes[sizes["refit"] == NETWORK_REFIT]
    # Of pruning by magnitude the better one: a threshold a layer, or one for all.
    kinds = {"magnitude": ("magnitude", "magnitude_global")}
    bars = [
        _Bar(method, f"{_short(method)}, as published", _of(published, method), "hatched")
        for method in RIVALS
    ]
    for method in (*RIVALS, "svd", "activation_svd", "magnitude", *reversed(OURS)):
        name = "magnitude" if method in kinds else _short(method)
        rows = _of(alone, *kinds.get(method, (method,)))
        bars.append(_Bar(method, f"{name}, at its best", rows, "full"))
    refitted = next((method for method in OURS if len(_of(together, method))), OURS[0])
    label = f"{_short(refitted)}, network refit"
    bars.append(_Bar(refitted, label, _of(together, refitted), "light"))
    return [bar for bar in bars if len(bar.rows)]


def _smallest(sizes: pd.DataFrame) -> pd.DataFrame:
    """Of each network the row with the smallest fraction."""
    return sizes.sort_values("fraction", kind="stable").drop_duplicates("model")


def _draw_bars(axes: Axes, rows: pd.DataFrame, places: np.ndarray, width: float, bar: _Bar) -> None:
    """A bar a network, with its value above ours and "n/a" where there is none."""
    colour = METHOD_STYLES[bar.method]["color"]
    faces = {"hatched": "white", "full": colour, "light": to_rgba(colour, 0.25)}
    size, highest = 100 * rows["fraction"], 100 * rows["fraction_max"]
    axes.bar(
        places,
        size,
        0.92 * width,
        label=bar.label,
        facecolor=faces[bar.fill],
        edgecolor=colour,
        hatch="////" if bar.fill == "hatched" else None,
        yerr=[size - 100 * rows["fraction_min"], highest - size],
        error_kw={"linewidth": 1, "capsize": 2, "ecolor": "0.45"},
    )
    missing = size.isna()
    texts = [(place, 0, "n/a") for place in places[missing]]
    if bar.method in OURS:
        shown = zip(places[~missing], highest[~missing], size[~missing], strict=True)
        texts += [(place, top, _percent(value)) for place, top, value in shown]
    for place, height, text in texts:
        axes.annotate(
            text,
            (place, height),
            xytext=(0, 1.5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=colour,
        )


def _percent(value: float) -> str:
    """In two digits, which the width of a bar has room for."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _main_constraint(rows: pd.DataFrame) -> str | None:
    """Net-Trim's set, as the paper reads, where there are rows of it."""
    found = sorted(rows["constraint"].unique(), reverse=True)
    return found[0] if found else None


def _in_main_set(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows without those of the rivals in another output set than the main one."""
    rival = rows["method"].isin(RIVALS)
    return rows[~rival | (rows["constraint"] == _main_constraint(rows[rival]))]


def layers(sweeps: pd.DataFrame, layers: pd.DataFrame) -> Figure | None:
    """Rank of DDLR's layers and nonzeros of Net-Trim's against tolerance, as published."""
    rows = _published(_layers_at_main_samples(sweeps, layers))
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
    figure, grid = _grid(len(methods), len(models), sharey="row")
    for row, method in zip(grid, methods, strict=True):
        column, label = quantities[method]
        for axes, model in zip(row, models, strict=True):
            here = rows[(rows["model"] == model) & (rows["method"] == method)]
            names = list(dict.fromkeys(here["layer"]))
            for name, colour in zip(names, _LAYER_COLOURS, strict=False):
                points = _over_seeds(here[here["layer"] == name], "relative_tolerance", column)
                marker = METHOD_STYLES[method]["marker"]
                axes.errorbar(
                    *(points.index, points["mean"]),
                    yerr=_range(points),
                    **{"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4},
                    label=_layer_label(here, name),
                )
            axes.legend(frameon=False, fontsize=8)
            _tolerance_axis(axes)
            axes.set_ylim(0, None)
        row[0].set_ylabel(label)
    _titles(grid, models)
    return figure


def _layer_label(rows: pd.DataFrame, name: str) -> str:
    shape = rows[rows["layer"] == name].iloc[0]
    return f"{name}, {shape['in_features']}-{shape['out_features']}"


def _layers_at_main_samples(sweeps: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """The rivals' rows of layers, in the main number of samples and output set.

    Of runs with one tolerance for all layers, none of which knows of the layers after it.
    """
    main = at_main_samples(_layer_by_layer(sweeps))
    return _in_main_set(_of(layers[layers["run"].isin(main["run"])], *RIVALS))


def _published(rows: pd.DataFrame) -> pd.DataFrame:
    return _variant(rows, AS_PUBLISHED)


def bound(sweeps: pd.DataFrame, layers: pd.DataFrame) -> Figure | None:
    """Measured relative errors against promised ones: layers, on calibration and on held-out
    samples, and the networks' outputs; a point a layer, or a run. In parallel order, where all
    promises are about the original network's activations.
    """
    layer_rows = _layers_at_main_samples(sweeps, layers)
    layer_rows = layer_rows[layer_rows["order"] == "parallel"]
    runs = at_main_samples(_of(_layer_by_layer(sweeps), *RIVALS))
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
    _legend(figure, [row[0]], None)
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
        label=f"{_short(method)}, {_refit_words(refit)}",
    )


def _refit_words(refit: str) -> str:
    return "no refit" if refit == "none" else "refit"


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
        _plain_ticks(axis, [step * 10.0**power for power in range(-6, 6) for step in steps])


def samples(sweeps: pd.DataFrame, layers: pd.DataFrame) -> Figure | None:
    """Size, accuracy and held-out error of the layers against the number of calibration samples.

    DDLR, Net-Trim and ours in parallel order. A row a network, at the tolerance that was run with
    the most numbers of samples.
    """
    rows = _in_main_set(_of(_layer_by_layer(sweeps), *RIVALS, *OURS))
    rows = rows[rows["order"] == "parallel"]
    worst = layers.assign(
        promise_kept=layers["relative_error_held_out"] / layers["relative_tolerance"]
    )
    rows = rows.join(worst.groupby("run")["promise_kept"].max(), on="run")
    rows = rows.assign(kept=100 * rows["kept_fraction"])
    numbers = rows.groupby(["model", "relative_tolerance"])["calibration_samples"].nunique()
    numbers = numbers[numbers > 1]
    if numbers.empty:
        return None
    models = in_order(numbers.index.get_level_values("model"), NETWORK_TITLES)
    quantities = {
        "kept": "weights kept (% of the dense layers)",
        "accuracy": "test accuracy (%)",
        "promise_kept": "held-out error of the worst layer\n(1 is the promised error)",
    }
    figure, grid = _grid(len(models), len(quantities), width=4.4, height=3.6)
    for row, model in zip(grid, models, strict=True):
        tolerance = numbers[model].idxmax()
        here = rows[(rows["model"] == model) & (rows["relative_tolerance"] == tolerance)]
        for axes, (column, label) in zip(row, quantities.items(), strict=True):
            for method, refit in product(in_order(here["method"], METHOD_STYLES), LAYER_REFITS):
                line = _variant(_of(here, method), (refit, "parallel"))
                points = _over_seeds(line, "calibration_samples", column)
                if len(points) > 1:
                    style = _variant_style(method, (refit, "parallel"))
                    axes.errorbar(points.index, points["mean"], yerr=_range(points), **style)
            _sample_axis(axes, sorted(here["calibration_samples"].unique()))
            axes.set_ylabel(label)
        dense = here["accuracy_dense"].mean()
        _dense_line(row[1], dense)
        low, high = row[1].get_ylim()
        row[1].set_ylim(low, max(high, dense) + 0.1 * (high - low))
        row[2].axhline(1, color="black", linestyle=":", linewidth=1)
        row[1].set_title(f"{_network(model)}, tolerance {tolerance:g}")
    _legend(figure, list(grid.flat), None)
    return figure


def _variant_style(method: str, variant: tuple[str, str]) -> dict:
    weight = _THIN if variant[0] == "none" else {**_THICK, "markersize": 5}
    return _style(method, weight, label=f"{_short(method)}, {VARIANT_WORDS[variant]}")


def _sample_axis(axes: Axes, numbers: list[int]) -> None:
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, numbers)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("calibration samples")
    bare(axes)


def order(sweeps: pd.DataFrame) -> Figure | None:
    """Parallel order against cascade: test accuracy against weights kept, a row a refit.

    DDLR, Net-Trim and ours, at one tolerance for all layers.
    """
    rows = _in_main_set(at_main_samples(_of(_layer_by_layer(sweeps), *RIVALS, *OURS)))
    cascades = rows[rows["order"] == "cascade"]
    models = in_order(cascades["model"], NETWORK_TITLES)
    refits = in_order(cascades["refit"], LAYER_REFITS)
    if not models:
        return None
    figure, grid = _grid(len(refits), len(models))
    for row, refit in zip(grid, refits, strict=True):
        for axes, model in zip(row, models, strict=True):
            here = rows[(rows["model"] == model) & (rows["refit"] == refit)]
            for method in in_order(here["method"], METHOD_STYLES):
                for how, weight in (("parallel", _THIN), ("cascade", _THICK)):
                    line = _variant(_of(here, method), (refit, how))
                    style = _style(method, weight, label=f"{_short(method)}, {how}")
                    if len(line):
                        _draw_line(axes, line, "kept_fraction", style)
            if here.empty:
                axes.set_axis_off()
                continue
            _accuracy_axis(axes, here["accuracy_dense"].mean())
            _size_axis(axes, here, "kept_fraction", "weights kept (%)")
            axes.set_ylabel(None)
        row[0].set_ylabel(f"test accuracy (%), {_refit_words(refit)}")
    _titles(grid, models)
    _legend(figure, list(grid.flat), None)
    return figure


def inference(times: pd.DataFrame) -> Figure | None:
    """Time of the fully connected layers against weights kept, a row a batch size, one thread."""
    models = in_order(times["model"], NETWORK_TITLES)
    batches = sorted(times["batch"].unique())
    if not models:
        return None
    figure, grid = _grid(len(batches), len(models), width=4.0)
    for row, batch in zip(grid, batches, strict=True):
        for axes, model in zip(row, models, strict=True):
            here = times[(times["model"] == model) & (times["batch"] == batch)]
            for method in in_order(here["method"], METHOD_STYLES):
                line = here[here["method"] == method].sort_values("kept_fraction")
                style = {**METHOD_STYLES[method], **_THICK, "label": METHOD_TITLES[method]}
                axes.plot(100 * line["kept_fraction"], line["microseconds"], **style)
            dense = here["microseconds_dense"].median()
            axes.axhline(dense, color="black", linestyle=":", linewidth=1.2, label="dense")
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis, _TIME_TICKS)
            _size_axis(axes, here, "kept_fraction", "weights kept (% of the dense layers)")
        row[0].set_ylabel(f"microseconds a batch of {batch}")
    _titles(grid, models)
    _legend(figure, [grid[0][0]], None)
    return figure


def spectrum(values: pd.DataFrame) -> Figure | None:
    """Singular values of one layer, as trained and as each method leaves it, a panel a metric."""
    metrics = in_order(values["metric"], ("plain", "input"))
    titles = {
        "plain": "singular values of W",
        "input": "of W in the metric of the centred inputs",
    }
    if not metrics:
        return None
    figure, (row,) = _grid(1, len(metrics), width=5.6, height=4.2)
    for axes, metric in zip(row, metrics, strict=True):
        here = values[values["metric"] == metric]
        for (method, refit), line in here.groupby(["method", "refit"], sort=False):
            axes.plot(line["index"], line["value"], **_spectrum_style(method, refit, len(line)))
        axes.set_yscale("log")
        axes.set_ylim(1e-3 * here["value"].max(), 1.6 * here["value"].max())
        axes.set_xlabel("index of the singular value")
        axes.set_title(titles.get(metric, metric))
        bare(axes)
    row[0].set_ylabel("singular value")
    about = values[values["relative_tolerance"].notna()].iloc[0]
    figure.suptitle(
        f"{about['layer']} of {_network(about['model'])}, tolerance {about['relative_tolerance']:g}"
    )
    _legend(figure, [row[0]], None)
    return figure


def _spectrum_style(method: str, refit: str, rank: int) -> dict:
    if method == "original":
        return {"color": "0.5", "linewidth": 2.5, "label": f"as trained (rank {rank})"}
    words = f", {_refit_words(refit)}" if method in RIVALS else ""
    return {
        "color": METHOD_STYLES[method]["color"],
        "linestyle": "--" if method in RIVALS and refit == "none" else "-",
        "linewidth": 1.6,
        "label": f"{METHOD_TITLES[method]}{words} (rank {rank})",
    }


# What the figures share.


def _short(method: str) -> str:
    return METHOD_TITLES[method].partition(" (")[0]


def _style(method: str, weight: dict, **more) -> dict:
    style = {**METHOD_STYLES[method], **weight, **more}
    if style["marker"] == "*":
        style["markersize"] *= 1.7  # between its tips it is empty, and would look smaller
    return style


def _network(model: str, short: bool = False) -> str:
    title = NETWORK_TITLES.get(model, model)
    return title.partition(", FC")[0].replace(" on ", "\non ") if short else title


def _panels(number: int) -> tuple[Figure, list[Axes], Axes | None]:
    """So many panels in rows of three at most; the first free place, for a legend."""
    columns = min(3, number)
    rows = -(-number // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.0 * columns, 4.1 * rows), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for axes in panels[number:]:
        axes.set_axis_off()
    return figure, panels[:number], panels[number] if number < len(panels) else None


def _grid(
    rows: int, columns: int, *, width: float = 3.6, height: float = 3.3, sharey: str | bool = False
) -> tuple[Figure, np.ndarray]:
    size = (width * columns + 0.4, height * rows + 0.6)
    return plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharey=sharey, layout="constrained"
    )


def _titles(grid: np.ndarray, models: list[str]) -> None:
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(_network(model, short=True), fontsize=10)


def _legend(figure: Figure, panels: list[Axes], spare: Axes | None) -> None:
    """One legend for all panels, in the free place or below them."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    entries = (list(handles.values()), list(handles))
    if spare is not None:
        spare.legend(*entries, loc="center", frameon=False)
    else:
        columns = max(1, min(len(handles), int(figure.get_figwidth() / _INCHES_AN_ENTRY)))
        rows = -(-len(handles) // columns)
        # Two rows take little from the panels; more would leave a small figure without any.
        figure.set_figheight(figure.get_figheight() + _INCHES_A_ROW * max(0, rows - 2))
        figure.legend(*entries, loc="outside lower center", frameon=False, ncols=columns)


def _over_seeds(rows: pd.DataFrame, by: str, column: str) -> pd.DataFrame:
    return rows.groupby(by)[column].agg(["mean", "min", "max"])


def _accuracy_axis(axes: Axes, dense: float) -> None:
    _dense_line(axes, dense)
    axes.set_ylim(dense - _POINTS_SHOWN, dense + 0.1 * _POINTS_SHOWN)
    axes.set_ylabel("test accuracy (%)")


def _dense_line(axes: Axes, dense: float) -> None:
    axes.axhline(dense, color="black", linestyle=":", linewidth=1.2)
    axes.annotate(
        f"dense, {dense:.2f} %",
        (0.02, dense),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
    )


def _size_axis(axes: Axes, rows: pd.DataFrame, column: str, label: str) -> None:
    """A logarithmic axis over the sizes of the rows whose accuracy, if they have one, is shown."""
    if "accuracy" in rows:
        rows = rows[rows["accuracy"] > rows["accuracy_dense"].mean() - _POINTS_SHOWN]
    if len(rows):
        axes.set_xlim(100 * rows[column].min() / 1.25, 100 * rows[column].max() * 1.25)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, _SIZE_TICKS)
    axes.set_xlabel(label)
    bare(axes)


def _tolerance_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, _TOLERANCE_TICKS)
    axes.set_xlabel("relative tolerance")
    bare(axes)


def _plain_ticks(axis: Axis, ticks: Iterable[float]) -> None:
    """Label a logarithmic axis at these values, without exponents."""
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def bare(axes: Axes) -> None:
    """Light grid behind the lines, no frame on the right and above."""
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# Name of a file to its function and the tables that this takes, in the order of its arguments.
FIGURES: dict[str, tuple[Callable[..., Figure | None], tuple[str, ...]]] = {
    "frontier_weights": (lambda sweeps: frontier(sweeps, "weights"), ("sweeps",)),
    "frontier_bytes": (lambda sweeps: frontier(sweeps, "bytes"), ("sweeps",)),
    "best_weights": (lambda sweeps: frontier_goals(sweeps, "weights"), ("sweeps",)),
    "best_bytes": (lambda sweeps: frontier_goals(sweeps, "bytes"), ("sweeps",)),
    "equal_drop": (equal_drop, ("sizes",)),
    "layers": (layers, ("sweeps", "layers")),
    "bound": (bound, ("sweeps", "layers")),
    "samples": (samples, ("sweeps", "layers")),
    "order": (order, ("sweeps",)),
    "inference": (inference, ("inference",)),
    "spectrum": (spectrum, ("spectrum",)),
}
