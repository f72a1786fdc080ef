"""A run as a unit of work: what it is, whether it is done, and that it is done once.

A run is known by a hash of all that decides its result: its `settings`, the weights of its
checkpoint, and its data. The hash names its record and its lock, and its row in the tables. With
``finished_in=tables`` a run counts as finished by its row too: so a machine that has the tables but
not the records goes on where another one stopped.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from experiments.configuration import SettingError, given_goals
from experiments.data import data_sha256
from experiments.runs.checkpoints import checkpoint_path
from experiments.runs.locking import holder, locked
from experiments.runs.records import (
    ONE_TOLERANCE,
    USUAL_ALLOCATION,
    USUAL_CASCADE_BOUND,
    USUAL_NETWORK_REFIT,
    USUAL_RIDGE,
    file_sha256,
    identity,
)

FINISHED, RUNNING, FAILED, MISSING = "finished", "running", "failed", "missing"
FINISHED_IN = ("records", "tables")

# A choice among methods is at this value for a method whose config lacks it. In an identity a
# setting at this value is left out: one that is added with it, or renamed, leaves runs known.
_USUAL = {
    "constraint": "hinge",
    "refit": "none",
    "order": "parallel",
    "cascade_bound": USUAL_CASCADE_BOUND,
    "ridge": USUAL_RIDGE,
    "network_refit": "",
    "penalise_bias": False,
    "tolerance": 1e-2,
    "max_iterations": 5000,
}
# Entries of a method's config that are in its choices by another name, or decide no result.
_NOT_DECIDING = ("_target_", "name", "relative_tolerance", "raise_on_failure")


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
        record = None if cfg.rerun else find_record(cfg, key)
        yield record if record and record["state"] == FINISHED else None


def find_record(cfg: DictConfig, key: str) -> dict | None:
    """A run's record, or what the tables hold of it where ``finished_in=tables``.

    Raises
    ------
    SettingError
        If ``finished_in`` is neither of `FINISHED_IN`.
    """
    if cfg.finished_in not in FINISHED_IN:
        raise SettingError(f"finished_in is {cfg.finished_in!r}; choose one of {FINISHED_IN}")
    record = read_record(record_path(cfg, key))
    if cfg.finished_in == "records" or (record and record["state"] == FINISHED):
        return record
    return _from_tables(Path(cfg.results_dir), key) or record


def _from_tables(results: Path, key: str) -> dict | None:
    rows = _rows_by_run(results / "sweeps.csv").get(key)
    layers = _rows_by_run(results / "layers.csv").get(key)
    if not rows or not layers:
        return None
    (row,) = rows
    return {"state": FINISHED, "row": row, "layers": layers, "seconds": row["seconds"]}


def _rows_by_run(path: Path) -> dict[str, list[dict]]:
    try:
        return _read_rows(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return {}


@lru_cache(maxsize=4)
def _read_rows(path: Path, changed: int) -> dict[str, list[dict]]:
    # Imported here: most runs have no need of tables.
    import pandas as pd

    rows: dict[str, list[dict]] = {}
    for row in pd.read_csv(path, dtype={"run": str}).to_dict("records"):
        # As in a record, where a number that is not finite is null.
        row = {
            key: None if value != value or value == math.inf else value
            for key, value in row.items()
        }
        rows.setdefault(row["run"], []).append(row)
    return rows


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
    record = find_record(cfg, key)
    return (record["state"] if record else MISSING), record


def goal_of(cfg: DictConfig) -> tuple[str, float]:
    """What a run compresses to: one tolerance for all layers, or the goal that is set.

    Raises
    ------
    SettingError
        If more than one goal is set; names them.
    """
    wanted = given_goals(cfg.goal)
    if len(wanted) > 1:
        raise SettingError(f"goal has {', '.join(wanted)}; set one of them")
    for goal in wanted.items():
        return goal
    return ONE_TOLERANCE, cfg.method.relative_tolerance


def choices(cfg: DictConfig) -> dict:
    """What the run is, under the names of the tables' columns.

    A method whose config has no constraint is held to the bound in the sense of the hinge set.
    A goal that is not allocated by measurements is named after what it is allocated by.
    """
    goal, wanted = goal_of(cfg)
    allocation = (cfg.goal or {}).get("allocation", USUAL_ALLOCATION)
    named = goal if allocation == USUAL_ALLOCATION else f"{goal}_by_{allocation}"
    columns = ("constraint", "refit", "order", "cascade_bound", "ridge")
    return {
        "dataset": cfg.dataset.name,
        "model": cfg.model.name,
        "method": cfg.method.name,
        **{column: cfg.method.get(column, _USUAL[column]) for column in columns},
        "seed": cfg.seed,
        "goal": named,
        "wanted": wanted,
        "relative_tolerance": wanted if goal == ONE_TOLERANCE else None,
        "calibration_samples": cfg.calibration_samples,
        "network_refit": _network_refit_words(cfg),
    }


def _network_refit_words(cfg: DictConfig) -> str:
    """In what the run's refit of the whole network is not as usual, if it has such a refit."""
    node = cfg.get("network_refit")
    if node is None or cfg.method.get("refit") != "network":
        return ""
    words = [] if node.samples is None else [f"{node.samples} samples"]
    words += [
        f"{name.replace('_', ' ')} {node[name]:g}"
        for name, usual in USUAL_NETWORK_REFIT.items()
        if node[name] != usual
    ]
    return ", ".join(words)


