"""A compressed network as a file: safetensors, with its structure as JSON in the metadata.

Nothing of a file is executed or imported, and there is no pickle in it. A hash over all of it finds
damage; it does not say who wrote the file.
"""

import dataclasses
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddlr.compacting import compact as compacted
from ddlr.compacting import sparse_layers, without_sparse_layers
from ddlr.encoding import PARTS, decode, encode
from ddlr.identity import copied
from ddlr.layers import SelectedLinear, SparseLinear, replace_layer
from ddlr.result import CompressionResult
from ddlr.structure import fitted, network_of, structure_of

FORMAT = "ddlr"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileInfo:
    """What a file says of the network in it.

    Attributes
    ----------
    library_version : str
        Of the library that wrote it.
    bytes : int
        The size of the file.
    modules : mapping of name to mapping
        See `ddlr.structure`.
    layers : tuple of mapping
        The fields of each `ddlr.LayerReport`; empty where a network was saved without them.
    goal : mapping, optional
        The fields of the `ddlr.GoalReport`, if there was one.
    """

    library_version: str
    bytes: int
    modules: Mapping[str, Mapping[str, Any]]
    layers: tuple[Mapping[str, Any], ...]
    goal: Mapping[str, Any] | None


# --- writing ---------------------------------------------------------------------------------


def save(
    result_or_model: CompressionResult | nn.Module, path: str | os.PathLike, *, compact: bool = True
) -> None:
    """Write a compressed network to one safetensors file, which `ddlr.load` reads.

    Weights that are zero take no room, nor do inputs and outputs that a layer has no weights for;
    see `ddlr.encoding`. Parameters that are tied are stored once. A file that is there already is
    replaced, as soon as the new one is complete.

    Parameters
    ----------
    result_or_model : CompressionResult or nn.Module
        A result also gives its reports to the file, which `ddlr info` shows.
    path : str or path
        Of the file, such as "small.safetensors".
    compact : bool
        Whether the network is stored as `ddlr.compact` makes it, and loaded so. Otherwise each
        layer comes back in the shape that it has.

    Raises
    ------
    TypeError
        If it is neither a result nor a network.
    ValueError
        If a tensor can not be stored; names it.
    OSError
        If the file can not be written.
    """
    result = result_or_model if isinstance(result_or_model, CompressionResult) else None
    model = result.model if result else result_or_model
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{type(model).__name__} can not be saved; give a CompressionResult or an nn.Module"
        )
    state = model.state_dict(keep_vars=True)
    _check_storable(state)
    # A layer that runs by its nonzeros is an array with zeros here, encoded in the fewest bytes.
    sparse = sparse_layers(compacted(model) if compact else model)
    if sparse_layers(model):
        model = without_sparse_layers(copied(model))
    if compact:
        model = compacted(model, run_sparse=False)
    state = model.state_dict(keep_vars=True)
    tied = _tied(state)
    tensors: dict[str, Tensor] = {}
    encodings: dict[str, str] = {}
    for name, tensor in state.items():
        if name in tied:
            continue
        kind, parts = encode(tensor.detach().cpu())
        tensors |= {_part_name(name, part): each for part, each in parts.items()}
        if kind is not None:
            encodings[name] = kind
    contents = {
        "library_version": _library_version(),
        "modules": structure_of(model),
        "encodings": encodings,
        "tied": tied,
        "sparse": dict.fromkeys(sparse, True),
        "layers": _as_table(result.layers if result else ()),
        "goal": _plain(dataclasses.asdict(result.goal)) if result and result.goal else None,
    }
    text = json.dumps(contents, separators=(",", ":"))
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "sha256": _digest(text, tensors),
        "contents": text,
    }
    with written_whole(Path(path)) as part:
        save_file(tensors, part, metadata)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside a path to write to, which is moved there when all is well, else removed."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _check_storable(state: Mapping[str, Any]) -> None:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name!r} in the network's state is a {type(tensor).__name__}; only tensors can "
                "be saved"
            )
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device, and has no values to save")
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else f"stored as {tensor.layout}"
            raise ValueError(f"{name!r} is {kind}; only dense tensors can be saved")


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same as an earlier one, and the name of that."""
    first: dict[Any, str] = {}
    tied = {}
    for name, tensor in state.items():
        key: Any = id(tensor)
        if tensor.numel():  # a tied parameter may be another object on the same memory
            place = (tensor.device, tensor.data_ptr(), tensor.dtype)
            key = (*place, tuple(tensor.shape), tensor.stride())
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def _part_name(name: str, part: str) -> str:
    return f"{name}:{part}" if part else name


def _library_version() -> str:
    try:
        return version("ddlr")
    except PackageNotFoundError:
        return "not installed"


def _as_table(reports: tuple) -> dict[str, list]:
    """Reports as names of fields and rows of values, since the names would take most room."""
    fields = [each.name for each in dataclasses.fields(reports[0])] if reports else []
    rows = [[_plain(getattr(report, name)) for name in fields] for report in reports]
    return {"fields": fields, "rows": rows}


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers to six digits, and None for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {FORMAT_VERSION} {text}".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f" {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- reading ---------------------------------------------------------------------------------


def load(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Read a network that `ddlr.save` wrote, in evaluation mode.

    Parameters
    ----------
    path : str or path
    model : nn.Module, optional
        A fresh instance of the network as it was before compression, with any weights, also on the
        meta device. It is left untouched. Its own code, and buffers that are not in its state dict,
        are those of the result, which is on the device of its first parameter. Without it, networks
        are made of which all modules are plain ones of `torch.nn`, such as in an `nn.Sequential`,
        on the CPU.

    Returns
    -------
    nn.Module
        With its parameters in the dtypes in which they were saved.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, was not written by `ddlr.save` or by a later version, or if the
        network in it is not that of `model`; names the file, the module and what is wrong.
    """
    with _of_file(path) as file:
        contents, tensors = _read(file)
        structure = contents["modules"]
        device = torch.device("cpu")
        if model is None:
            loaded = network_of(structure)
        else:
            device = _device_of(model)
            loaded = fitted(copied(model), structure)
        state = _state(loaded, contents, tensors)
        state = {name: each.to(device) for name, each in state.items()}
        try:
            loaded.load_state_dict(state, assign=True)
        except RuntimeError as error:  # places of weights that make no sense
            raise ValueError(str(error)) from error
        _tie(loaded, contents["tied"], set(state))
        _check_complete(loaded)
        loaded = _with_sparse_layers(loaded, contents["sparse"])
    return loaded.eval()


