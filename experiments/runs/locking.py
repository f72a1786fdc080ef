"""Locks between processes that no crash can leave behind, and who holds them.

The lock is that of the operating system, by ``filelock``: it is released when its holder ends, also
by SIGKILL or a power cut. Over a network file system ``flock`` has to be supported (NFSv4, Lustre
mounted with ``flock``, GPFS, CephFS). Who holds it stands in a file beside it, since a locked file
cannot be read everywhere; that file is believed only while the lock is held.
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# Another process that asks for the holder has the lock meanwhile, but not for so long.
PROBE_SECONDS = 0.1


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever has it; meanwhile `holder` tells who that is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        about = {"host": platform.node(), "process": os.getpid(), "since": time.time()}
        try:
            _description(path).write_text(json.dumps(about), encoding="utf-8")
        except OSError:  # a full disk: the lock holds all the same
            pass
        try:
            yield
        finally:
            _description(path).unlink(missing_ok=True)


def holder(path: Path) -> dict | None:
    """Who holds a lock file: host, process and since when. None if nobody does.

    Empty where that is not known; None for the free lock of another user, which cannot be tried.
    """
    if not path.exists():
        return None
    try:
        with FileLock(path, timeout=PROBE_SECONDS, poll_interval=PROBE_SECONDS / 10):
            return None
    except Timeout:
        return _described(path)
    except PermissionError:
        return _described(path) or None


def _description(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def _described(path: Path) -> dict:
    try:
        return json.loads(_description(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