def describe(cfg: DictConfig) -> str:
    """The run in a few words, for people: what is not as the paper has it is named."""
    chosen = choices(cfg)
    words = ["{model}", "{method}", "{constraint}"]
    refit = {"none": [], "layer": ["refit"]}.get(chosen["refit"], ["{refit} refit"])
    words += refit + ["cascade"] * (chosen["order"] == "cascade")
    words += ["ridge {ridge}"] * (chosen["ridge"] != USUAL_RIDGE)
    words += ["{goal}"] * (chosen["goal"] != ONE_TOLERANCE)
    words += ["{wanted}", "seed", "{seed},", "{calibration_samples}", "samples"]
    # Whatever they are: a run whose settings are refused has to be named too.
    shown = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in chosen.items()
    }
    return " ".join(words).format(**shown)


def describe_any(cfg: DictConfig, otherwise: str) -> str:
    """As `describe`, also where settings are too odd for it; then it is `otherwise`."""
    try:
        return describe(cfg)
    except Exception:
        return otherwise


def settings(cfg: DictConfig) -> dict:
    """What decides a run's result beside its checkpoint and its data, in the words of the tables.

    Neither where code, data and results lie is in it, nor what a run is computed on, nor how its
    network was trained, which the checkpoint stands for.
    """
    decides = choices(cfg)
    decides.pop("relative_tolerance")  # it is what is wanted, or each layer has its own
    decides["held_out"] = cfg.dataset.held_out
    if decides["goal"] != ONE_TOLERANCE:
        tolerances = cfg.goal.tolerances
        decides["tolerances"] = None if tolerances is None else list(tolerances)
        if cfg.goal.get("largest_layer") is not None:
            decides["largest_layer"] = cfg.goal.largest_layer
        if cfg.goal.get("trials"):
            decides["trials"] = [cfg.goal.trials, *cfg.goal.trial_sizes]
    method = OmegaConf.to_container(cfg.method, resolve=True)
    # What the choices say already is not said again.
    said = decides.items()
    own = {key: value for key, value in method.items() if (key, value) not in said}
    own = {key: value for key, value in own.items() if key not in _NOT_DECIDING}
    return _with_floats({**_unusual(decides), "method_settings": _unusual(own)})


def _unusual(values: dict) -> dict:
    return {
        key: value for key, value in values.items() if key not in _USUAL or value != _USUAL[key]
    }


def _with_floats(values):
    """The same with every whole number as a float: a ridge of 1 and one of 1.0 are one run."""
    if isinstance(values, dict):
        return {key: _with_floats(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_floats(value) for value in values]
    is_whole = isinstance(values, int) and not isinstance(values, bool)
    return float(values) if is_whole else values
