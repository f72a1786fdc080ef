"""Locks between processes that no crash can leave behind.

A lock is held by an open file, with ``flock``: the kernel releases it when its holder ends, also
by SIGKILL or a power cut. Over a network file system ``flock`` has to be supported (NFSv4, Lustre
mounted with ``flock``, GPFS, CephFS). The files themselves stay: to remove one that another process
is about to lock would let two processes in.
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever has it; meanwhile it says who that is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Append mode: to open the file must not wipe what its holder wrote.
    with path.open("a+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        _describe(stream, {"host": platform.node(), "process": os.getpid(), "since": time.time()})
        yield


def holder(path: Path) -> dict | None:
    """Who holds a lock file: host, process and since when. None if nobody does."""
    try:
        stream = path.open("r", encoding="utf-8")
    except FileNotFoundError:
        return None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                return json.loads(stream.read())
            except ValueError:
                return {}
    return None


def _describe(stream, about: dict) -> None:
    try:
        stream.truncate(0)
        stream.write(json.dumps(about))
        stream.flush()
    except OSError:  # a full disk: the lock holds all the same
        pass
