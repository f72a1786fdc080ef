"""How much faster compressed networks run, beside what their operation counts promise."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.style import (
    bare,
    legend,
    panel_grid,
    plain_ticks,
    short_title,
    title_columns,
)
from experiments.report.tables import METHOD_TITLES, NETWORK_TITLES, in_order

_TICKS = tuple(step * 10**power for power in range(-1, 4) for step in (1, 2, 5))

# Engine and form to style, in colours of Okabe and Ito; "dense" ones are those timed against.
_WAYS = {
    ("torch", "stored"): {
        "label": "torch, as stored",
        "marker": "o",
        "markerfacecolor": "white",
        "color": "#0072B2",
    },
    ("torch", "fused"): {"label": "torch, layers fused", "marker": "o", "color": "#0072B2"},
    ("compiled", "fused"): {
        "label": "torch.compile, layers fused",
        "marker": "D",
        "color": "#CC79A7",
    },
    ("onnxruntime", "fused"): {
        "label": "ONNX Runtime, layers fused",
        "marker": "s",
        "color": "#D55E00",
    },
}


def inference(times: pd.DataFrame) -> Figure | None:
    """Speed-up of the fully connected layers on one thread, one row of panels per batch size.

    Each against the dense layers in the same engine. A bar reaches as far as the operation count
    promises.
    """
    times = times[times["threads"] == 1]
    models = in_order(times["model"], NETWORK_TITLES)
    batches = sorted(times["batch"].unique())
    if not models:
        return None
    methods = in_order(times["method"], METHOD_TITLES)
    names = [short_title(method).partition(",")[0] for method in methods]
    width, height = max(3.1, 8 / len(models)), 0.9 + 0.3 * len(methods)
    figure, grid = panel_grid(len(batches), len(models), width=width, height=height, sharey=True)
    for row, batch in zip(grid, batches, strict=True):
        for axes, model in zip(row, models, strict=True):
            here = times[(times["model"] == model) & (times["batch"] == batch)]
            _draw(axes, here, methods)
            axes.set_xlabel("times as fast as dense")
        row[0].set_yticks(range(len(methods)), names)
        row[0].set_ylabel(f"batch of {batch}", fontsize=11)
    title_columns(grid, models)
    legend(figure, [grid[0][0]])
    return figure


def _draw(axes: Axes, times: pd.DataFrame, methods: list[str]) -> None:
    places = {method: place for place, method in enumerate(methods)}
    promised = times.groupby("method")["promised"].first()
    axes.barh(
        [places[method] for method in promised.index],
        promised - 1,
        left=1,
        height=0.62,
        color="0.85",
        label="promised by the operation count",
    )
    # One below the other, so that none hides another.
    offsets = dict(zip(_WAYS, (-0.21, -0.07, 0.07, 0.21), strict=True))
    for (engine, form), style in _WAYS.items():
        shown = times[(times["engine"] == engine) & (times["form"] == form)]
        if len(shown):
            rows = [places[method] + offsets[engine, form] for method in shown["method"]]
            axes.plot(shown["speedup"], rows, linestyle="none", markersize=6, **style)
    axes.axvline(1, color="black", linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    low = min(1.0, times["speedup"].min())
    high = max(times["promised"].max(), times["speedup"].max())
    axes.set_xlim(low / 1.25, high * 1.25)
    plain_ticks(axes.xaxis, _TICKS)
    axes.set_ylim(len(methods) - 0.5, -0.5)  # the first on top
    bare(axes)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
