"""The figure of what each step towards the fewest weights brings."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.ablation import STEPS
from experiments.report.style import METHOD_STYLES, bare, plain_ticks
from experiments.report.tables import NETWORK_TITLES, in_order

# In the colour of the method that a line ends at.
_LINES = {
    "all": {**METHOD_STYLES["lowest_rank"], "label": "on all inputs"},
    "selected": {**METHOD_STYLES["fewest_weights"], "label": "on selected inputs"},
}
_TICKS = (1, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50)


def ablation(table: pd.DataFrame) -> Figure | None:
    """Weights kept at equal held-out drops as steps are added: rows are drops, columns networks.

    A line without and one with selection of inputs; a step adds to those before it. Bars are the
    range over seeds. A step with which a seed is never within the drop has no point. `table` is
    that of `experiments.report.ablation.ablation_sizes`.
    """
    reached = table[table["fraction"].notna()]
    models = in_order(reached["model"], NETWORK_TITLES)
    drops = sorted(reached["largest_drop"].unique())
    if not models:
        return None
    figure, grid = plt.subplots(
        len(drops),
        len(models),
        figsize=(4.8 * len(models) + 0.4, 3.3 * len(drops) + 0.6),
        squeeze=False,
        sharey="col",
        layout="constrained",
    )
    for row, drop in zip(grid, drops, strict=True):
        for axes, model in zip(row, models, strict=True):
            here = reached[(reached["model"] == model) & (reached["largest_drop"] == drop)]
            for inputs, style in _LINES.items():
                steps = here[here["inputs"] == inputs].set_index("step")
                _draw(axes, steps, style, above=inputs == "all")
            _axes(axes)
        row[0].set_ylabel(f"weights kept (%)\nat a held-out drop of {drop:.1f} points")
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(NETWORK_TITLES.get(model, model))
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2
    )
    return figure


def _draw(axes: Axes, steps: pd.DataFrame, style: dict, above: bool) -> None:
    """One line, with its values beside the points."""
    steps = steps.reindex(list(STEPS))
    mean, low, high = (100 * steps[f"fraction{end}"].to_numpy() for end in ("", "_min", "_max"))
    # Not below zero, where a mean of equal values is rounded.
    bars = [(mean - low).clip(min=0), (high - mean).clip(min=0)]
    style = {**style, "markersize": 10 if style["marker"] == "*" else 6}
    axes.errorbar(
        np.arange(len(STEPS)), mean, yerr=bars, linewidth=2, elinewidth=1, capsize=2, **style
    )
    for place, (value, at_most) in enumerate(zip(mean, steps["at_most"], strict=True)):
        if np.isfinite(value):
            axes.annotate(
                ("≤ " if at_most else "") + f"{value:.2f}",
                (place, value),
                xytext=(5, 5) if above else (-5, -5),  # lines fall from left to right
                textcoords="offset points",
                ha="left" if above else "right",
                va="bottom" if above else "top",
                fontsize=8,
                color=style["color"],
            )


def _axes(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.margins(y=0.12)  # room for the values
    plain_ticks(axes.yaxis, _TICKS)
    names = [name if place == 0 else f"+ {name}" for place, name in enumerate(STEPS)]
    axes.set_xticks(range(len(STEPS)), names)
    axes.set_xlim(-0.5, len(STEPS) - 0.5)
    axes.set_xlabel("steps, each added to those before it")
    bare(axes)
