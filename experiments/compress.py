"""Compress a trained network by one method at one setting, judge it, and keep a record.

python -m experiments.compress model=lenet5 method=ddlr method.relative_tolerance=0.1
python -m experiments.compress -m method=ddlr,nettrim method.relative_tolerance=0.05,0.1,0.2

A run that is finished already is skipped, one that failed is tried again.
"""

import dataclasses
import logging
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import ddlr
from ddlr import CompressionResult, Goal, GoalReport, LayerReport, NetworkRefit
from ddlr.allocate import frontier, layer_options
from ddlr.goal_search import Networks, measured_allocations
from ddlr.goals import ON_HELD_OUT, TOLERANCES
from ddlr.method import SolveCache
from experiments.configuration import CONFIG_PATH, SettingError
from experiments.methods.balf import energy_options
from experiments.methods.configured import (
    compress_as_configured,
    method_of,
    walk_of,
    whole_walk_of,
)
from experiments.metrics import accuracy, layer_errors, output_measures, size_measures
from experiments.runs.checks import check_settings
from experiments.runs.layer_options import remembered_allocations, remembered_options
from experiments.runs.preparation import Prepared, drawn_inputs, prepare
from experiments.runs.records import ONE_TOLERANCE, provenance, write_json
from experiments.runs.solves import DiskSolveCache
from experiments.runs.sweeping import (
    check_watched,
    command,
    group_of,
    layer_bar,
    note_outcome,
    set_verbosity,
)
from experiments.runs.tracking import track
from experiments.runs.units import (
    FAILED,
    FINISHED,
    choices,
    claim,
    describe,
    describe_any,
    goal_of,
    read_record,
    record_path,
    run_key,
)
from experiments.training import choose_device

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="compress")
def main(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    check_watched(hydra_config)
    # One job after the other needs one accelerator; jobs side by side take turns.
    job = hydra_config.job.num if multirun and cfg.launcher.name != "local" else 0
    try:
        set_verbosity(cfg.verbosity)
        record, skipped = run(cfg, group=group_of(cfg.experiment_name, hydra_config), job=job)
        note = {"key": record["row"]["run"], "skipped": skipped}
        note_outcome(hydra_config, describe(cfg), FINISHED, **note)
    except (Exception, SystemExit) as error:
        if not multirun:
            if isinstance(error, SettingError):
                sys.exit(f"Error: {error}")
            raise
        # Not raised: Hydra would end a sweep after the batch of a run that raises. What failed is
        # in its record, and is reported with an exit code of 1 at the end.
        name = describe_any(cfg, otherwise=" ".join(hydra_config.overrides.task))
        log.error("%s failed: %s", name, _cause(error))
        note_outcome(hydra_config, name, FAILED, cause=_cause(error))


def run(cfg: DictConfig, group: str, job: int = 0) -> tuple[dict, bool]:
    """Carry out one run, or find it done; return its record, on disk by then, and which it was.

    A run that raises leaves a record too, with the error, until it succeeds. It does not take the
    place of a finished one. One whose settings are refused leaves none.

    Raises
    ------
    SettingError
        Before anything is loaded, if the settings cannot be meant.
    """
    check_settings(cfg)
    key, name = run_key(cfg), describe(cfg)
    with claim(cfg, key) as record:
        if record is not None:
            log.info("%s: finished already; rerun=true does it again", name)
            return record, True
        if cfg.threads is not None:
            torch.set_num_threads(cfg.threads)
        path, started = record_path(cfg, key), time.perf_counter()
        config = OmegaConf.to_container(cfg, resolve=True)
        about = {"name": name, "group": group, "config": config}
        tags = [cfg.experiment_name, cfg.dataset.name, cfg.model.name, cfg.method.name]
        try:
            with track(cfg.tracking, job_type="compress", tags=tags, **about) as log_to_tracker:
                record = _result(cfg, key, choose_device(cfg.device, job))
                record |= {"state": FINISHED, **about, "provenance": provenance()}
                record["seconds"] = round(time.perf_counter() - started, 3)
                write_json(path, record)
                log_to_tracker(record["row"], record["layers"])
        except Exception as error:
            earlier = read_record(path)
            if earlier is None or earlier["state"] != FINISHED:
                failure = {"error": _cause(error), "traceback": traceback.format_exc()}
                record = {"state": FAILED, **about, **failure, "provenance": provenance()}
                write_json(path, record)
            raise
    row = record["row"]
    log.info(
        "%s: kept %.2f %% of the weights, %.2f %% of the bytes; accuracy %.2f %%, dense %.2f %%; "
        "worst violation %.1e, worst gap %.1e (%s); %.1f s -> %s",
        name,
        100 * row["kept_fraction"],
        100 * row["bytes_stored"] / row["bytes_dense"],
        row["accuracy"],
        row["accuracy_dense"],
        row["worst_violation"],
        row["worst_relative_gap"],
        row["status"],
        row["seconds"],
        path,
    )
    return record, False


def _result(cfg: DictConfig, key: str, device: torch.device) -> dict:
    prepared = prepare(cfg, device)
    with layer_bar(cfg, describe(cfg), len(prepared.captured.layers)) as on_layer:
        compressed = compressed_as_configured(cfg, prepared, device, on_layer)
    row = {
        "run": key,
        **choices(cfg),
        **judge(prepared, compressed),
        **_goal_measures(compressed.goal),
        "seconds": round(sum(report.seconds for report in compressed.layers), 3),
        "chosen_by_factors": False,
    }
    errors = layer_errors(prepared.judged, compressed)
    layers = [
        _layer_row(key, choices(cfg), report) | {"relative_error_held_out": errors[report.name]}
        for report in compressed.layers
    ]
    return {"row": row, "layers": layers, "checkpoint": prepared.checkpoint}


def compressed_as_configured(
    cfg: DictConfig,
    prepared: Prepared,
    device: torch.device,
    on_layer: Callable[[LayerReport], None] | None = None,
    tolerances: Mapping[str, float] | None = None,
) -> CompressionResult:
    """The compressed network of a run; without its goal's search where its tolerances are known."""
    searched = tolerances is None and goal_of(cfg)[0] != ONE_TOLERANCE
    solve_cache = (
        DiskSolveCache(Path(cfg.cache_dir), cfg.cache.limit_gib) if cfg.cache.enabled else None
    )
    return compress_as_configured(
        cfg.method,
        prepared.network,
        prepared.captured,
        goal=network_goal(cfg, prepared, solve_cache, device) if searched else None,
        tolerances=tolerances,
        workers=cfg.workers,
        solve_cache=solve_cache,
        network_refit=_network_refit(cfg, device),
        on_layer=None if searched else on_layer,
    )


def _network_refit(cfg: DictConfig, device: torch.device) -> NetworkRefit | None:
    if cfg.method.get("refit") != "network":
        return None
    how = cfg.network_refit
    return NetworkRefit(
        None if how.samples is None else drawn_inputs(cfg, how.samples, device),
        epochs=how.epochs,
        learning_rate=how.learning_rate,
        temperature=how.temperature,
    )


def network_goal(
    cfg: DictConfig, prepared: Prepared, solve_cache: SolveCache | None, device: torch.device
) -> Goal:
    """The goal of a run, its held-out samples being those that choose settings."""
    name, value = goal_of(cfg)
    tolerances = TOLERANCES if cfg.goal.tolerances is None else tuple(cfg.goal.tolerances)
    held_out = prepared.judged.held_out
    samples = (held_out.images, held_out.labels)
    goal = Goal(**{name: value}, held_out=samples if name in ON_HELD_OUT else None)
    method = method_of(cfg.method)
    if method.one_tolerance:
        return goal  # which is refused
    if cfg.goal.allocation == "energy":
        return dataclasses.replace(goal, options=energy_options(prepared.captured))
    options = remembered_options(
        cfg,
        device,
        lambda: layer_options(
            prepared.network,
            prepared.captured,
            method,
            walk_of(cfg.method, workers=cfg.workers, solve_cache=solve_cache),
            tolerances,
            output="classes",
            largest=None
            if cfg.goal.largest_layer is None
            else cfg.goal.largest_layer * prepared.captured.weights,
        ),
    )
    adding = {"measured": "divergences", "roots": "roots"}[cfg.goal.allocation]
    if not cfg.goal.trials:
        return dataclasses.replace(goal, options=options, adding=adding)
    networks = Networks(
        prepared.network,
        prepared.captured,
        method,
        whole_walk_of(cfg.method, workers=cfg.workers, solve_cache=solve_cache),
        output="classes",
    )
    shares = cfg.goal.trial_sizes
    allocations = remembered_allocations(
        cfg,
        device,
        lambda: measured_allocations(
            networks,
            options,
            frontier(options, adding),
            trials=cfg.goal.trials,
            sizes=tuple(share * prepared.captured.weights for share in shares),
        ),
    )
    return dataclasses.replace(goal, options=options, adding=adding, allocations=allocations)


def _goal_measures(report: GoalReport | None) -> dict:
    """How a goal was met; nothing for a run without one."""
    if report is None:
        return {}
    low, high = report.interval or (None, None)
    return {
        "goal_measured": report.measured,
        "goal_low": low,
        "goal_high": high,
        "goal_met": report.met,
        "networks_tried": report.tried,
    }


def judge(prepared: Prepared, compressed: CompressionResult) -> dict:
    """Size, accuracy and certificates of a compressed network, measured alike for all methods."""
    dense, dense_held_out = prepared.judged.accuracy, prepared.judged.accuracy_held_out
    after = accuracy(compressed.model, prepared.judged.test)
    held_out = accuracy(compressed.model, prepared.judged.held_out)
    names = [report.name for report in compressed.layers]
    statuses = sorted({report.status.value for report in compressed.layers} - {"converged"})
    return {
        **size_measures(prepared.network, compressed.model, names),
        "accuracy_dense": round(dense, 4),
        "accuracy": round(after, 4),
        "accuracy_drop": round(dense - after, 4),
        "accuracy_dense_held_out": round(dense_held_out, 4),
        "accuracy_held_out": round(held_out, 4),
        "accuracy_drop_held_out": round(dense_held_out - held_out, 4),
        **output_measures(prepared.judged, compressed),
        "output_bound": ddlr.output_bound(prepared.network, compressed, prepared.captured),
        "worst_violation": max(report.violation for report in compressed.layers),
        "worst_relative_gap": max(abs(report.relative_gap) for report in compressed.layers),
        "worst_shortfall": max(report.shortfall for report in compressed.layers),
        "status": "+".join(statuses) or "converged",
    }


def _layer_row(key: str, choices: dict, report: LayerReport) -> dict:
    values = asdict(report)
    values["status"] = report.status.value
    values["seconds"] = round(report.seconds, 3)
    name = values.pop("name")
    columns = ("dataset", "model", "method", "constraint", "refit", "order", "seed")
    return {"run": key, **{column: choices[column] for column in columns}, "layer": name, **values}


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    command(main)
