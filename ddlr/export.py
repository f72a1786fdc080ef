"""A network as an ONNX file, which is run and compared with the network before it is kept."""

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ddlr.calls import call
from ddlr.compacting import compact, without_sparse_layers
from ddlr.identity import copied
from ddlr.result import CompressionResult

# How far outputs of ONNX Runtime may be off, relative to the largest.
TOLERANCE = 1e-4
_TOLERANCE_OF_HALF = 1e-2
# Above it weights go to a file beside, since a message of ONNX has 2 GiB at most.
_MOST_BYTES = 1_800_000_000


def to_onnx(
    model: nn.Module | CompressionResult,
    example: Tensor | Sequence | Mapping[str, Any],
    path: str | os.PathLike,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    dynamic_batch: bool = True,
    check: bool = True,
) -> None:
    """Write a network to an ONNX file, in evaluation mode.

    Any network that `torch.export` takes, not only a compressed one; `ddlr.compact` makes the file
    smaller. Weights of more than 1.8 GB go to a file beside, ``<path>.data``.

    Parameters
    ----------
    model : nn.Module or CompressionResult
    example : Tensor, sequence or mapping
        Network inputs: one tensor; positional arguments; or keyword arguments. Inputs of the file
        are called "input", "input_0" and so on, or as the keywords; outputs likewise.
    path : str or path
    forward : callable, optional
        ``(model, example)`` to the output, if the network is called in another way.
    dynamic_batch : bool
        Whether the file takes any number of samples: the first dimension of all tensors that have
        there as many as the first.
    check : bool
        Whether the file is run by ONNX Runtime, on the example and on other numbers of samples,
        among them one, and compared with the network. The largest difference must be at most 1e-4
        of the largest output (1e-2 in half precision).

    Raises
    ------
    ImportError
        If onnx, onnxscript or onnxruntime is not installed.
    TypeError
        If the example has no tensor, or the output has none.
    RuntimeError
        If the network can not be exported, or the file gives other outputs; nothing is written.
    """
    _need("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    if isinstance(model, CompressionResult):
        model = compact(model.model, run_sparse=False)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if isinstance(example, Mapping):
        example = dict(example)  # also what tokenisers give
    called = _Called(without_sparse_layers(copied(model)).cpu(), example, forward).eval()
    tensors = called.tensors(example)
    samples = len(tensors[0]) if tensors[0].ndim else 1
    batched = [dynamic_batch and each.ndim > 0 and len(each) == samples for each in tensors]
    if dynamic_batch and samples < 2:  # a dimension of 1 would be taken for a constant
        tensors = _of_samples(tensors, batched, 2)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / path.name
        _write(called, tensors, batched, file)
        if check:
            for number in dict.fromkeys((samples, samples + 1, 1) if any(batched) else (samples,)):
                _compare(called, _of_samples(tensors, batched, number), batched, file)
        for part in sorted(Path(folder).iterdir(), key=lambda each: each == file):
            os.replace(part, path.with_name(part.name))


class _Called(nn.Module):
    """A network as a function of tensors to a tuple of tensors."""

    def __init__(self, model: nn.Module, example: Any, forward: Callable | None):
        super().__init__()
        self.model, self.forward_of = model, forward
        leaves, self.spec = pytree.tree_flatten(example)
        self.constants = [None if isinstance(each, Tensor) else each for each in leaves]
        self.places = [place for place, each in enumerate(leaves) if isinstance(each, Tensor)]
        if not self.places:
            raise TypeError(f"example is a {type(example).__name__} without a tensor in it")

    def tensors(self, example: Any) -> list[Tensor]:
        leaves = pytree.tree_leaves(example)
        return [leaves[place].detach().cpu() for place in self.places]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        example = pytree.tree_unflatten(leaves, self.spec)
        output = call(self.model, example, self.forward_of)
        return tuple(each for each in pytree.tree_leaves(output) if isinstance(each, Tensor))

    def input_names(self) -> list[str]:
        keys = self.spec.context if self.spec.type is dict else None
        if keys is not None and len(keys) == len(self.constants):
            return [str(keys[place]) for place in self.places]
        return _names("input", len(self.places))


def _names(word: str, number: int) -> list[str]:
    return [word] if number == 1 else [f"{word}_{place}" for place in range(number)]


def _need(*packages: str) -> None:
    missing = [each for each in packages if find_spec(each) is None]
    if missing:
        raise ImportError(f"ONNX files need more packages: pip install {' '.join(missing)}")


def _of_samples(tensors: list[Tensor], batched: list[bool], number: int) -> list[Tensor]:
    """Examples of another number of samples, those that there are over again."""
    return [
        each[torch.arange(number) % len(each)] if many else each
        for each, many in zip(tensors, batched, strict=True)
    ]


def _write(called: _Called, tensors: list[Tensor], batched: list[bool], file: Path) -> None:
    with torch.no_grad():
        outputs = called(*tensors)
    if not outputs:
        raise TypeError("the network's output has no tensor; say what counts with forward=")
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if many else {} for many in batched)
    held = (*called.parameters(), *called.buffers())
    size = sum(each.numel() * each.element_size() for each in held)
    try:
        with warnings.catch_warnings():
            for noise in ("# The axis name", "`isinstance\\(treespec"):  # of the exporter itself
                warnings.filterwarnings("ignore", noise)
            torch.onnx.export(
                called,
                tuple(tensors),
                file,
                dynamo=True,
                dynamic_shapes=(shapes,) if any(batched) else None,
                input_names=called.input_names(),
                output_names=_names("output", len(outputs)),
                external_data=size > _MOST_BYTES,
                verbose=False,
            )
    except Exception as error:
        raise RuntimeError(
            f"{type(called.model).__name__} can not be exported: {error}{_advice(batched)}"
        ) from error


