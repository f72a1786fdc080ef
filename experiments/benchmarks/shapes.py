"""Time of a solve against the shape of a layer, up to the heads of VGG-16 and AlexNet."""

import itertools
import logging

import torch
from omegaconf import DictConfig

from experiments.benchmarks.layers import data_bytes, made_up_layer
from experiments.benchmarks.timing import SOLVERS, timed_solve

log = logging.getLogger(__name__)


def growth(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Time against in_features, out_features and samples."""
    settings = cfg.growth
    rows = []
    for norm, shape in itertools.product(SOLVERS, settings.layers):
        layer = made_up_layer(*shape, device=device)
        rows.append(timed_solve(layer, norm, settings.relative_tolerance, settings.gap))
        rows[-1]["case"] = "growth"
        log.info("%s %s: %.2f s", norm, list(shape), rows[-1]["seconds"])
    return rows


def large_layers(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Layers of the size of VGG-16's and AlexNet's heads."""
    rows = []
    for norm, shape in itertools.product(SOLVERS, cfg.large.layers):
        layer = made_up_layer(*shape, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        row = timed_solve(layer, norm, cfg.large.relative_tolerance, cfg.large.gap, repetitions=1)
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            row["data_bytes"] = data_bytes(layer)
        rows.append({**row, "case": "large"})
        log.info("%s %s: %.1f s, gap %.1e", norm, list(shape), row["seconds"], row["relative_gap"])
    return rows
