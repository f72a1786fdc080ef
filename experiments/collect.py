"""Turn records into tables: ``python -m experiments.collect``.

A row replaces the row of the same run that a table already has; all other rows stay.
"""

import logging
from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.records import read_records, write_whole

log = logging.getLogger(__name__)

_ORDER = [
    "dataset",
    "model",
    "method",
    "constraint",
    "refit",
    "order",
    "calibration_samples",
    "relative_tolerance",
    "seed",
    "run",
]


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="collect")
def main(cfg: DictConfig) -> None:
    results = Path(cfg.results_dir)
    records = read_records(Path(cfg.record_dir))
    if not records:
        log.warning(
            "%s holds no record; make one with python -m experiments.compress", cfg.record_dir
        )
        return
    merge(results / "sweeps.csv", pd.DataFrame([record["row"] for record in records]))
    layers = [layer for record in records for layer in record["layers"]]
    merge(results / "layers.csv", pd.DataFrame(layers))


def merge(path: Path, rows: pd.DataFrame) -> None:
    """Put rows into a table, in place of those with the same `run`, and write it in one step."""
    added = rows["run"].nunique()
    if path.is_file():
        earlier = pd.read_csv(path)
        rows = pd.concat([earlier[~earlier["run"].isin(rows["run"])], rows], ignore_index=True)
    # Stable, so that the layers of a run keep the order of the network.
    rows = rows.sort_values([key for key in _ORDER if key in rows], kind="stable")
    write_whole(path, lambda scratch: rows.to_csv(scratch, index=False, float_format="%.8g"))
    log.info("%s: %d rows, of %d runs from the records", path, len(rows), added)


if __name__ == "__main__":
    main()
