"""Where activations are kept: in memory up to a limit, beyond it in files mapped into memory."""

import contextlib
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

_SHARE = 4  # a quarter of what is free


def free_memory() -> int | None:
    """Bytes that are free on this machine, what the system can give back included, if known."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


@dataclass
class Memory:
    """Gives tensors room, in memory as long as all of them together are within a limit.

    Others get a file in the system's folder for temporary files, which is gone with the tensor.
    Tensors on an accelerator stay there, and do not count.

    Attributes
    ----------
    limit : int, optional
        Bytes; a quarter of what is free unless given, and without limit where that is not known.
    used : int
        Bytes of the tensors in memory that are still in use.
    """

    limit: int | None = None
    used: int = field(default=0, init=False)
    # By address of a storage where what is kept in it ends, in elements.
    _ends: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.limit is None:
            free = free_memory()
            self.limit = None if free is None else free // _SHARE

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor without values, of the dtype and on the device of another."""
        size = torch.Size(shape).numel() * like.element_size()
        on_host = like.device.type == "cpu"
        if on_host and size and self.limit is not None and self.used + size > self.limit:
            return _mapped(shape, like.dtype)
        tensor = like.new_empty(shape)
        if on_host:
            self.used += size
            # A storage lives as long as any view of it.
            weakref.finalize(tensor.untyped_storage(), self._give_back, size)
        return tensor

    def _give_back(self, size: int) -> None:
        self.used -= size

    def kept(self, rows: Tensor, after: Tensor | None = None, expected: int = 0) -> Tensor:
        """A copy of some rows where there is room: right below others, if they have room there.

        So what comes batch by batch lies in one piece at the end, without a second copy of it.

        Parameters
        ----------
        rows : Tensor, shape (rows, features)
        after : Tensor, optional
            What was kept before.
        expected : int
            How many rows are likely to come in all, these and later ones; room is taken for them.
        """
        room = None if after is None else self._below(after, rows)
        if room is None:
            room = self.empty((max(len(rows), expected), *rows.shape[1:]), rows)[: len(rows)]
        self._ends[room.untyped_storage().data_ptr()] = _end(room)
        return room.copy_(rows)

    def _below(self, after: Tensor, rows: Tensor) -> Tensor | None:
        """The room right below some rows for others, if there is any, and nobody has it."""
        storage = after.untyped_storage()
        if (after.dtype, after.device) != (rows.dtype, rows.device) or not after.is_contiguous():
            return None
        room = storage.nbytes() // after.element_size() - _end(after)
        if self._ends.get(storage.data_ptr()) != _end(after) or rows.numel() > room:
            return None
        return after.as_strided(rows.shape, after.stride(), _end(after))

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Tensors one below the other, in one piece; the list is emptied."""
        total = sum(map(len, parts))
        if all(_follows(*pair) for pair in pairwise(parts)):
            whole = parts[0].as_strided((total, *parts[0].shape[1:]), parts[0].stride())
            parts.clear()
            return whole
        whole = self.empty((total, *parts[0].shape[1:]), parts[0])
        start = 0
        while parts:  # each is let go of as soon as it is copied
            part = parts.pop(0)
            whole[start : start + len(part)] = part
            start += len(part)
        return whole


def _end(rows: Tensor) -> int:
    """The place behind a contiguous tensor in its storage, in elements."""
    return rows.storage_offset() + rows.numel()


def _follows(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor lies right below another in the same storage."""
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and one.is_contiguous() and other.storage_offset() == _end(one)


def _mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    handle, path = tempfile.mkstemp(prefix="ddlr-")
    os.close(handle)
    try:
        count = torch.Size(shape).numel()
        tensor = torch.from_file(path, shared=True, size=count, dtype=dtype).view(*shape)
    except RuntimeError as error:
        raise OSError(
            f"activations do not fit into memory, nor into {tempfile.gettempdir()}: {error}"
        ) from error
    finally:
        # Where the system allows it, the name goes now and the room with the last use.
        with contextlib.suppress(OSError):
            os.unlink(path)
    return tensor
