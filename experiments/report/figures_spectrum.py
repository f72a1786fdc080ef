"""Singular values of one layer, before and after compression."""

import pandas as pd
from matplotlib.figure import Figure

from experiments.report.style import METHOD_STYLES, bare, legend, network_title, panel_grid
from experiments.report.tables import METHOD_TITLES, in_order
from experiments.report.variants import RIVALS, refit_words


def spectrum(values: pd.DataFrame) -> Figure | None:
    """Singular values of a layer as trained and as each method leaves it, one panel per metric."""
    metrics = in_order(values["metric"], ("plain", "input"))
    titles = {
        "plain": "singular values of W",
        "input": "of W in the metric of the centred inputs",
    }
    if not metrics:
        return None
    figure, (row,) = panel_grid(1, len(metrics), width=5.6, height=4.2)
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
    compressed = values[values["relative_tolerance"].notna()].iloc[0]
    title = f"{compressed['layer']} of {network_title(compressed['model'])}"
    figure.suptitle(f"{title}, tolerance {compressed['relative_tolerance']:g}")
    legend(figure, [row[0]])
    return figure


def _spectrum_style(method: str, refit: str, rank: int) -> dict:
    if method == "original":
        return {"color": "0.5", "linewidth": 2.5, "label": f"as trained (rank {rank})"}
    words = f", {refit_words(refit)}" if method in RIVALS else ""
    return {
        "color": METHOD_STYLES[method]["color"],
        "linestyle": "--" if method in RIVALS and refit == "none" else "-",
        "linewidth": 1.6,
        "label": f"{METHOD_TITLES[method]}{words} (rank {rank})",
    }
