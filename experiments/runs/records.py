"""Files that a run leaves behind: written whole or not at all, with what made them."""

import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from experiments.configuration import REPOSITORY

PARTIAL = ".partial"  # how the names of files end that are being written
ONE_TOLERANCE = "relative_tolerance"  # the goal of a run that has no other
USUAL_RIDGE = 1e-2  # of runs that do not say
USUAL_CASCADE_BOUND = "tolerance"  # of runs that do not say
USUAL_ALLOCATION = "measured"  # of goals that do not say
# Of refits of the whole network that do not say; those of conf/compress.yaml.
USUAL_NETWORK_REFIT = {"epochs": 20, "learning_rate": 1e-3, "temperature": 2.0}
_REPORTED_PACKAGES = ("torch", "numpy", "hydra-core", "pandas", "wandb")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then move it into place in one atomic step.

    Until then, and for good where a process is killed in between, its name ends in `PARTIAL`: no
    search for files of a kind takes it for one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=PARTIAL)
    os.close(handle)
    try:
        write(Path(scratch))
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict) -> None:
    """Write strict JSON, atomically. A number that is not finite is written as null."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def read_records(folder: Path) -> list[dict]:
    """All run records in a folder, in the order of their names.

    Their `state` is "finished", or "failed" with an error in place of a row and layers.

    Raises
    ------
    ValueError
        If a file is not a record; names it.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); remove it") from error
        if not ({"row", "layers"} <= set(record) or record.get("state") == "failed"):
            raise ValueError(f"{path} is not a run record: it has no row or no layers; remove it")
        record.setdefault("state", "finished")
        records.append(record)
    return records


def identity(content: dict) -> str:
    """A short hash of what determines a run."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def provenance() -> dict:
    """The git commit, whether the tree differs from it, and the versions of what computed."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {package: version(package) for package in _REPORTED_PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _finite(content):
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
