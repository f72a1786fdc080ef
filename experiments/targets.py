"""The project's own targets, and what the tables say of each: ``python -m experiments.targets``.

Prints and writes `results/targets.md` and `results/targets.csv`, one row per target: what is aimed
at, what was measured, and whether it was met; and `results/at_equal_drop.md`, what each method
keeps and how fast it is at an equal drop of accuracy. From the tables in `results/` alone: the same
tables give the same files. The targets are in `experiments.report.targets`.
"""

import logging
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.report import at_equal_drop
from experiments.report.tables import read_tables, write_table
from experiments.report.targets import measured_targets, report
from experiments.runs.records import write_whole

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="targets")
def main(cfg: DictConfig) -> None:
    results = Path(cfg.results_dir)
    tables = read_tables(results)
    measured = measured_targets(tables)
    write_table(results / "targets.csv", measured)
    texts = {"targets.md": report(measured), "at_equal_drop.md": at_equal_drop.report(tables)}
    for name, text in texts.items():
        write_whole(results / name, partial(Path.write_text, data=text, encoding="utf-8"))
        log.info("%s\n%s", results / name, text)


if __name__ == "__main__":
    main()
