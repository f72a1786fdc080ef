"""Work that the runs of a sweep share: network, data, activations, eigenvectors and solves.

``prepare`` computes them once for each network, seed and calibration set. The latest stays in
memory for the next run of the same process; a copy on disk serves other processes. Entries are
named by a hash of everything that decides their content, so a changed checkpoint or data set makes
another entry and an old one is never taken for it. What comes out of the cache is, bit for bit,
what would be computed without it. `SolveMemory` keeps the solves of layers in the same way, so that
a refit, or a cascade, begins with what another run has solved.

python -m experiments.cache             # what is in it
python -m experiments.cache clear=true  # remove it
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddlr import (
    CapturedLayers,
    CentredInputs,
    SolverResult,
    SolverStatus,
    capture_layers,
)
from ddlr.captured import CapturedLayer, LayerInputs
from ddlr.goals import Option
from ddlr.method import LayerProblem
from experiments.configuration import CONFIG_PATH, build
from experiments.data import Dataset, Split, data_sha256
from experiments.methods.configured import layer_refit
from experiments.metrics import Judged, judge_dense, predict
from experiments.networks import split_at_first_linear
from experiments.runs.checkpoints import load_checkpoint
from experiments.runs.locking import locked
from experiments.runs.records import PARTIAL, file_sha256, identity, write_json, write_whole
from experiments.runs.units import network_path

log = logging.getLogger(__name__)

# To be raised when the content of an entry, or how it is computed, changes.
_FORMAT = 5
_OPTIONS_FORMAT = 6
_KINDS = (".safetensors", ".json", PARTIAL)
_GIB = 2**30


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


# Of this process: the latest preparation and the latest data set, each under its key.
_latest: dict[str, Prepared] = {}
_latest_dataset: dict[str, Dataset] = {}


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
        path = folder / f"{key}.safetensors"

        def capture_once(network: nn.Sequential, calibration: Tensor) -> CapturedLayers:
            # Of several processes that start with the same network, one computes.
            with locked(folder / "locks" / f"{key}.lock"):
                captured = load_entry(path, network, calibration, device)
                if captured is None:
                    captured = capture_layers(network, calibration)
                    store_entry(path, captured, cfg.cache.limit_gib)
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


def load_entry(
    path: Path, network: nn.Module, calibration: Tensor, device: torch.device
) -> CapturedLayers | None:
    """The captured layers of the network, or None where there is no whole entry."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            # Cloned: a tensor in the middle of a file may lie across the boundaries that torch
            # aligns to, and sums are then grouped, and rounded, otherwise.
            tensors = {name: file.get_tensor(name).clone().to(device) for name in file.keys()}
        os.utime(path)  # the latest use, by which `_make_room` goes
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be read and is computed anew: %s", path, error)
        return None
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


def store_entry(path: Path, captured: CapturedLayers, limit_gib: float) -> None:
    """Keep an entry, unless it alone is over the limit; older ones make room for it.

    A disk that is full costs a warning, not the run.
    """
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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _store(path, tensors, {"layers": json.dumps(layers)}, limit_gib)


def _store(path: Path, tensors: dict[str, Tensor], about: dict[str, str], limit_gib: float) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    limit = limit_gib * _GIB
    if size > limit:
        log.warning("an entry of the cache takes %.1f GiB, over cache.limit_gib", size / _GIB)
        return
    try:
        _make_room(path.parent, limit - size)
        write_whole(path, lambda scratch: save_file(tensors, scratch, metadata=about))
    except (OSError, SafetensorError) as error:
        log.warning("an entry of the cache is not kept on disk: %s", error)


