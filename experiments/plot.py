"""Turn tables into figures: ``python -m experiments.plot``. Needs neither torch nor a network.

Draws every figure of the comparison and of the ablation whose tables are there. The figures of the
solvers' benchmark, below, are drawn by `experiments.benchmark`.
"""

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
from experiments.report import figures, figures_ablation
from experiments.report.figures import bare
from experiments.report.tables import MADE_BY, read_tables
from experiments.runs.records import write_whole
from experiments.runs.tracking import TrackingError, check_tracking, log_figures

log = logging.getLogger(__name__)

FIGURES = {**figures.FIGURES, **figures_ablation.FIGURES}

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


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="plot")
def main(cfg: DictConfig) -> None:
    matplotlib.use("Agg")
    try:
        check_tracking(cfg.tracking)
    except TrackingError as error:
        sys.exit(str(error))
    results = Path(cfg.results_dir)
    tables = read_tables(results)
    if "sweeps" not in tables:
        raise FileNotFoundError(
            f"there is no {results / 'sweeps.csv'}; make it with {MADE_BY['sweeps']}"
        )
    drawn = {}
    for name in FIGURES:
        figure = draw(name, tables)
        if figure is not None:
            drawn[name] = results / "figures" / f"{name}.png"
            save(figure, drawn[name])
            log.info("%s", drawn[name])
    config = OmegaConf.to_container(cfg, resolve=True)
    sweeps = tables["sweeps"]
    # What is not a number is a gap in a table; wandb has no word for it but null.
    rows = sweeps.astype(object).where(sweeps.notna(), None).to_dict("records")
    log_figures(cfg.tracking, group=cfg.group, config=config, figures=drawn, rows=rows)


def draw(name: str, tables: dict[str, pd.DataFrame]) -> Figure | None:
    """One figure of `FIGURES`; None, and one line that says what makes it, if it has no data."""
    function, needed = FIGURES[name]
    missing = [table for table in needed if table not in tables]
    if missing:
        log.info("no %s.png without %s.csv; %s", name, missing[0], MADE_BY[missing[0]])
        return None
    figure = function(*(tables[table] for table in needed))
    if figure is None:
        log.info(
            "no %s.png: %s.csv has no rows for it; python -m experiments.paper", name, needed[0]
        )
    return figure


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
    axes.xaxis.set_major_locator(FixedLocator(widths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
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


def save(figure: Figure, path: Path) -> None:
    # Without the software version in it, the same table gives the same file.
    about = {"format": path.suffix[1:], "metadata": {"Software": None}}
    write_whole(path, lambda scratch: figure.savefig(scratch, dpi=150, **about))
    plt.close(figure)


if __name__ == "__main__":
    main()
