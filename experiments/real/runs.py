"""One network, one method, one size: compress, judge, and measure what that took."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import ddlr
from ddlr import CompressionResult, Goal, Settings
from ddlr.captured import CapturedLayers
from experiments.configuration import given_goals
from experiments.methods.configured import method_of
from experiments.metrics import size_measures
from experiments.real.allocation import MeasuredOptions, Options
from experiments.real.network import RealNetwork
from experiments.runs.records import identity


def compressed_rows(cfg: DictConfig) -> list[dict]:
    """Compress a network as `conf/real.yaml` says; the row of `results/real.csv`.

    `choices` of the run, then

    parameters_dense, parameters_kept, kept_fraction
        Weights of the layers that are compressed; no biases.
    file_bytes_dense, file_bytes
        The whole network's file by `ddlr.save`, as it was and compressed.
    measure, quality_choosing, quality
        On the samples for choosing and on those for judging, see `RealNetwork`.
    seconds_capture, seconds_search, seconds
        Of the capture, of what the allocation took (0 where another run had measured it), and of
        the compression after both, by the wall clock.
    peak_memory_bytes
        Resident, of the whole process.
    worst_status
        "converged", or how the solve ended that came off worst.
    """
    torch.set_num_threads(cfg.threads)
    network = instantiate(cfg.network)
    result, took = timed_compression(cfg, network)
    sizes = size_measures(network.model, result.model, [layer.name for layer in result.layers])
    row = {
        **choices(cfg),
        "measure": network.measure,
        **{name: sizes[name] for name in ("parameters_dense", "parameters_kept", "kept_fraction")},
        "file_bytes_dense": file_bytes(network.model),
        "file_bytes": file_bytes(result.model),
        "quality_choosing": network.quality_of(result.model, network.data.choosing),
        "quality": network.quality_of(result.model, network.data.judging),
        **took,
        "peak_memory_bytes": peak_memory(),
        "worst_status": max((str(each.status) for each in result.layers), key=_STATUSES.index),
    }
    return [row]


def timed_compression(cfg: DictConfig, network: RealNetwork) -> tuple[CompressionResult, dict]:
    """Compress a network as a config says; and the seconds that it took, see `compressed_rows`."""
    started = time.perf_counter()
    captured = ddlr.capture_layers(
        network.model, network.data.calibration, layers=network.layers, forward=network.forward
    )
    took = {"seconds_capture": time.perf_counter() - started}
    started = time.perf_counter()
    options = _options(cfg, network)
    took["seconds_search"] = time.perf_counter() - started
    started = time.perf_counter()
    result = _compressed(cfg, network, captured, options)
    took["seconds"] = time.perf_counter() - started
    return result, took


# From best to worst.
_STATUSES = ("unchanged", "closed_form", "converged", "fitted", "refitted", "iteration_limit")


def choices(cfg: DictConfig) -> dict:
    """What a run is known by: its settings that decide the result."""
    goals = given_goals(cfg.goal)
    [(goal, wanted)] = goals.items() if goals else [("relative_tolerance", None)]
    method = cfg.method
    return {
        "network": cfg.network_name,
        "method": method.name,
        "refit": method.get("refit", "none"),
        "order": method.get("order", "parallel"),
        "cascade_bound": method.get("cascade_bound", "tolerance"),
        "ridge": method.get("ridge"),
        "goal": goal,
        "wanted": method.relative_tolerance if wanted is None else wanted,
        "calibration_samples": cfg.network.calibration_samples,
        "seed": cfg.network.seed,
        "settings": identity(_deciding(cfg)),
    }


def _deciding(cfg: DictConfig) -> dict:
    names = ("network", "method", "goal", "search")
    return {name: OmegaConf.to_container(cfg[name], resolve=True) for name in names}


def in_fresh_process(function: Callable[[DictConfig], list[dict]], cfg: DictConfig) -> list[dict]:
    """Call a function in a process of its own, so that memory is that of this run alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (cfg,))


def file_bytes(model: nn.Module) -> int:
    """The size of a network's file, as `ddlr.save` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        ddlr.save(model, path)
        return path.stat().st_size


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _options(cfg: DictConfig, network: RealNetwork) -> Options | None:
    """What the allocation goes by; None where all layers have one tolerance."""
    if not given_goals(cfg.goal):
        return None
    made_by = {name: _deciding(cfg)[name] for name in ("network", "search")}
    del made_by["network"]["calibration_samples"]  # the first of them stay the same
    del made_by["search"]["tolerances"]  # measured one by one
    path = Path(cfg.output_dir) / "real" / f"options_{identity(made_by)}.json"
    measured = MeasuredOptions(path, made_by)
    return measured.at(list(cfg.search.tolerances), network, method_of(cfg.search.method))


def _compressed(
    cfg: DictConfig, network: RealNetwork, captured: CapturedLayers, options: Options | None
) -> CompressionResult:
    goals = given_goals(cfg.goal)
    node = cfg.method
    return ddlr.compress_network(
        network.model,
        captured,
        method_of(node),
        relative_tolerance=None if goals else node.relative_tolerance,
        goal=Goal(**goals, options=options) if goals else None,
        refit=node.get("refit", "none"),
        order=node.get("order", "parallel"),
        output=network.output,
        settings=Settings(
            cascade_bound=node.get("cascade_bound", "tolerance"), raise_on_failure=False
        ),
    )
