"""What the command line is given: networks by a function that builds them, samples, methods."""

import importlib
import os
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from ddlr.calls import call
from ddlr.compression import METHODS
from ddlr.method import Method

_BATCH = 1000


class UsageError(Exception):
    """What is wrong with the command, an option or a file, in words."""


# --- networks --------------------------------------------------------------------------------


def built(factory: str) -> nn.Module:
    """The network that a function of the user's builds; runs the user's code.

    Parameters
    ----------
    factory : str
        "package.module:function", found from the current folder or where packages are installed.
        The function is called without arguments.
    """
    module_name, colon, name = factory.partition(":")
    if not (colon and module_name and name):
        raise UsageError(f"--factory is {factory!r}; it must be package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"--factory: {module_name} can not be imported: {error!r}") from error
    build = getattr(module, name, None)
    if not callable(build):
        raise UsageError(f"--factory: {module_name} has no function {name!r}")
    try:
        model = build()
    except Exception as error:
        raise UsageError(f"--factory: {factory} raised {error!r}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"--factory: {factory} gave a {type(model).__name__}, no nn.Module")
    return model


def with_weights(model: nn.Module, path: Path) -> nn.Module:
    """The network with the weights of a safetensors file, in evaluation mode."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    try:
        load_model(model, path)
    except SafetensorError as error:
        raise UsageError(
            f"{path}: it is damaged, or no safetensors file ({error}); make one by "
            "safetensors.torch.save_model(network, path)"
        ) from error
    except RuntimeError as error:
        raise UsageError(f"{path}: its weights are not those of --factory: {error}") from error
    return model.eval()


# --- samples ---------------------------------------------------------------------------------


def read_samples(
    path: Path, option: str, model: nn.Module
) -> tuple[Tensor | dict[str, Tensor], Tensor | None]:
    """Network inputs and labels from an .npz file, which the network takes.

    Returns
    -------
    inputs : Tensor or dict of Tensor
        The array ``inputs``; or by name all arrays but ``labels``, which are the keyword arguments
        of the network. Real numbers are in the type of the network's weights.
    labels : Tensor or None
        The array ``labels``.
    """
    arrays = _arrays(path, option)
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), None)
    tensors = {}
    for name, array in arrays.items():
        try:
            tensor = torch.from_numpy(array)
        except TypeError as error:
            raise UsageError(
                f"{option} {path}: array {name!r} is not of numbers: {error}"
            ) from error
        if name != "labels" and tensor.is_floating_point() and dtype is not None:
            tensor = tensor.to(dtype)
        tensors[name] = tensor
    lengths = {name: len(each) if each.ndim else None for name, each in tensors.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values() or 0 in lengths.values():
        raise UsageError(
            f"{option} {path}: its arrays must have one row for each of the same samples; they "
            f"have {lengths}"
        )
    labels = tensors.pop("labels", None)
    if not tensors:
        raise UsageError(f"{option} {path}: it must have an array 'inputs'")
    inputs = tensors["inputs"] if set(tensors) == {"inputs"} else tensors
    try:
        with torch.no_grad():
            call(model, few(inputs, 2))
    except Exception as error:
        shapes = {name: tuple(each.shape) for name, each in tensors.items()}
        raise UsageError(
            f"{option} {path}: the network does not take inputs of shapes {shapes}: {error}"
        ) from error
    return inputs, labels


def few(inputs: Tensor | dict[str, Tensor], number: int) -> Tensor | dict[str, Tensor]:
    """The first samples."""
    if isinstance(inputs, Tensor):
        return inputs[:number]
    return {name: each[:number] for name, each in inputs.items()}


def _arrays(path: Path, option: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UsageError(f"{option} {path}: there is no such file")
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("it has one array alone, as .npy files have")
        with opened:
            return dict(opened)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{option} {path}: it must be an .npz file, of numpy.savez: {error}"
        ) from error


def as_calibration(inputs: Tensor | Mapping[str, Tensor]) -> Tensor | list[dict[str, Tensor]]:
    """Inputs as `ddlr.compress` takes them: several by keyword are split into batches."""
    return inputs if isinstance(inputs, Tensor) else _batches(inputs)


def as_held_out(
    inputs: Tensor | Mapping[str, Tensor], labels: Tensor | None
) -> Tensor | tuple | list:
    """Inputs, and labels if there are any, as `ddlr.Goal` takes them."""
    if isinstance(inputs, Tensor):
        return inputs if labels is None else (inputs, labels)
    batches = _batches(inputs)
    return batches if labels is None else list(zip(batches, labels.split(_BATCH), strict=True))


def _batches(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    split = {name: each.split(_BATCH) for name, each in inputs.items()}
    count = len(next(iter(split.values())))
    return [{name: parts[place] for name, parts in split.items()} for place in range(count)]


# --- methods ---------------------------------------------------------------------------------


def methods() -> dict[str, object]:
    """Methods of this library, and names of those that installed packages add, as nettrim does.

    These are entry points of the group ``ddlr.methods``, each a `ddlr.Method`.
    """
    return {**METHODS, **{each.name: each for each in entry_points(group="ddlr.methods")}}


def method_of(name: str) -> Method:
    method = methods()[name]
    return method if isinstance(method, Method) else method.load()
