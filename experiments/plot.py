"""Turn tables into figures: ``python -m experiments.plot``. Needs neither torch nor a network.

Draws every figure of the comparison and of the ablation whose tables are there. The figures of the
solvers' benchmark are drawn by `experiments.benchmark`.
"""

import logging
import sys
from pathlib import Path

import hydra
import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from experiments.configuration import CONFIG_PATH
from experiments.report.figures import FIGURES
from experiments.report.style import save
from experiments.report.tables import MADE_BY, read_tables
from experiments.runs.tracking import TrackingError, check_tracking, log_figures

log = logging.getLogger(__name__)


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


if __name__ == "__main__":
    main()
