"""What is kept on disk between runs: files of tensors or JSON, up to a size, without pickles.

An entry is one file, named by a hash of all that decides its content, so that it is never out of
date: a changed checkpoint or data set makes another one. It is written whole or not at all. Every
use makes it the latest; to keep to the limit, the longest unused go.

Plain files rather than diskcache or joblib.Memory: those unpickle what they find, and the first has
its index in SQLite, which is not for network file systems, the second neither a limit nor anything
that keeps two processes from computing the same.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments.runs.records import PARTIAL, write_json, write_whole

log = logging.getLogger(__name__)

GIB = 2**30
_KINDS = (".safetensors", ".json", PARTIAL)


def entry_path(folder: Path, key: str, kind: str = ".safetensors") -> Path:
    return folder / f"{key}{kind}"


def entry_lock(folder: Path, key: str) -> Path:
    """The lock of whoever makes an entry: of several processes that miss it, one computes."""
    return folder / "locks" / f"{key}.lock"


def load_tensors(
    path: Path, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors, and what was said about them; None where there is no whole entry."""

    def read() -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(path, "pt") as file:
            # Cloned: a tensor in the middle of a file may lie across the boundaries that torch
            # aligns to, and sums are then grouped, and rounded, otherwise.
            tensors = {name: file.get_tensor(name).clone().to(device) for name in file.keys()}
            return tensors, file.metadata()

    return _load(path, read)


def load_json(path: Path, decode: Callable[[dict], dict] = dict) -> dict | None:
    """What `decode` makes of a JSON file; None where there is no whole entry of that form."""
    return _load(path, lambda: decode(json.loads(path.read_text(encoding="utf-8"))))


def store_tensors(
    path: Path, tensors: dict[str, Tensor], about: dict[str, str], limit_gib: float
) -> None:
    """Keep tensors, unless they alone are over the limit; see `_store`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())

    def write() -> None:
        write_whole(path, lambda scratch: save_file(tensors, scratch, metadata=about))

    _store(path, write, size, limit_gib)


def store_json(path: Path, content: dict, limit_gib: float) -> None:
    """Keep what JSON can hold; see `_store`."""
    size = len(json.dumps(content))
    _store(path, lambda: write_json(path, content), size, limit_gib)


def entries(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of the cache, and what killed processes left, the longest unused first."""
    found = []
    for path in (path for kind in _KINDS for path in folder.glob(f"*{kind}")):
        try:
            found.append((path, path.stat()))
        except FileNotFoundError:  # another process made room
            continue
    return sorted(found, key=lambda entry: entry[1].st_mtime)


def _load(path: Path, read: Callable):
    try:
        content = read()
        os.utime(path)  # the latest use, by which `_make_room` goes
    except FileNotFoundError:
        return None
    # The last two: another version of this program wrote an entry of another form.
    except (OSError, ValueError, SafetensorError, TypeError, LookupError) as error:
        log.warning("%s cannot be read and is computed anew: %s", path, error)
        return None
    return content


def _store(path: Path, write: Callable[[], None], size: int, limit_gib: float) -> None:
    """Write an entry, for which older ones make room. A full disk costs a warning, not the run."""
    limit = limit_gib * GIB
    if size > limit:
        log.warning("an entry of the cache takes %.1f GiB, over cache.limit_gib", size / GIB)
        return
    try:
        _make_room(path.parent, limit - size)
        write()
    except (OSError, SafetensorError) as error:
        log.warning("an entry of the cache is not kept on disk: %s", error)


def _make_room(folder: Path, limit: float) -> None:
    kept = entries(folder)
    total = sum(about.st_size for _, about in kept)
    for path, about in kept:
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= about.st_size
