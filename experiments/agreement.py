"""Whether runs made again give the same: ``python -m experiments.agreement``.

Compares two tables of runs by run. A run is known by its settings, its checkpoint and its data, so
the same run has the same key on any machine.
"""

import logging
import sys
from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.report.tables import SETTING, read_table

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="agreement")
def main(cfg: DictConfig) -> None:
    paths = [Path(folder) / "sweeps.csv" for folder in (cfg.reproduced_dir, cfg.results_dir)]
    for path in paths:
        if not path.is_file():
            sys.exit(f"there is no {path}; make reproduce makes the first table, make paper both")
    table = compare(*map(read_table, paths))
    if table.empty:
        sys.exit(f"{paths[0]} and {paths[1]} have no run in common")
    log.info(
        "%d runs in both tables; largest difference %.3f points of accuracy, %.4f of the weights",
        len(table),
        table["accuracy_difference"].max(),
        table["kept_difference"].max(),
    )
    apart = table[table["accuracy_difference"] > cfg.accuracy_points]
    if len(apart):
        shown = apart.to_string(index=False)
        sys.exit(f"{len(apart)} runs differ by more than {cfg.accuracy_points} points:\n{shown}")


def compare(reproduced: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """The runs that both tables hold, with their differences.

    Returns
    -------
    DataFrame
        What each run is, its accuracy (%) and `kept_fraction` in both tables, and the sizes of
        their differences, `accuracy_difference` in points and `kept_difference`.
    """
    measured = ["accuracy", "kept_fraction"]
    both = reproduced[["run", *SETTING, "seed", *measured]].merge(
        reference[["run", *measured]], on="run", suffixes=("", "_reference"), validate="1:1"
    )
    # Accuracies are kept to four decimals.
    difference = (both["accuracy"] - both["accuracy_reference"]).abs().round(4)
    kept = (both["kept_fraction"] - both["kept_fraction_reference"]).abs()
    return both.assign(accuracy_difference=difference, kept_difference=kept)


if __name__ == "__main__":
    main()
