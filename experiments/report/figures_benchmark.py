"""Figures of the solvers' benchmark: convergence on one layer, and time against a layer's width."""

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.style import bare, plain_ticks

SOLVER_STYLES = {
    "ours": {"label": "this project", "color": "#0072B2", "marker": "o"},
    "plain, penalty 100": {"label": "plain ADMM, penalty 100", "color": "#D55E00", "marker": "s"},
    "plain, penalty 1": {"label": "plain ADMM, penalty 1", "color": "#E69F00", "marker": "^"},
    "SCS": {"label": "SCS (CVXPY)", "color": "#009E73", "marker": "s"},
    "CLARABEL": {"label": "Clarabel (CVXPY)", "color": "#CC79A7", "marker": "^"},
    "MOSEK": {"label": "MOSEK (CVXPY)", "color": "#E69F00", "marker": "D"},
}

NORM_TITLES = {"nuclear": "nuclear norm (DDLR)", "l1": "l1 (Net-Trim)"}
CONVERGENCE = {
    "relative_gap": ("certified relative gap", 1e-2),
    "violation": ("violation (0 is drawn at 1e-5)", 1e-3),
}


def convergence(table: pd.DataFrame) -> Figure:
    """Certified gap and violation against time on one layer, one column per norm."""
    rows = table[(table["part"] == "layer") & (table["case"] == "trace")]
    norms = sorted(rows["norm"].unique(), reverse=True)
    figure, panels = plt.subplots(
        2,
        len(norms),
        figsize=(4.6 * len(norms), 6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, norm in enumerate(norms):
        for solver, trace in rows[rows["norm"] == norm].groupby("solver", sort=False):
            style = SOLVER_STYLES.get(solver, {"label": solver, "marker": "."})
            for axes, quantity in zip(panels[:, column], CONVERGENCE, strict=True):
                # A logarithmic axis has no place for 0.
                values = trace[quantity].abs().clip(lower=1e-5)
                axes.plot(trace["seconds"], values, markersize=3, linewidth=1.4, **style)
        for axes, (label, limit) in zip(panels[:, column], CONVERGENCE.values(), strict=True):
            axes.axhline(limit, color="black", linestyle=":", linewidth=1.2)
            axes.set_ylabel(label if column == 0 else None)
            axes.set_xscale("log")
            axes.set_yscale("log")
            bare(axes)
        panels[0][column].set_title(NORM_TITLES[norm])
        panels[1][column].set_xlabel("seconds")
    panels[0][0].legend(frameon=False, fontsize=9)
    return figure


def scaling(table: pd.DataFrame) -> Figure:
    """Time of one solve against the layer's width, ours and the cone solvers."""
    rows = table[table["part"] == "reference"]
    figure, axes = plt.subplots(figsize=(6.2, 4.4), layout="constrained")
    for solver, line in rows[rows["solver"] != "ours"].groupby("solver"):
        _draw_scaling(axes, line, solver)
    for gap, line in rows[rows["solver"] == "ours"].groupby("gap_asked"):
        # The finer gap is drawn broken, as it is the same solver.
        finest = gap == rows["gap_asked"].min()
        _draw_scaling(axes, line, "ours", linestyle="--" if finest else "-")
    axes.set_xscale("log")
    axes.set_yscale("log")
    widths = sorted(rows["in_features"].unique())
    plain_ticks(axes.xaxis, widths)
    axes.set_xlabel("in_features = out_features (4 to 10 samples each)")
    axes.set_ylabel("seconds for one solve")
    axes.legend(frameon=False, fontsize=9)
    bare(axes)
    return figure


def _draw_scaling(axes: Axes, rows: pd.DataFrame, solver: str, **style) -> None:
    gap = rows["gap_asked"].iloc[0]
    style = {**SOLVER_STYLES[solver], **style}
    style["label"] = f"{style['label']}, gap {gap:.0e}"
    times = rows.groupby("in_features")["seconds"].median()
    axes.plot(times.index, times, markersize=5, linewidth=1.6, **style)
    if solver != "ours":
        axes.annotate(
            "last size tried",
            (times.index[-1], times.iloc[-1]),
            xytext=(0, 6),
            textcoords="offset points",
            fontsize=8,
            ha="center",
        )


# Name of a file to the part of the benchmark that it shows, and its function of the table.
FIGURES = {"convergence": ("layer", convergence), "scaling": ("reference", scaling)}
