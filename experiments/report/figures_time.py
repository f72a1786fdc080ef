"""How much faster each method's smallest network within a drop runs, as bars."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.style import METHOD_STYLES, bare, legend, panel_grid, plain_ticks
from experiments.report.tables import METHOD_TITLES, NETWORK_TITLES, SHORT_TITLES, in_order
from experiments.report.times_at_drop import over_seeds

_TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50)


def times_at_drop(times: pd.DataFrame) -> Figure | None:
    """Speed-up over the dense layers within a held-out drop, one panel per drop and batch.

    On one thread, each method in the faster one of its forms; bars are means over seeds, with the
    range over them.
    """
    if not len(times):
        return None
    table = over_seeds(times)
    models = in_order(table["model"], NETWORK_TITLES)
    methods = in_order(table["method"], METHOD_TITLES)
    panels = sorted(set(zip(table["largest_drop"], table["batch"], strict=True)))
    figure, grid = panel_grid(len(panels), 1, width=max(8.0, 2.9 * len(models)), height=2.6)
    width = 0.86 / len(methods)
    for axes, (drop, batch) in zip(grid.flat, panels, strict=True):
        here = table[(table["largest_drop"] == drop) & (table["batch"] == batch)]
        for index, method in enumerate(methods):
            shown = here[here["method"] == method].set_index("model").reindex(models)
            places = np.arange(len(models)) + (index - (len(methods) - 1) / 2) * width
            _draw(axes, shown, places, width, method)
        axes.axhline(1, color="black", linestyle=":", linewidth=1.2)
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, _TICKS)
        axes.set_xticks(range(len(models)), [SHORT_TITLES.get(each, each) for each in models])
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.5, len(models) - 0.5)
        axes.set_ylabel("times as fast\nas dense")
        axes.set_title(f"batch of {batch}, held-out drop of at most {drop:.1f} points")
        bare(axes)
        axes.grid(False, axis="x")
    legend(figure, [grid[0][0]])
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, places: np.ndarray, width: float, method: str) -> None:
    axes.bar(
        places,
        rows["speedup"] - 1,
        0.92 * width,
        bottom=1,
        label=METHOD_TITLES.get(method, method),
        color=METHOD_STYLES[method]["color"],
        yerr=[rows["speedup"] - rows["low"], rows["high"] - rows["speedup"]],
        error_kw={"linewidth": 1, "capsize": 1.5, "ecolor": "0.45"},
    )
