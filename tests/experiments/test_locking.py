"""Locks: one process at a time, none left by a crash, and a holder with a name."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.runs.locking import holder, locked

PREAMBLE = "import sys, time, pathlib; from experiments.runs.locking import locked\n"
HOLD = PREAMBLE + (
    "with locked(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(float(sys.argv[2]))"
)
COUNT = PREAMBLE + (
    "counter = pathlib.Path(sys.argv[2])\n"
    "for _ in range(20):\n"
    "    with locked(pathlib.Path(sys.argv[1])):\n"
    "        counter.write_text(str(int(counter.read_text()) + 1))\n"
)


def python(code: str, *arguments: str | Path) -> subprocess.Popen:
    """A process that runs some lines."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def holding(path: Path, seconds: float) -> subprocess.Popen:
    """A process that has the lock by now."""
    child = python(HOLD, path, seconds)
    child.stdout.readline()
    return child


def test_a_lock_says_who_holds_it_and_falls_with_its_holder(tmp_path):
    path = tmp_path / "run.lock"
    assert holder(path) is None
    assert not path.exists()
    child = holding(path, 600)
    assert holder(path)["process"] == child.pid
    child.kill()
    child.communicate()
    assert holder(path) is None
    with locked(path):
        assert holder(path)["process"] == os.getpid()
    assert holder(path) is None
    assert [each.name for each in tmp_path.iterdir()] == ["run.lock"]


def test_the_second_waits_for_the_first(tmp_path):
    path = tmp_path / "run.lock"
    child = holding(path, 0.5)
    with locked(path):
        assert holder(path)["process"] == os.getpid()
    assert child.wait(10) == 0


def test_processes_take_turns(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    children = [python(COUNT, tmp_path / "lock", counter) for _ in range(3)]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    assert counter.read_text() == "60"


def test_who_asks_is_not_taken_for_a_holder_nor_is_a_dead_one(tmp_path):
    path = tmp_path / "run.lock"
    child = holding(path, 600)
    child.kill()  # what it said about itself stays
    child.communicate()
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda _: holder(path), range(40))) == {None}


def test_an_error_lets_the_lock_go(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock"):
        _ = 1 / 0
    assert holder(tmp_path / "lock") is None
    with locked(tmp_path / "lock"):
        pass


def test_a_holder_that_cannot_say_who_it_is_holds_all_the_same(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with locked(tmp_path / "lock"):
        assert holder(tmp_path / "lock") == {}
    assert holder(tmp_path / "lock") is None