def read_info(path: str | os.PathLike) -> FileInfo:
    """What a file says of the network in it. Raises as `load` does."""
    with _of_file(path) as file:
        contents, _ = _read(file)
        table, goal = contents["layers"], contents["goal"]
        layers = tuple(dict(zip(table["fields"], row, strict=True)) for row in table["rows"])
        return FileInfo(
            str(contents["library_version"]),
            file.stat().st_size,
            contents["modules"],
            layers,
            goal,
        )


@contextmanager
def _of_file(path: str | os.PathLike) -> Iterator[Path]:
    """Let errors of what is in a file name the file."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    try:
        yield file
    except (ValueError, TypeError, KeyError, RuntimeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file}: {error}") from error


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents and the stored tensors of a file, which are as they were written."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            _check_format(metadata)
            # Copies: what the reader gives is the memory of the file, as long as that is there.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"it is damaged, or no safetensors file: {error}") from error
    text = metadata.get("contents", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise ValueError("it is damaged: its hash is not that of its contents")
    contents = json.loads(text)
    for name in ("modules", "encodings", "tied", "sparse", "layers"):
        if not isinstance(contents, dict) or not isinstance(contents.get(name), dict):
            raise ValueError(f"its contents have no {name!r}")
    if not all(isinstance(entry, dict) for entry in contents["modules"].values()):
        raise ValueError("its modules are not JSON objects")
    return contents, tensors


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError("it was not written by ddlr.save")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"it has format version {metadata.get('format_version')}, and this version of the "
            f"library reads {FORMAT_VERSION}; take the version that wrote it"
        )


def _state(
    model: nn.Module, contents: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict of a network of the file's structure."""
    encodings, tied, unused = contents["encodings"], contents["tied"], set(tensors)
    state: dict[str, Tensor] = {}
    for name, expected in model.state_dict(keep_vars=True).items():
        source = tied.get(name, name)
        kind = encodings.get(source)
        if kind not in (None, *PARTS):
            raise ValueError(f"tensor {name!r}: this version does not know the encoding {kind!r}")
        names = {part: _part_name(source, part) for part in PARTS.get(kind, ("",))}
        unused -= set(names.values())
        parts = {part: tensors[full] for part, full in names.items() if full in tensors}
        try:
            state[name] = decode(kind, parts, expected)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}") from error
        if state[name].is_floating_point() != expected.is_floating_point():
            raise ValueError(
                f"tensor {name!r}: it has {state[name].dtype} in place of {expected.dtype}"
            )
    if unused:
        raise ValueError(f"tensor {min(unused)!r}: the network has no place for it")
    return state


def _tie(model: nn.Module, tied: Mapping[str, str], names: set[str]) -> None:
    """Make tensors of a network one again; `names` are those of its state."""
    for name, source in tied.items():
        if name not in names or source not in names:
            raise ValueError(f"tensor {name!r} is tied to {source!r}, and these are not both there")
        (module, last), (other, its_last) = (
            (model.get_submodule(each.rpartition(".")[0]), each.rpartition(".")[2])
            for each in (name, source)
        )
        setattr(module, last, getattr(other, its_last))


def _with_sparse_layers(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """The network with those layers run by their nonzeros alone."""
    modules = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | SelectedLinear):
            raise ValueError(f"module {name!r} is said to be a sparse layer, and is none")
        model = replace_layer(model, name, SparseLinear.from_weight(layer.weight, layer.bias))
    return model


def _check_complete(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} is not in the file, and on the meta device in the model; make the model "
                "on a real device"
            )


def _device_of(model: nn.Module) -> torch.device:
    first = next(
        (each for each in [*model.parameters(), *model.buffers()] if not each.is_meta), None
    )
    return torch.device("cpu") if first is None else first.device
