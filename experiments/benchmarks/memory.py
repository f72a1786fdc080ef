"""Peak memory of a solve, in a process of its own. Read from /proc, so on Linux only."""

import logging
import multiprocessing
import tempfile
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from ddlr import WarmStart
from experiments.benchmarks.layers import Layer, data_bytes, trained_layer
from experiments.benchmarks.timing import SOLVERS

log = logging.getLogger(__name__)


def memory(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Peak memory of a solve, the data included, against the bytes of inputs and targets."""
    layer = trained_layer(cfg, device, cfg.memory.samples)
    radius = layer.radius(cfg.layer.relative_tolerance)
    rows = []
    for norm in SOLVERS:
        peak = peak_bytes(layer, norm, radius, cfg.layer.gap)
        row = {"norm": norm, **layer.shape, "data_bytes": data_bytes(layer), "peak_bytes": peak}
        rows.append({"case": "memory", "solver": "ours", **row})
        log.info("%s: peak of %.2f times the data", norm, peak / data_bytes(layer))
    return rows


def peak_bytes(layer: Layer, norm: str, radius: float, gap: float) -> int:
    """Peak resident memory of one solve in a process of its own, beyond what that starts with.

    The data count as part of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        tensors = {"inputs": layer.inputs, "targets": layer.targets, "weight": layer.start.weight}
        tensors |= {"bias": layer.start.bias}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            grown = pool.apply(_grown_bytes, (path, norm, radius, layer.activation, gap))
    return grown + data_bytes(layer)


def _grown_bytes(path: Path, norm: str, radius: float, activation: str, gap: float) -> int:
    """How far a solve takes the resident memory of this process, its data apart."""
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    small = torch.randn(64, 64)
    (small @ small).sum(), torch.linalg.eigh(small @ small.T)  # loads what libraries load lazily
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    SOLVERS[norm](
        tensors["inputs"],
        tensors["targets"],
        radius,
        activation=activation,
        tolerance=gap,
        warm_start=WarmStart(tensors["weight"], tensors["bias"]),
    )
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    """Memory of this process, now (VmRSS) or at its peak (VmHWM), as Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])