def _advice(batched: list[bool]) -> str:
    if not any(batched):
        return ""
    return (
        "; if the network takes one number of samples only, say dynamic_batch=False, with an "
        "example of that number"
    )


def _run(names: list[str], tensors: list[Tensor], file: Path) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    # Inputs that no output depends on are left out of the file.
    taken = {each.name for each in session.get_inputs()}
    given = {
        name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True) if name in taken
    }
    return [torch.from_numpy(each) for each in session.run(None, given)]


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(each.shape)) for each in tensors)


def _compare(called: _Called, tensors: list[Tensor], batched: list[bool], file: Path) -> None:
    """Run a file on inputs, and raise a RuntimeError where it gives something else."""
    try:
        with torch.no_grad():
            expected = called(*(each.clone() for each in tensors))
        found = _run(called.input_names(), tensors, file)
    except Exception as error:
        raise RuntimeError(
            f"the exported {type(called.model).__name__} can not be compared on inputs "
            f"{_shapes(tensors)}: {error}{_advice(batched)}"
        ) from error
    for place, (mine, other) in enumerate(zip(expected, found, strict=True)):
        if mine.shape != other.shape:
            raise RuntimeError(
                f"output {place} of the exported network has shape {tuple(other.shape)} in place "
                f"of {tuple(mine.shape)}, for inputs {_shapes(tensors)}"
            )
        error = _relative_difference(mine, other)
        half = mine.dtype in (torch.float16, torch.bfloat16)
        if not error <= (_TOLERANCE_OF_HALF if half else TOLERANCE):
            raise RuntimeError(
                f"output {place} of the exported network differs by {error:.2g} of the largest "
                f"value, for inputs {_shapes(tensors)}"
            )


def _relative_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number of the first; nan equals nan."""
    one, other = one.double(), other.double()
    equal = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(equal, 0.0, (one - other).abs()).nan_to_num(torch.inf)
    largest = one[one.isfinite()].abs().max().item() if one.isfinite().any() else 0.0
    most = difference.max().item() if difference.numel() else 0.0
    return most / largest if largest else most
