"""Turn tables into figures: ``python -m experiments.plot``. Needs neither torch nor a network."""

import logging
import sys
from pathlib import Path

import hydra
import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from omegaconf import DictConfig, OmegaConf

from experiments.configuration import CONFIG_PATH
from experiments.records import write_whole
from experiments.tracking import TrackingError, check_tracking, log_figures

log = logging.getLogger(__name__)

# One style a method in all figures; colours of Okabe and Ito, told apart by every kind of sight.
METHOD_STYLES = {
    "ddlr": {"label": "DDLR (nuclear norm)", "color": "#0072B2", "marker": "o"},
    "nettrim": {"label": "Net-Trim (l1)", "color": "#D55E00", "marker": "s"},
    "ddlr_cvxpy": {"label": "DDLR, cone solver", "color": "#56B4E9", "marker": "x"},
    "nettrim_cvxpy": {"label": "Net-Trim, cone solver", "color": "#E69F00", "marker": "+"},
}
NETWORK_TITLES = {
    "lenet_300_100": "LeNet-300-100 on MNIST",
    "lenet5": "LeNet-5 on MNIST, FC layers",
    "mlp_digits": "MLP 64-48-32-10 on digits",
}
SIZES = {
    "weights": ("kept_fraction", "weights kept"),
    "bytes": ("bytes_fraction", "bytes kept"),
}
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
# Accuracies further below the dense network are of no use to anybody and would flatten the rest.
_POINTS_SHOWN = 10
_SIZE_TICKS = (0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="plot")
def main(cfg: DictConfig) -> None:
    matplotlib.use("Agg")
    try:
        check_tracking(cfg.tracking)
    except TrackingError as error:
        sys.exit(str(error))
    table = Path(cfg.results_dir) / "sweeps.csv"
    if not table.is_file():
        raise FileNotFoundError(
            f"there is no {table}; make it with python -m experiments.compress, then "
            "python -m experiments.collect"
        )
    sweeps = pd.read_csv(table)
    sweeps["bytes_fraction"] = sweeps["bytes_stored"] / sweeps["bytes_dense"]
    figures = {}
    for counted in SIZES:
        path = Path(cfg.results_dir) / "figures" / f"frontier_{counted}.png"
        save(frontier(sweeps, counted), path)
        figures[f"frontier_{counted}"] = path
        log.info("%s", path)
    config = OmegaConf.to_container(cfg, resolve=True)
    # What is not a number is a gap in a table; wandb has no word for it but null.
    rows = sweeps.astype(object).where(sweeps.notna(), None).to_dict("records")
    log_figures(cfg.tracking, group=cfg.group, config=config, figures=figures, rows=rows)


def frontier(sweeps: pd.DataFrame, counted: str) -> Figure:
    """Test accuracy against size, one panel a network, one line a method and output set.

    A point is the mean over seeds at one tolerance, its bar the range over them.
    """
    column, label = SIZES[counted]
    models = sorted(sweeps["model"].unique(), key=lambda model: _position(model, NETWORK_TITLES))
    figure, panels = plt.subplots(
        1, len(models), figsize=(5.2 * len(models), 4.2), squeeze=False, layout="constrained"
    )
    for axes, model in zip(panels[0], models, strict=True):
        rows = sweeps[sweeps["model"] == model]
        dense = rows["accuracy_dense"].mean()
        for (method, constraint), line in rows.groupby(["method", "constraint"]):
            _draw_line(axes, line, column, method, constraint)
        axes.axhline(dense, color="black", linestyle=":", linewidth=1.2)
        axes.annotate(
            f"dense, {dense:.2f} %",
            (0.02, dense),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=9,
        )
        axes.set_ylim(dense - _POINTS_SHOWN, dense + 0.08 * _POINTS_SHOWN)
        shown = rows[rows["accuracy"] > dense - _POINTS_SHOWN]
        axes.set_xlim(100 * shown[column].min() / 1.25, 100 * shown[column].max() * 1.1)
        axes.set_title(NETWORK_TITLES.get(model, model))
        axes.set_xlabel(f"{label} (% of the dense layers)")
        _percent_axis(axes)
    panels[0][0].set_ylabel("test accuracy (%)")
    panels[0][0].legend(loc="lower right", frameon=False)
    return figure


def _position(name: str, known: dict) -> int:
    """Where a name stands in the order of a table of names; new ones come last."""
    return list(known).index(name) if name in known else len(known)


def _draw_line(axes: Axes, rows: pd.DataFrame, column: str, method: str, constraint: str) -> None:
    style = dict(METHOD_STYLES[method])
    if constraint == "hinge":
        style["label"] += ", hinge set"
        style["linestyle"] = "--"
    points = rows.groupby("relative_tolerance")[[column, "accuracy"]].agg(["mean", "min", "max"])
    size, accuracy = 100 * points[column], points["accuracy"]
    axes.plot(size["mean"], accuracy["mean"], markersize=5, linewidth=1.6, **style)
    if rows["seed"].nunique() > 1:
        axes.errorbar(
            size["mean"],
            accuracy["mean"],
            xerr=[size["mean"] - size["min"], size["max"] - size["mean"]],
            yerr=[accuracy["mean"] - accuracy["min"], accuracy["max"] - accuracy["mean"]],
            fmt="none",
            ecolor=style["color"],
            linewidth=1,
        )


def _percent_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_SIZE_TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    _bare(axes)


def convergence(table: pd.DataFrame) -> Figure:
    """Certified gap and violation against time on one layer, one column a norm."""
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
            _bare(axes)
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
    axes.xaxis.set_major_locator(FixedLocator(widths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("in_features = out_features (4 to 10 samples each)")
    axes.set_ylabel("seconds for one solve")
    axes.legend(frameon=False, fontsize=9)
    _bare(axes)
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


def _bare(axes: Axes) -> None:
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    # Without the software version in it, the same table gives the same file.
    write_whole(path, lambda scratch: figure.savefig(scratch, dpi=150, metadata={"Software": None}))
    plt.close(figure)


if __name__ == "__main__":
    main()
