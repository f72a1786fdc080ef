"""What all runs on one network and calibration set begin from: network, data, activations.

``prepare`` computes it once for each network, seed and calibration set. The latest stays in memory
for the next run of the same process; activations and their eigenvectors are kept on disk for other
processes. What comes from the disk is, bit for bit, what would be computed without it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ddlr import CapturedLayers, capture_layers
from ddlr.captured import CapturedLayer, LayerInputs
from experiments.configuration import build
from experiments.data import Dataset, Split, data_sha256
from experiments.metrics import Judged, judge_dense, predict
from experiments.networks import split_at_first_linear
from experiments.runs.checkpoints import load_checkpoint
from experiments.runs.locking import locked
from experiments.runs.records import file_sha256, identity
from experiments.runs.storage import entry_lock, entry_path, load_tensors, store_tensors
from experiments.runs.units import network_path

# To be raised when the content of an entry, or how it is computed, changes.
_FORMAT = 5


@dataclass(frozen=True)
class Prepared:
    """A network, loaded, with what all its compressions on one calibration set begin from.

    `network` begins at the first fully connected layer: what comes before is the same for all
    methods, and is applied to the images once.
    """

    network: nn.Sequential
    checkpoint: dict
    captured: CapturedLayers
    judged: Judged


# Of this process: the latest preparation, drawn inputs and data set, each under its key.
_latest: dict[str, Prepared] = {}
_latest_drawn: dict[str, Tensor] = {}
_latest_dataset: dict[str, Dataset] = {}


def forget() -> None:
    """Let go of what is in memory: what follows begins as in a new process."""
    _latest.clear()
    _latest_drawn.clear()
    _latest_dataset.clear()


def prepare(cfg: DictConfig, device: torch.device) -> Prepared:
    """Load or compute what a run starts from; with ``cache.enabled=false`` always compute it."""
    if not cfg.cache.enabled:
        return _prepare(cfg, device, capture_layers)
    if not network_path(cfg).is_file():
        load_network(cfg, device)  # raises, and says how the checkpoint is made
    key = content_key(cfg, device)
    in_memory = f"{key} on {device}"
    if in_memory not in _latest:
        folder = Path(cfg.cache_dir)
        path = entry_path(folder, key)

        def capture_once(network: nn.Sequential, calibration: Tensor) -> CapturedLayers:
            with locked(entry_lock(folder, key)):
                captured = load_captured(path, network, calibration, device)
                if captured is None:
                    captured = capture_layers(network, calibration)
                    store_captured(path, captured, cfg.cache.limit_gib)
            return captured

        _latest.clear()
        _latest[in_memory] = _prepare(cfg, device, capture_once)
    return _latest[in_memory]


def _prepare(
    cfg: DictConfig,
    device: torch.device,
    captures: Callable[[nn.Sequential, Tensor], CapturedLayers],
) -> Prepared:
    whole, checkpoint = load_network(cfg, device)
    before, network = split_at_first_linear(whole)
    dataset = _dataset(cfg.dataset)
    calibration, test, held_out = (
        predict(before, images)
        for images in (
            dataset.calibration(cfg.calibration_samples, cfg.seed),
            dataset.test.images,
            dataset.held_out.images,
        )
    )
    captured = captures(network, calibration)
    splits = Split(test, dataset.test.labels), Split(held_out, dataset.held_out.labels)
    return Prepared(network, checkpoint, captured, judge_dense(network, captured, *splits))


def drawn_inputs(cfg: DictConfig, samples: int, device: torch.device) -> Tensor:
    """What the first fully connected layer gets, for samples drawn as those of calibration are."""
    key = f"{samples} for {content_key(cfg, device)} on {device}"
    if key not in _latest_drawn:
        before, _ = split_at_first_linear(load_network(cfg, device)[0])
        drawn = predict(before, _dataset(cfg.dataset).calibration(samples, cfg.seed))
        _latest_drawn.clear()
        _latest_drawn[key] = drawn
    return _latest_drawn[key]


def load_network(cfg: DictConfig, device: torch.device) -> tuple[nn.Module, dict]:
    """The trained network that a config names, and the description of its checkpoint."""
    network = build(cfg.model)
    command = (
        f"python -m experiments.train_baseline model={cfg.model.name} "
        f"dataset={cfg.dataset.name} seed={cfg.seed}"
    )
    checkpoint = load_checkpoint(network_path(cfg), network, command)
    return network.to(device), checkpoint


def _dataset(node: DictConfig) -> Dataset:
    key = identity(OmegaConf.to_container(node, resolve=True))
    if key not in _latest_dataset:
        _latest_dataset.clear()
        _latest_dataset[key] = instantiate(node)
    return _latest_dataset[key]


def content_key(cfg: DictConfig, device: torch.device) -> str:
    """A hash of all that decides the activations and their eigenvectors, to the last bit.

    Hence the number of threads, the kind of device and the version of torch: each can change how
    sums are rounded.
    """
    model = OmegaConf.to_container(cfg.model, resolve=True)
    model.pop("training")
    return identity(
        {
            "format": _FORMAT,
            "model": model,
            "checkpoint": file_sha256(network_path(cfg)),
            "data": data_sha256(cfg.dataset.name),
            "held_out": cfg.dataset.held_out,
            "seed": cfg.seed,
            "calibration_samples": cfg.calibration_samples,
            "threads": torch.get_num_threads(),
            "device": device.type,
            "torch": torch.__version__,
        }
    )


def load_captured(
    path: Path, network: nn.Module, calibration: Tensor, device: torch.device
) -> CapturedLayers | None:
    """The captured layers of the network, or None where there is no whole entry."""
    entry = load_tensors(path, device)
    if entry is None:
        return None
    tensors, about = entry
    layers = []
    for index, (name, activation, by_row) in enumerate(json.loads(about["layers"])):
        original = network.get_submodule(name)
        weight = original.weight.detach()
        bias = weight.new_zeros(len(weight)) if original.bias is None else original.bias.detach()
        inputs, targets = (tensors[f"{index}.{part}"] for part in ("inputs", "targets"))
        vectors = tensors[f"{index}.eigenvectors"]
        eigen = (tensors[f"{index}.eigenvalues"], vectors if by_row else vectors.T)
        shared = LayerInputs(inputs, eigen)
        layers.append(CapturedLayer(name, inputs, targets, activation, weight, bias, shared=shared))
    return CapturedLayers(tuple(layers), (calibration,))


def store_captured(path: Path, captured: CapturedLayers, limit_gib: float) -> None:
    """Keep what was captured, up to the limit of the cache."""
    tensors, layers = {}, []
    for index, layer in enumerate(captured.layers):
        values, vectors = layer.live_inputs.eigen
        # How a matrix lies in memory is kept too, since products are rounded accordingly.
        by_row = vectors.is_contiguous()
        vectors = vectors if by_row else vectors.T
        layers.append((layer.name, layer.activation, by_row))
        tensors[f"{index}.inputs"] = layer.inputs
        tensors[f"{index}.targets"] = layer.targets
        tensors[f"{index}.eigenvalues"] = values
        tensors[f"{index}.eigenvectors"] = vectors
    store_tensors(path, tensors, {"layers": json.dumps(layers)}, limit_gib)
