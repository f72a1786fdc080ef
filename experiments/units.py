"""A run as a unit of work: what it is, whether it is done, and that it is done once.

A run is known by a hash of all that decides its result: its settings without paths, devices and
tracking, the weights of its checkpoint, and its data. The hash names its record and its lock.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from experiments.checkpoints import checkpoint_path
from experiments.data import data_sha256
from experiments.locking import holder, locked
from experiments.records import file_sha256, identity

FINISHED, RUNNING, FAILED, MISSING = "finished", "running", "failed", "missing"


def run_key(cfg: DictConfig) -> str:
    """The run's identity, from its config and two file hashes: nothing is loaded for it.

    Without a checkpoint, which the run will then miss, its hash is null.
    """
    path = network_path(cfg)
    return identity(
        {
            "config": settings(cfg),
            "checkpoint": file_sha256(path) if path.is_file() else None,
            "data": data_sha256(cfg.dataset.name),
        }
    )


def network_path(cfg: DictConfig) -> Path:
    return checkpoint_path(cfg.checkpoint_dir, cfg.model.name, cfg.dataset.name, cfg.seed)


def record_path(cfg: DictConfig, key: str) -> Path:
    return Path(cfg.record_dir) / f"{key}.json"


def lock_path(cfg: DictConfig, key: str) -> Path:
    return Path(cfg.record_dir) / "locks" / f"{key}.lock"


@contextmanager
def claim(cfg: DictConfig, key: str) -> Iterator[dict | None]:
    """Have a run to oneself, and get its record where it is finished already, else None.

    Of two processes with the same run, the second waits here and then gets the first one's record.
    """
    with locked(lock_path(cfg, key)):
        record = None if cfg.rerun else read_record(record_path(cfg, key))
        yield record if record and record["state"] == FINISHED else None


def read_record(path: Path) -> dict | None:
    """A run's record, or None where there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not ({"row", "layers"} <= set(record) or "error" in record):
        return None
    record.setdefault("state", FINISHED)
    return record


def state(cfg: DictConfig, key: str) -> tuple[str, dict | None]:
    """Where a run stands, and its record if it has one; for a running one, who runs it."""
    running = holder(lock_path(cfg, key))
    if running is not None:
        return RUNNING, running
    record = read_record(record_path(cfg, key))
    return (record["state"] if record else MISSING), record


def choices(cfg: DictConfig) -> dict:
    """What the run is, under the names of the tables' columns.

    A method whose config has no constraint is held to the bound in the sense of the hinge set.
    """
    return {
        "dataset": cfg.dataset.name,
        "model": cfg.model.name,
        "method": cfg.method.name,
        "constraint": cfg.method.get("constraint", "hinge"),
        "refit": cfg.method.get("refit", "none"),
        "order": cfg.method.get("order", "parallel"),
        "seed": cfg.seed,
        "relative_tolerance": cfg.method.relative_tolerance,
        "calibration_samples": cfg.calibration_samples,
    }


def describe(cfg: DictConfig) -> str:
    """The run in a few words, for people: what is not as the paper has it is named."""
    chosen = choices(cfg)
    words = ["{model}", "{method}", "{constraint}"]
    words += ["refit"] * (chosen["refit"] != "none") + ["cascade"] * (chosen["order"] == "cascade")
    words += ["{relative_tolerance:g}", "seed", "{seed},", "{calibration_samples}", "samples"]
    return " ".join(words).format(**chosen)


def settings(cfg: DictConfig) -> dict:
    """What decides a run's result: its config without paths, devices and tracking."""
    nodes = OmegaConf.to_container(cfg, resolve=True)
    nodes["dataset"].pop("root")
    nodes["model"].pop("training")
    return {
        key: nodes[key] for key in ("dataset", "model", "method", "seed", "calibration_samples")
    }
