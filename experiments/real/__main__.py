"""Compress networks that others trained: ``python -m experiments.real``.

Adds a row to `results/real.csv`, with ``task=capture`` to `results/real_capture.csv`, or with
``task=latency`` rows to `results/real_latency.csv`. A run whose rows are there already is passed
over, so that a sweep that was interrupted goes on.
"""

import logging
from pathlib import Path

import hydra
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.configuration import CONFIG_PATH, SettingError
from experiments.real.capture_cost import capture_rows
from experiments.real.latency import latency_rows
from experiments.real.runs import choices, compressed_rows, in_fresh_process
from experiments.runs.locking import locked
from experiments.runs.records import write_whole

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="real")
def main(cfg: DictConfig) -> None:
    OmegaConf.resolve(cfg)
    cfg.network_name = HydraConfig.get().runtime.choices["network"]
    if cfg.task not in _TASKS:
        raise SettingError(f"task is {cfg.task!r}; choose one of {', '.join(_TASKS)}")
    file, key_of, measure = _TASKS[cfg.task]
    path, key = Path(cfg.results_dir) / file, key_of(cfg)
    if not cfg.rerun and _has(path, key):
        log.info("%s has this run already; rerun=true does it again", path)
        return
    rows = pd.DataFrame(in_fresh_process(measure, cfg))
    with locked(Path(cfg.output_dir) / "real" / f"{path.name}.lock"):
        _add(path, key, rows)
    log.info("%s:\n%s", path, rows.T.to_string(header=False))


def _captured(cfg: DictConfig) -> dict:
    return {"network": cfg.network_name, "samples": cfg.network.calibration_samples}


_TASKS = {
    "compress": ("real.csv", choices, compressed_rows),
    "capture": ("real_capture.csv", _captured, capture_rows),
    "latency": ("real_latency.csv", choices, latency_rows),
}


def _has(path: Path, key: dict) -> bool:
    return path.is_file() and bool(_same(pd.read_csv(path), key).any())


def _same(table: pd.DataFrame, key: dict) -> pd.Series:
    """Which rows of a table are of a run; `settings`, where it is there, is all that decides it."""
    deciding = {"settings": key["settings"]} if "settings" in key else key
    same = pd.Series(True, index=table.index)
    for name, value in deciding.items():
        same &= table[name].astype(str) == str(value)
    return same


def _add(path: Path, key: dict, rows: pd.DataFrame) -> None:
    """Add rows to a table, in the place of those of the same run."""
    if path.is_file():
        before = pd.read_csv(path)
        rows = pd.concat([before[~_same(before, key)], rows], ignore_index=True)
    write_whole(path, lambda scratch: rows.to_csv(scratch, index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
