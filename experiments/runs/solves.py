"""Solves of layers, kept on disk: a refit or a cascade begins with what another run has solved."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ddlr import SolverResult, SolverStatus
from experiments.runs.locking import locked
from experiments.runs.records import identity
from experiments.runs.storage import entry_lock, entry_path, load_tensors, store_tensors

# To be raised when the content of an entry, or how it is computed, changes.
_FORMAT = 8
_TENSORS = ("weight", "bias")
_PART = "part "  # before the name of each of `SolverResult.parts`
_NUMBERS = (
    "objective",
    "lower_bound",
    "relative_gap",
    "violation",
    "shortfall",
    "seconds",
)


@dataclass(frozen=True)
class DiskSolveCache:
    """Keeps solves and refits of layers on disk, under a hash of all that decides them.

    To be given as `solve_cache` of `ddlr.Settings`. A solve that did not converge is
    not kept. What is kept has no dual variable, which nobody asks for by then.
    """

    folder: Path
    limit_gib: float

    def __call__(self, compute: Callable[..., SolverResult], *arguments, **options) -> SolverResult:
        call = _Content()
        content = [call.of(value) for value in (compute, arguments, options)]
        key = identity(
            {
                "format": _FORMAT,
                "call": content,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
        path = entry_path(self.folder, key)
        with locked(entry_lock(self.folder, key)):
            solved = load_solve(path, call.device)
            if solved is None:
                solved = compute(*arguments, **options)
                store_solve(path, solved, self.limit_gib)
        return solved


def load_solve(path: Path, device: torch.device) -> SolverResult | None:
    """A solve without its dual variable, or None where there is no whole entry."""
    entry = load_tensors(path, device)
    if entry is None:
        return None
    tensors, about = entry
    return SolverResult(
        **{name: tensors[name] for name in _TENSORS},
        **{name: float.fromhex(about[name]) for name in _NUMBERS},
        status=SolverStatus(about["status"]),
        iterations=int(about["iterations"]),
        dual=tensors["weight"].new_empty(0),
        parts={
            name.removeprefix(_PART): part
            for name, part in tensors.items()
            if name.startswith(_PART)
        }
        or None,
    )


def store_solve(path: Path, solved: SolverResult, limit_gib: float) -> None:
    """Keep a solve, up to the limit of the cache."""
    about = {name: float(getattr(solved, name)).hex() for name in _NUMBERS}
    about |= {"status": solved.status.value, "iterations": str(solved.iterations)}
    tensors = {name: getattr(solved, name) for name in _TENSORS}
    tensors |= {f"{_PART}{name}": part for name, part in (solved.parts or {}).items()}
    store_tensors(path, tensors, about, limit_gib)


class _Content:
    """Describes values by all of them that can decide a result; sees on which device they are.

    Attributes
    ----------
    device : torch.device
        Of the first tensor that was described, where a result belongs: those of a layer are all on
        one. The CPU as long as there was none.
    """

    def __init__(self) -> None:
        self._first: torch.device | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._first is None else self._first

    def of(self, value):
        """A value as JSON; tensors by their hash."""
        if value is None or isinstance(value, str | bool | int):
            return value
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, SolverResult):  # a refit depends on these alone
            parts = [] if value.parts is None else [self.of(value.parts)]
            return [value.status.value, self.of(value.weight), self.of(value.bias), *parts]
        if is_dataclass(value):
            return {field.name: self.of(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, Mapping):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [self.of(item) for item in value]
        if isinstance(value, partial):
            return [self.of(part) for part in (value.func, value.args, value.keywords)]
        return f"{value.__module__}.{value.__qualname__}"  # a function

    def _of_tensor(self, value: Tensor) -> list:
        if self._first is None:
            self._first = value.device
        values = value.detach().cpu().contiguous()
        digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), value.device.type, digest]
