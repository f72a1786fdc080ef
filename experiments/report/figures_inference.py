"""Time of inference against the weights that are kept."""

import pandas as pd
from matplotlib.figure import Figure

from experiments.report.style import (
    METHOD_STYLES,
    THICK,
    legend,
    panel_grid,
    plain_ticks,
    size_axis,
    title_columns,
)
from experiments.report.tables import METHOD_TITLES, NETWORK_TITLES, in_order

_TIME_TICKS = tuple(step * 10**power for power in range(7) for step in (1, 2, 3, 5, 7))


def inference(times: pd.DataFrame) -> Figure | None:
    """Time of the fully connected layers on one thread, one row per batch size."""
    models = in_order(times["model"], NETWORK_TITLES)
    batches = sorted(times["batch"].unique())
    if not models:
        return None
    figure, grid = panel_grid(len(batches), len(models), width=4.0)
    for row, batch in zip(grid, batches, strict=True):
        for axes, model in zip(row, models, strict=True):
            here = times[(times["model"] == model) & (times["batch"] == batch)]
            for method in in_order(here["method"], METHOD_STYLES):
                line = here[here["method"] == method].sort_values("kept_fraction")
                style = {**METHOD_STYLES[method], **THICK, "label": METHOD_TITLES[method]}
                axes.plot(100 * line["kept_fraction"], line["microseconds"], **style)
            dense = here["microseconds_dense"].median()
            axes.axhline(dense, color="black", linestyle=":", linewidth=1.2, label="dense")
            axes.set_yscale("log")
            plain_ticks(axes.yaxis, _TIME_TICKS)
            size_axis(axes, here, "kept_fraction", "weights kept (% of the dense layers)")
        row[0].set_ylabel(f"microseconds a batch of {batch}")
    title_columns(grid, models)
    legend(figure, [grid[0][0]])
    return figure
