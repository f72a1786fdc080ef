"""Where activations are kept: in memory up to a limit, beyond it in files mapped into memory."""

import contextlib
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
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
            weakref.finalize(tensor, self._give_back, size)
        return tensor

    def _give_back(self, size: int) -> None:
        self.used -= size

    def kept(self, rows: Tensor) -> Tensor:
        """A copy of a tensor where there is room."""
        room = self.empty(rows.shape, rows)
        return room.copy_(rows)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Tensors one below the other; the list is emptied."""
        if len(parts) == 1:
            return parts.pop()
        whole = self.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0])
        start = 0
        while parts:  # each is let go of as soon as it is copied
            part = parts.pop(0)
            whole[start : start + len(part)] = part
            start += len(part)
        return whole


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
