"""The least that each method keeps at an equal drop of accuracy, as bars."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from experiments.report.style import METHOD_STYLES, bare, legend, panel_grid, short_title
from experiments.report.tables import (
    FRACTIONS,
    NETWORK_TITLES,
    SHORT_TITLES,
    at_commonest_samples_and_ridge,
    at_one_tolerance,
    in_order,
)
from experiments.report.variants import (
    AS_PUBLISHED,
    LAYER_REFITS,
    NETWORK_REFIT,
    OURS,
    RIVALS,
    TODAYS_RIVALS,
    in_main_set,
    of_methods,
    of_variant,
)


def equal_drop(sizes: pd.DataFrame) -> Figure | None:
    """The least that each method keeps within a held-out drop of accuracy, bars by network.

    DDLR and Net-Trim as published; then each method in the order, refit of layers, goal, number of
    samples and ridge with which it keeps least, network by network; last ours with network refit.
    One panel per drop and per what is counted.
    """
    sizes = in_main_set(sizes)
    bars = _bars(sizes)
    if not bars:
        return None
    models = in_order(pd.concat([bar.rows["model"] for bar in bars]), NETWORK_TITLES)
    panels = [
        (drop, counted) for drop in sorted(sizes["largest_drop"].unique()) for counted in FRACTIONS
    ]
    figure, grid = panel_grid(len(panels), 1, width=max(8.0, 2.9 * len(models)), height=2.8)
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
    legend(figure, [grid[0][0]])
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
    # As published is one setting, not the best of several.
    one_setting = at_commonest_samples_and_ridge(of_methods(sizes, *RIVALS))
    published = of_variant(at_one_tolerance(one_setting), AS_PUBLISHED)
    alone = sizes[sizes["refit"].isin(LAYER_REFITS)]
    together = sizes[sizes["refit"] == NETWORK_REFIT]
    # The better one of the two kinds of pruning by magnitude: one threshold per layer, or for all.
    kinds = {"magnitude": ("magnitude", "magnitude_global")}
    bars = [
        _Bar(
            method, f"{short_title(method)}, as published", of_methods(published, method), "hatched"
        )
        for method in RIVALS
    ]
    for method in (*RIVALS, "svd", "activation_svd", "magnitude", *TODAYS_RIVALS, *OURS):
        name = "magnitude" if method in kinds else short_title(method)
        rows = of_methods(alone, *kinds.get(method, (method,)))
        bars.append(_Bar(method, f"{name}, at its best", rows, "full"))
    refitted = next(
        (method for method in reversed(OURS) if len(of_methods(together, method))), OURS[-1]
    )
    label = f"{short_title(refitted)}, network refit"
    bars.append(_Bar(refitted, label, of_methods(together, refitted), "light"))
    return [bar for bar in bars if len(bar.rows)]


def _smallest(sizes: pd.DataFrame) -> pd.DataFrame:
    """The row of each network with the smallest fraction."""
    return sizes.sort_values("fraction", kind="stable").drop_duplicates("model")


def _draw_bars(axes: Axes, rows: pd.DataFrame, places: np.ndarray, width: float, bar: _Bar) -> None:
    """One bar per network, with its value above ours and "n/a" where there is none."""
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
            rotation=90,
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=colour,
        )


def _percent(value: float) -> str:
    """In two digits, which the width of a bar has room for."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
