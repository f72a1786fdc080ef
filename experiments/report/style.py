"""The one style of all figures: colours and markers per method, axes, panels and legends."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.report.tables import METHOD_TITLES, NETWORK_TITLES
from experiments.runs.records import write_whole

# One style per method in all figures; colours of Okabe and Ito, a purple, a brown and a grey, told
# apart by every kind of sight. The cone solvers' have those of what they solve.
METHOD_STYLES = {
    "fewest_weights": {"color": "#000000", "marker": "*"},
    "fewest_nonzeros": {"color": "#B22222", "marker": "p"},
    "smallest": {"color": "#1F3A93", "marker": "X"},
    "smallest_bytes": {"color": "#4169E1", "marker": "D"},
    "smallest_latency": {"color": "#87A5E8", "marker": "<"},
    "lowest_rank": {"color": "#6A1B7A", "marker": "d"},
    "ddlr": {"color": "#0072B2", "marker": "o"},
    "nettrim": {"color": "#D55E00", "marker": "s"},
    "nettrim_protocol": {"color": "#E69F00", "marker": "D"},
    "svd": {"color": "#56B4E9", "marker": "^"},
    "activation_svd": {"color": "#009E73", "marker": "v"},
    "activation_svd_selected": {"color": "#8B5A2B", "marker": "<"},
    "alps": {"color": "#F0A0A0", "marker": "h"},
    "sparsegpt": {"color": "#7A6FBE", "marker": ">"},
    "osscar": {"color": "#5F9EA0", "marker": "H"},
    "double_sparse": {"color": "#808000", "marker": "8"},
    "sparse_low_rank": {"color": "#2E8B22", "marker": "D"},
    "low_rank_plus_sparse": {"color": "#A0522D", "marker": "2"},
    "magnitude": {"color": "#CC79A7", "marker": "P"},
    "magnitude_global": {"color": "#4D4D4D", "marker": "X"},
    "ddlr_cvxpy": {"color": "#0072B2", "marker": "x"},
    "nettrim_cvxpy": {"color": "#D55E00", "marker": "+"},
}

THIN = {"linewidth": 1.0, "markersize": 4, "linestyle": "--", "markerfacecolor": "white"}
THICK = {"linewidth": 2.0, "markersize": 6}
BOLD = {"linewidth": 2.6, "markersize": 6.5, "zorder": 3}
FAINT = {"linewidth": 1.1, "markersize": 4.5, "alpha": 0.9}

# Accuracies further below the dense network are of no use to anybody and would flatten the rest.
_POINTS_SHOWN = 5
_SIZE_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100)
_INCHES_PER_ENTRY, _INCHES_PER_ROW = 2.9, 0.22  # of a legend
_BELOW = {"loc": "outside lower center", "frameon": False}
_ENTRIES_IN_PANEL = 16  # of a legend that takes the place of a panel


def short_title(method: str) -> str:
    return METHOD_TITLES[method].partition(" (")[0]


def method_style(method: str, weight: dict, **more) -> dict:
    style = {**METHOD_STYLES[method], **weight, **more}
    if style["marker"] == "*":
        style["markersize"] *= 1.7  # between its tips it is empty, and would look smaller
    return style


def network_title(model: str, short: bool = False) -> str:
    title = NETWORK_TITLES.get(model, model)
    return title.partition(", FC")[0].replace(" on ", "\non ") if short else title


def panels_and_spare(number: int) -> tuple[Figure, list[Axes], Axes | None]:
    """Panels in rows of three at most, and the first free place beside them, for a legend."""
    columns = min(3, number)
    rows = -(-number // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.0 * columns, 4.1 * rows), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for axes in panels[number:]:
        axes.set_axis_off()
    return figure, panels[:number], panels[number] if number < len(panels) else None


def panel_grid(
    rows: int, columns: int, *, width: float = 3.6, height: float = 3.3, sharey: str | bool = False
) -> tuple[Figure, np.ndarray]:
    size = (width * columns + 0.4, height * rows + 0.6)
    return plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharey=sharey, layout="constrained"
    )


def title_columns(grid: np.ndarray, models: list[str]) -> None:
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(network_title(model, short=True), fontsize=10)


def legend(figure: Figure, panels: list[Axes], spare: Axes | None = None) -> None:
    """One legend for all panels, in the free place if it fits there, or below them."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    entries = (list(handles.values()), list(handles))
    if spare is not None and len(handles) <= _ENTRIES_IN_PANEL:
        spare.legend(*entries, loc="center", frameon=False)
    else:
        columns = max(1, min(len(handles), int(figure.get_figwidth() / _INCHES_PER_ENTRY)))
        while columns > 1 and _legend_width(figure, entries, columns) > figure.get_figwidth():
            columns -= 1
        rows = -(-len(handles) // columns)
        # Two rows take little from the panels; more would leave a small figure without any.
        figure.set_figheight(figure.get_figheight() + _INCHES_PER_ROW * max(0, rows - 2))
        figure.legend(*entries, **_BELOW, ncols=columns)


def _legend_width(figure: Figure, entries: tuple[list, list[str]], columns: int) -> float:
    """In inches, in so many columns."""
    tried = figure.legend(*entries, **_BELOW, ncols=columns)
    width = tried.get_window_extent().width / figure.dpi
    tried.remove()
    return width


def draw_line(axes: Axes, rows: pd.DataFrame, column: str, style: dict) -> None:
    """Accuracy against size over the tolerances, or the values of another goal.

    A network without weights has no place on the logarithmic axis, and is left out.
    """
    rows = rows[rows[column] > 0]
    points = rows.groupby("wanted")[[column, "accuracy"]].agg(["mean", "min", "max"])
    size, accuracy = 100 * points[column], points["accuracy"]
    axes.plot(size["mean"], accuracy["mean"], **style)
    if rows["seed"].nunique() > 1:
        bars = {"xerr": seed_range(size), "yerr": seed_range(accuracy), "fmt": "none", "alpha": 0.6}
        axes.errorbar(size["mean"], accuracy["mean"], ecolor=style["color"], linewidth=0.8, **bars)


def over_seeds(rows: pd.DataFrame, by: str, column: str) -> pd.DataFrame:
    return rows.groupby(by)[column].agg(["mean", "min", "max"])


def seed_range(table: pd.DataFrame) -> list[pd.Series]:
    """What `errorbar` takes: how far the range over seeds reaches below and above the mean."""
    mean, low, high = table["mean"], table["min"], table["max"]
    # Not below zero, where a mean of equal values is rounded.
    return [(mean - low).clip(lower=0), (high - mean).clip(lower=0)]


def accuracy_axis(axes: Axes, dense: float) -> None:
    dense_line(axes, dense)
    axes.set_ylim(dense - _POINTS_SHOWN, dense + 0.1 * _POINTS_SHOWN)
    axes.set_ylabel("test accuracy (%)")


def dense_line(axes: Axes, dense: float) -> None:
    axes.axhline(dense, color="black", linestyle=":", linewidth=1.2)
    axes.annotate(
        f"dense, {dense:.2f} %",
        (0.02, dense),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
    )


def size_axis(axes: Axes, rows: pd.DataFrame, column: str, label: str) -> None:
    """A logarithmic axis over the sizes of the rows whose accuracy, if they have one, is shown."""
    if "accuracy" in rows:
        rows = rows[rows["accuracy"] > rows["accuracy_dense"].mean() - _POINTS_SHOWN]
    if len(rows):
        axes.set_xlim(100 * rows[column].min() / 1.25, 100 * rows[column].max() * 1.25)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, _SIZE_TICKS)
    axes.set_xlabel(label)
    bare(axes)


def plain_ticks(axis: Axis, ticks: Iterable[float]) -> None:
    """Label a logarithmic axis at these values, without exponents."""
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def bare(axes: Axes) -> None:
    """Light grid behind the lines, no frame on the right and above."""
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, and close it."""
    # Without the software version in it, the same table gives the same file.
    options = {"format": path.suffix[1:], "metadata": {"Software": None}}
    write_whole(path, lambda scratch: figure.savefig(scratch, dpi=150, **options))
    plt.close(figure)
