"""The figures of the comparison, each a function of the tables. Needs neither torch nor a network.

A function returns None where the tables hold no rows for its figure. Lines are means over seeds,
bars the range over them.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.tables import (
    FRACTIONS,
    METHOD_TITLES,
    NETWORK_TITLES,
    SHORT_TITLES,
    at_main_samples,
    in_order,
)

# One style a method in all figures; colours of Okabe and Ito, told apart by every kind of sight.
METHOD_STYLES = {
    "ddlr": {"color": "#0072B2", "marker": "o"},
    "nettrim": {"color": "#D55E00", "marker": "s"},
    "nettrim_protocol": {"color": "#E69F00", "marker": "D"},
    "svd": {"color": "#56B4E9", "marker": "^"},
    "activation_svd": {"color": "#009E73", "marker": "v"},
    "magnitude": {"color": "#CC79A7", "marker": "P"},
    "magnitude_global": {"color": "#000000", "marker": "X"},
    "ddlr_cvxpy": {"color": "#0072B2", "marker": "x"},
    "nettrim_cvxpy": {"color": "#D55E00", "marker": "+"},
}
# The two that are compared, and offered each refit and order alike.
RIVALS = ("ddlr", "nettrim")
# Refit and order: as in the paper, then from the best that was tried downwards.
AS_PUBLISHED = ("none", "parallel")
IMPROVED = (("fixed", "cascade"), ("fixed", "parallel"), ("none", "cascade"))
VARIANT_WORDS = {
    ("none", "parallel"): "parallel, no refit",
    ("none", "cascade"): "cascade, no refit",
    ("fixed", "parallel"): "parallel, refit",
    ("fixed", "cascade"): "cascade, refit",
}
_THIN = {"linewidth": 1.0, "markersize": 4, "linestyle": "--", "markerfacecolor": "white"}
_THICK = {"linewidth": 2.0, "markersize": 6}
_BASELINE = {"linewidth": 1.1, "markersize": 4.5, "alpha": 0.9}
# Layers are told apart by shade, from the input to the output.
_LAYER_COLOURS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#CC79A7")
# Accuracies further below the dense network are of no use to anybody and would flatten the rest.
_POINTS_SHOWN = 5
_SIZE_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)
_INCHES_AN_ENTRY = 2.9  # of a legend
_TIME_TICKS = tuple(step * 10**power for power in range(7) for step in (1, 2, 3, 5, 7))
_TOLERANCE_TICKS = (0.03, 0.05, 0.1, 0.2, 0.5)


def frontier(sweeps: pd.DataFrame, counted: str) -> Figure | None:
    """Test accuracy against size, one panel a network, all methods.

    Of DDLR and Net-Trim the variant as published, thin, and the best that was tried; of the
    baselines their one. `counted` is a key of `experiments.tables.FRACTIONS`.
    """
    sweeps = at_main_samples(sweeps)
    column = FRACTIONS[counted]
    models = in_order(sweeps["model"], NETWORK_TITLES)
    figure, panels, spare = _panels(len(models))
    for axes, model in zip(panels, models, strict=True):
        rows = sweeps[sweeps["model"] == model]
        for line, style in _frontier_lines(rows):
            _draw_line(axes, line, column, style)
        _accuracy_axis(axes, rows["accuracy_dense"].mean())
        _size_axis(axes, rows, column, f"{counted} kept (% of the dense layers)")
        axes.set_title(_network(model))
    _legend(figure, panels, spare)
    return figure


def _frontier_lines(rows: pd.DataFrame) -> Iterable[tuple[pd.DataFrame, dict]]:
    for method in in_order(rows["method"], METHOD_STYLES):
        of_method = rows[rows["method"] == method]
        for constraint in sorted(of_method["constraint"].unique(), reverse=True):
            lines = of_method[of_method["constraint"] == constraint]
            style = dict(METHOD_STYLES[method])
            words = ", hinge set" if constraint == "hinge" and method in RIVALS else ""
            if method not in RIVALS:
                yield lines, {**_BASELINE, **style, "label": METHOD_TITLES[method]}
                continue
            short = METHOD_TITLES[method].partition(" (")[0]
            improved = next((each for each in IMPROVED if len(_variant(lines, each))), None)
            for variant, weight in ((AS_PUBLISHED, _THIN), (improved, _THICK)):
                if variant and len(_variant(lines, variant)):
                    label = f"{short}, {VARIANT_WORDS[variant]}{words}"
                    dotted = {"linestyle": ":"} if words else {}
                    yield _variant(lines, variant), {**style, **weight, **dotted, "label": label}


def _variant(rows: pd.DataFrame, variant: tuple[str, str]) -> pd.DataFrame:
    refit, order = variant
    return rows[(rows["refit"] == refit) & (rows["order"] == order)]


def _draw_line(axes: Axes, rows: pd.DataFrame, column: str, style: dict) -> None:
    """Accuracy against size over the tolerances."""
    points = rows.groupby("relative_tolerance")[[column, "accuracy"]].agg(["mean", "min", "max"])
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
    """The least that DDLR and Net-Trim keep within a held-out drop of accuracy, bars by network.

    As published, and with the refit and order that keep least: each method its own, network by
    network.
    """
    sizes = at_main_samples(sizes[sizes["method"].isin(RIVALS)])
    sizes = sizes[sizes["constraint"] == _main_constraint(sizes)]
    if sizes.empty:
        return None
    models = in_order(sizes["model"], NETWORK_TITLES)
    drops = sorted(sizes["largest_drop"].unique())
    figure, grid = plt.subplots(
        len(drops), 2, figsize=(12, 3.6 * len(drops)), squeeze=False, layout="constrained"
    )
    bars = [
        (method, published)
        for method in in_order(sizes["method"], RIVALS)
        for published in (True, False)
    ]
    width = 0.8 / len(bars)
    for row, drop in zip(grid, drops, strict=True):
        for axes, counted in zip(row, FRACTIONS, strict=True):
            shown = sizes[(sizes["largest_drop"] == drop) & (sizes["counted"] == counted)]
            for index, (method, published) in enumerate(bars):
                of_bar = shown[shown["method"] == method]
                of_bar = _variant(of_bar, AS_PUBLISHED) if published else _smallest(of_bar)
                places = np.arange(len(models)) + (index - (len(bars) - 1) / 2) * width
                of_bar = of_bar.set_index("model").reindex(models)
                _draw_bars(axes, of_bar, places, width, method, published)
            names = [SHORT_TITLES.get(model, model) for model in models]
            axes.set_xticks(range(len(models)), names, fontsize=9)
            axes.tick_params(axis="x", length=0)
            axes.set_ylabel(f"{counted} kept (% of the dense layers)")
            axes.set_title(f"{counted}, held-out drop of at most {drop:.1f} points")
            bare(axes)
            axes.grid(False, axis="x")
    _legend(figure, [grid[0][0]], None)
    return figure


def _smallest(sizes: pd.DataFrame) -> pd.DataFrame:
    """Of each network the row with the smallest fraction."""
    return sizes.sort_values("fraction", kind="stable").drop_duplicates("model")


def _draw_bars(
    axes: Axes,
    rows: pd.DataFrame,
    places: np.ndarray,
    width: float,
    method: str,
    published: bool,
) -> None:
    colour = METHOD_STYLES[method]["color"]
    size = 100 * rows["fraction"]
    axes.bar(
        places,
        size,
        0.92 * width,
        label=METHOD_TITLES[method].partition(" (")[0]
        + (", as published" if published else ", its best refit and order"),
        facecolor="white" if published else colour,
        edgecolor=colour,
        hatch="////" if published else None,
        yerr=[size - 100 * rows["fraction_min"], 100 * rows["fraction_max"] - size],
        error_kw={"linewidth": 1, "capsize": 2},
    )
    for place in places[size.isna()]:
        axes.annotate("n/a", (place, 0), ha="center", va="bottom", fontsize=7, color=colour)


def _main_constraint(rows: pd.DataFrame) -> str | None:
    """Net-Trim's set, as the paper reads, where there are rows of it."""
    found = sorted(rows["constraint"].unique(), reverse=True)
    return found[0] if found else None


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
    """The rivals' rows of layers, in the main number of samples and output set."""
    main = at_main_samples(sweeps)
    rows = layers[layers["run"].isin(main["run"]) & layers["method"].isin(RIVALS)]
    return rows[rows["constraint"] == _main_constraint(rows)]


