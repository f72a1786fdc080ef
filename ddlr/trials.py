"""What reads a layer, found out by giving a network something else in its place.

Whether two passes agree is said of their traces: of every module that has parameters what it was
given, and the network's outputs, to the last bit. They are compared by digests, which take no
memory, so a pass costs little more than it does alone.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 2**20
_FACTOR = 0x9E3779B97F4A7C15
_NUMBER = int | float | complex | str | bytes | None


@dataclasses.dataclass(frozen=True)
class Trace:
    """One pass of a network: digests of what its modules were given, in order, and of its outputs.

    `outputs` is empty where there is nothing in them that could be compared.
    """

    given: tuple
    outputs: tuple


def leaves(value: Any) -> Iterator[Any]:
    """The tensors and numbers in nested tuples, lists, dicts and objects with attributes."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            if one.is_nested:
                waiting.extend(reversed(one.unbind()))
            else:
                yield one
        elif isinstance(one, _NUMBER):
            yield one
        elif id(one) in seen or isinstance(one, type | nn.Module):
            continue
        elif isinstance(one, Mapping):
            seen.add(id(one))
            waiting.extend(reversed([part for item in one.items() for part in item]))
        elif isinstance(one, tuple | list | set | frozenset):
            seen.add(id(one))
            waiting.extend(reversed(list(one)))
        elif hasattr(one, "__array__"):
            yield torch.as_tensor(one)
        elif hasattr(one, "__dict__"):
            seen.add(id(one))
            waiting.extend(reversed(list(vars(one).values())))


def digest(value: Any) -> Any:
    """A number that tensors share only if they are equal to the last bit; 0 and -0 are equal."""
    if not isinstance(value, Tensor):
        return value if value == value else repr(value)  # nan, which is equal to nan here
    if value.is_quantized or value.is_sparse or value.layout != torch.strided:
        value = value.dequantize() if value.is_quantized else value.to_dense()
    flat = value.detach()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    if flat.is_floating_point():
        flat = flat + 0.0
    flat = flat.reshape(-1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    if flat.dtype.itemsize >= 4:
        bits = flat.contiguous().view(torch.int32)
    elif flat.dtype.itemsize == 2:
        bits = flat.contiguous().view(torch.int16).to(torch.int32)
    else:
        bits = flat.contiguous().view(torch.uint8).to(torch.int32)
    total = 0
    for chunk in bits.split(_CHUNK):
        weights = _weights(chunk.device)[: len(chunk)]
        total = (total * _FACTOR + int((chunk * weights).sum(dtype=torch.int64))) % 2**64
    return tuple(value.shape), str(value.dtype), total


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """Odd numbers without order, by which a value counts at its place."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**30), 2**30, (_CHUNK,), generator=generator, dtype=torch.int32)
    return (2 * drawn + 1).to(device)


def traced_modules(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Names of the layers, and of all other modules that have parameters of their own.

    Not of what is inside the layers, nor of what was compiled, which hooks would compile anew.
    """
    compiled = [name for name, module in model.named_modules() if is_compiled(module)]
    inside = tuple(f"{name}." for name in [*layers, *compiled] if name)
    return [
        name
        for name, module in model.named_modules()
        if name in layers
        or (not name.startswith(inside) and any(True for _ in module.parameters(recurse=False)))
    ]


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled by `torch.compile` or by its method `compile`."""
    # Where this part of torch was not imported yet, nothing was compiled.
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    by_method = getattr(module, "_compiled_call_impl", None) is not None
    return by_method or (kind is not None and isinstance(module, kind))


def trace(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> Trace:
    """Say what happens in a pass of a network, see `Trace`; `run` makes it, and returns."""
    given = []

    def note(name: str) -> Callable:
        def hook(_module, arguments, keywords):
            given.append((name, *map(digest, leaves((arguments, list(keywords.values()))))))

        return hook

    hooks = [
        (model.get_submodule(name).register_forward_pre_hook, note(name), {"with_kwargs": True})
        for name in names
    ]
    with hooked(*hooks):
        outputs = run()
    return Trace(tuple(given), tuple(map(digest, leaves(outputs))))


def agree(one: Trace, other: Trace) -> bool:
    """Whether two passes were equal, and there were outputs to tell by."""
    return one == other and bool(one.outputs)


@contextmanager
def hooked(*hooks: tuple) -> Iterator[None]:
    """Register hooks, given as (register, hook) or (register, hook, keywords), for a while."""
    handles = []
    try:
        for register, hook, *keywords in hooks:
            handles.append(register(hook, **(keywords[0] if keywords else {})))
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_output(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> tuple:
    """For `hooked`: a layer's output changed, before hooks of its owner see it."""

    def hook(_module, _arguments, output):
        return change(output)

    return layer.register_forward_hook, hook, {"prepend": True}