def remembered_options(
    cfg: DictConfig, device: torch.device, compute: Callable[[], dict[str, list[Option]]]
) -> dict[str, list[Option]]:
    """The sizes and effects of each layer alone, computed once for all goals of a method."""
    if not cfg.cache.enabled:
        return compute()
    method = OmegaConf.to_container(cfg.method, resolve=True)
    # Layers are tried one by one, with the refit that each can have alone.
    method.pop("relative_tolerance")
    method.pop("order", None)
    method |= {"refit": layer_refit(cfg.method)}
    about = {"of": content_key(cfg, device), "method": method}
    tolerances = OmegaConf.to_container(cfg.goal).get("tolerances")
    key = identity({**about, "tolerances": tolerances, "format": _OPTIONS_FORMAT})
    path = Path(cfg.cache_dir) / f"{key}.json"
    with locked(path.parent / "locks" / f"{key}.lock"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {name: [Option(**each) for each in found[name]] for name in found}
        except FileNotFoundError:
            options = compute()
        except (ValueError, TypeError) as error:
            log.warning("%s cannot be read and is computed anew: %s", path, error)
            options = compute()
        write_json(path, {name: [asdict(each) for each in options[name]] for name in options})
    return options


def entries(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of the cache, and what killed processes left, the longest unused first."""
    found = []
    for path in (path for kind in _KINDS for path in folder.glob(f"*{kind}")):
        try:
            found.append((path, path.stat()))
        except FileNotFoundError:  # another process made room
            continue
    return sorted(found, key=lambda entry: entry[1].st_mtime)


def _make_room(folder: Path, limit: float) -> None:
    kept = entries(folder)
    total = sum(about.st_size for _, about in kept)
    for path, about in kept:
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= about.st_size


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


@dataclass(frozen=True)
class SolveMemory:
    """Keeps solves and refits of layers on disk, under a hash of all that decides them.

    To be given as `solve_cache` of `ddlr.Settings`. A solve that did not converge is
    not kept. What is remembered has no dual variable, which nobody asks for by then.
    """

    folder: Path
    limit_gib: float

    def __call__(self, compute: Callable[..., SolverResult], *arguments, **options) -> SolverResult:
        key = identity(
            {
                "format": _FORMAT,
                "call": [_content(value) for value in (compute, arguments, options)],
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
        path = self.folder / f"{key}.safetensors"
        with locked(self.folder / "locks" / f"{key}.lock"):
            # The inputs say on which device; those of a layer are all on one.
            solved = _load_solve(path, _device(arguments))
            if solved is None:
                solved = compute(*arguments, **options)
                _store_solve(path, solved, self.limit_gib)
        return solved


def _content(value):
    """All of a value that can decide a result, as JSON; tensors by their hash."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Tensor):
        values = value.detach().cpu().contiguous()
        about = [str(value.dtype), list(value.shape), value.device.type]
        return [*about, hashlib.sha256(values.numpy().tobytes()).hexdigest()]
    if isinstance(value, SolverResult):
        return [value.status.value, _content(value.weight), _content(value.bias)]
    if is_dataclass(value):
        return {field.name: _content(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _content(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_content(item) for item in value]
    if isinstance(value, partial):
        return [_content(part) for part in (value.func, value.args, value.keywords)]
    return f"{value.__module__}.{value.__qualname__}"  # a function


def _device(arguments: tuple) -> torch.device:
    problem = next(value for value in arguments if isinstance(value, CentredInputs | LayerProblem))
    return (problem if isinstance(problem, CentredInputs) else problem.inputs).inputs.device


_SOLVE_NUMBERS = (
    "objective",
    "lower_bound",
    "relative_gap",
    "violation",
    "shortfall",
    "seconds",
)


def _load_solve(path: Path, device: torch.device) -> SolverResult | None:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            weight, bias = (file.get_tensor(name).clone().to(device) for name in ("weight", "bias"))
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be read and is solved anew: %s", path, error)
        return None
    numbers = {name: float.fromhex(about[name]) for name in _SOLVE_NUMBERS}
    return SolverResult(
        weight=weight,
        bias=bias,
        status=SolverStatus(about["status"]),
        iterations=int(about["iterations"]),
        dual=weight.new_empty(0),
        **numbers,
    )


def _store_solve(path: Path, solved: SolverResult, limit_gib: float) -> None:
    about = {name: float(getattr(solved, name)).hex() for name in _SOLVE_NUMBERS}
    about |= {"status": solved.status.value, "iterations": str(solved.iterations)}
    tensors = {name: getattr(solved, name).detach().cpu() for name in ("weight", "bias")}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _store(path, tensors, about, limit_gib)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="cache")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.cache_dir)
    kept = entries(folder)
    size = sum(about.st_size for _, about in kept) / _GIB
    if cfg["clear"]:  # an attribute of that name is a method
        for path, _ in kept:
            path.unlink(missing_ok=True)
        log.info("removed %d entries, %.2f GiB, from %s", len(kept), size, folder)
        return
    log.info("%s: %d entries, %.2f GiB; clear=true removes them", folder, len(kept), size)


if __name__ == "__main__":
    main()
