"""Compress a trained network by one method at one setting, judge it, and keep a record.

python -m experiments.compress model=lenet5 method=ddlr method.relative_tolerance=0.1
python -m experiments.compress -m method=ddlr,nettrim method.relative_tolerance=0.05,0.1,0.2
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ddlr import CompressionResult, LayerReport
from experiments.checkpoints import checkpoint_path, load_checkpoint
from experiments.configuration import CONFIG_PATH, build
from experiments.data import Dataset
from experiments.metrics import accuracy, size_measures
from experiments.records import identity, provenance, write_json
from experiments.tracking import track
from experiments.training import choose_device

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="compress")
def main(cfg: DictConfig) -> None:
    run(cfg, group=_group(cfg))


def run(cfg: DictConfig, group: str) -> dict:
    """Carry out one run and return its record, which is on disk by then."""
    choices = _choices(cfg)
    config = OmegaConf.to_container(cfg, resolve=True)
    name = "{model} {method} {relative_tolerance:g} seed {seed}".format(**choices)
    with track(
        cfg.tracking, name=name, group=group, job_type="compress", config=config
    ) as log_to_tracker:
        network, checkpoint = load_network(cfg)
        dataset = instantiate(cfg.dataset)
        key = identity({"config": _settings(cfg), "data": dataset.sha256})
        calibration = dataset.calibration(cfg.calibration_samples, cfg.seed)

        started = time.perf_counter()
        compressed = build(cfg.method, model=network, calibration=calibration)
        seconds = time.perf_counter() - started

        row = {
            "run": key,
            **choices,
            **judge(network, compressed, dataset),
            "seconds": round(seconds, 3),
        }
        layers = [_layer_row(key, choices, report) for report in compressed.layers]
        record = {
            "row": row,
            "layers": layers,
            "config": config,
            "checkpoint": checkpoint,
            "provenance": provenance(),
        }
        path = Path(cfg.record_dir) / f"{key}.json"
        write_json(path, record)
        log_to_tracker(row, layers)
    log.info(
        "%s: kept %.2f %% of the weights, %.2f %% of the bytes; accuracy %.2f %%, dense %.2f %%; "
        "worst violation %.1e, worst gap %.1e (%s); %.1f s -> %s",
        *(name, 100 * row["kept_fraction"], 100 * row["bytes_stored"] / row["bytes_dense"]),
        *(row["accuracy"], row["accuracy_dense"], row["worst_violation"]),
        *(row["worst_relative_gap"], row["status"], seconds, path),
    )
    return record


def judge(network: nn.Module, compressed: CompressionResult, dataset: Dataset) -> dict:
    """Size, accuracy and certificates of a compressed network, measured alike for all methods."""
    dense = accuracy(network, dataset.test)
    after = accuracy(compressed.model, dataset.test)
    names = [report.name for report in compressed.layers]
    statuses = sorted({report.status.value for report in compressed.layers} - {"converged"})
    return {
        **size_measures(network, compressed.model, names),
        "accuracy_dense": round(dense, 4),
        "accuracy": round(after, 4),
        "accuracy_drop": round(dense - after, 4),
        "accuracy_held_out": round(accuracy(compressed.model, dataset.held_out), 4),
        "worst_violation": max(report.violation for report in compressed.layers),
        "worst_relative_gap": max(abs(report.relative_gap) for report in compressed.layers),
        "status": "+".join(statuses) or "converged",
    }


def load_network(cfg: DictConfig) -> tuple[nn.Module, dict]:
    """The trained network that a configuration names, and the description of its checkpoint."""
    path = checkpoint_path(cfg.checkpoint_dir, cfg.model.name, cfg.dataset.name, cfg.seed)
    network = build(cfg.model)
    command = (
        f"python -m experiments.train_baseline model={cfg.model.name} "
        f"dataset={cfg.dataset.name} seed={cfg.seed}"
    )
    checkpoint = load_checkpoint(path, network, command)
    return network.to(choose_device(cfg.device)), checkpoint


def _choices(cfg: DictConfig) -> dict:
    """What the run is, under the names of the tables' columns."""
    return {
        "dataset": cfg.dataset.name,
        "model": cfg.model.name,
        "method": cfg.method.name,
        "constraint": cfg.method.constraint,
        "refit": "none",
        "order": "parallel",
        "seed": cfg.seed,
        "relative_tolerance": cfg.method.relative_tolerance,
        "calibration_samples": cfg.calibration_samples,
    }


def _settings(cfg: DictConfig) -> dict:
    """What decides a run's result: its config without paths, devices and tracking."""
    nodes = OmegaConf.to_container(cfg, resolve=True)
    nodes["dataset"].pop("root")
    nodes["model"].pop("training")
    return {
        key: nodes[key] for key in ("dataset", "model", "method", "seed", "calibration_samples")
    }


def _layer_row(key: str, choices: dict, report: LayerReport) -> dict:
    values = asdict(report)
    values["status"] = report.status.value
    values["seconds"] = round(report.seconds, 3)
    name = values.pop("name")
    columns = ("dataset", "model", "method", "constraint", "refit", "order", "seed")
    return {"run": key, **{column: choices[column] for column in columns}, "layer": name, **values}


def _group(cfg: DictConfig) -> str:
    """One group a sweep; a single run is a group of its own."""
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    folder = Path(hydra_config.sweep.dir if multirun else hydra_config.run.dir)
    return f"{cfg.experiment_name}-{folder.name}"


if __name__ == "__main__":
    main()