def _published(rows: pd.DataFrame) -> pd.DataFrame:
    return _variant(rows, AS_PUBLISHED)


def bound(sweeps: pd.DataFrame, layers: pd.DataFrame) -> Figure | None:
    """Measured relative errors against promised ones: layers, on calibration and on held-out
    samples, and the networks' outputs; a point a layer, or a run. In parallel order, where all
    promises are about the original network's activations.
    """
    layer_rows = _layers_at_main_samples(sweeps, layers)
    layer_rows = layer_rows[layer_rows["order"] == "parallel"]
    runs = at_main_samples(sweeps[sweeps["method"].isin(RIVALS)])
    runs = runs[(runs["order"] == "parallel") & runs["output_bound"].notna()]
    if layer_rows.empty or runs.empty:
        return None
    panels = (
        (layer_rows, "relative_tolerance", "relative_error", "layers, calibration samples"),
        (layer_rows, "relative_tolerance", "relative_error_held_out", "layers, held-out samples"),
        (runs, "output_bound", "output_error", "whole networks, calibration samples"),
    )
    figure, row = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    for axes, (rows, promised, measured, title) in zip(row, panels, strict=True):
        for place, (method, refit) in enumerate((m, r) for m in RIVALS for r in ("none", "fixed")):
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
        label=f"{METHOD_TITLES[method].partition(' (')[0]}, {_refit_words(refit)}",
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

    A row a network, at the tolerance that was run with the most numbers of samples.
    """
    rows = sweeps[sweeps["method"].isin(RIVALS) & (sweeps["order"] == "parallel")]
    rows = rows[rows["constraint"] == _main_constraint(rows)]
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
            for (method, refit), line in here.groupby(["method", "refit"]):
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
    _legend(figure, [grid[0][0]], None)
    return figure


def _variant_style(method: str, variant: tuple[str, str]) -> dict:
    style = METHOD_STYLES[method]
    weight = _THIN if variant[0] == "none" else {**_THICK, "markersize": 5}
    label = f"{METHOD_TITLES[method].partition(' (')[0]}, {VARIANT_WORDS[variant]}"
    return {**style, **weight, "label": label}


def _sample_axis(axes: Axes, numbers: list[int]) -> None:
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, numbers)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("calibration samples")
    bare(axes)


def order(sweeps: pd.DataFrame) -> Figure | None:
    """Parallel order against cascade: test accuracy against weights kept, a row a refit."""
    rows = at_main_samples(sweeps[sweeps["method"].isin(RIVALS)])
    rows = rows[rows["constraint"] == _main_constraint(rows)]
    cascades = rows[rows["order"] == "cascade"]
    models = in_order(cascades["model"], NETWORK_TITLES)
    refits = in_order(cascades["refit"], ("none", "fixed"))
    if not models:
        return None
    figure, grid = _grid(len(refits), len(models))
    for row, refit in zip(grid, refits, strict=True):
        for axes, model in zip(row, models, strict=True):
            here = rows[(rows["model"] == model) & (rows["refit"] == refit)]
            for method in RIVALS:
                short = METHOD_TITLES[method].partition(" (")[0]
                for how, weight in (("parallel", _THIN), ("cascade", _THICK)):
                    line = _variant(here[here["method"] == method], (refit, how))
                    style = {**METHOD_STYLES[method], **weight, "label": f"{short}, {how}"}
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
    _legend(figure, [grid[0][0]], None)
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
    "equal_drop": (equal_drop, ("sizes",)),
    "layers": (layers, ("sweeps", "layers")),
    "bound": (bound, ("sweeps", "layers")),
    "samples": (samples, ("sweeps", "layers")),
    "order": (order, ("sweeps",)),
    "inference": (inference, ("inference",)),
    "spectrum": (spectrum, ("spectrum",)),
}
