"""One sweep under all launchers, and sweeps whose processes are killed. Needs the extras."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments.configuration import CONFIG_PATH, REPOSITORY
from experiments.runs.locking import holder

LAUNCHERS = {
    "local": (),
    "joblib": ("launcher.jobs=2",),
    "submitit_local": ("launcher.jobs=2",),
    "ray": (),
}
SWEEP = (
    "-m",
    "dataset=digits",
    "model=mlp_digits",
    "calibration_samples=300",
    "tracking=none",
)
GRID = ("method=ddlr,nettrim", "method.relative_tolerance=0.3,0.5", "method.tolerance=5e-2")
# Each run takes all its iterations, so that one is under way whenever the sweep is looked at.
LONG_GRID = (
    "method=ddlr,nettrim",
    "method.relative_tolerance=0.1,0.15,0.2,0.25",
    "method.tolerance=1e-9",
    "method.max_iterations=2000",
)
RUNS = 8
# Far more than anything here takes.
PATIENCE = 1800


def arguments(name: str, folder: Path, *overrides: str) -> list[str]:
    own = [f"results_dir={folder}/results", f"output_dir={folder}/outputs"]
    if name == "compress":
        own.append(f"checkpoint_dir={REPOSITORY}/results/checkpoints")
    return [sys.executable, "-m", f"experiments.{name}", *overrides, *own]


def run(name: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments(name, folder, *overrides),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def tables(folder: Path) -> list[pd.DataFrame]:
    """The tables of a sweep, without what differs between two runs of the same program."""
    done = run("collect", folder)
    assert done.returncode == 0, done.stderr
    paths = [folder / "results" / name for name in ("sweeps.csv", "layers.csv")]
    return [pd.read_csv(path).drop(columns="seconds") for path in paths]


@pytest.fixture(scope="module")
def local_tables(tmp_path_factory) -> list[pd.DataFrame]:
    folder = tmp_path_factory.mktemp("local")
    done = run("compress", folder, *SWEEP, *GRID, "launcher=local", "threads=1")
    assert done.returncode == 0, done.stderr
    return tables(folder)


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "local"])
def test_every_launcher_gives_the_rows_of_the_local_one(launcher, local_tables, tmp_path):
    own = LAUNCHERS[launcher]
    done = run("compress", tmp_path, *SWEEP, *GRID, f"launcher={launcher}", "threads=1", *own)
    assert done.returncode == 0, done.stderr
    assert "4 runs finished, 0 failed, 0 not done" in done.stderr
    got_tables = tables(tmp_path)
    assert [len(table) for table in got_tables] == [4, 12]
    for wanted, got in zip(local_tables, got_tables, strict=True):
        pd.testing.assert_frame_equal(wanted, got)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_that_raises_is_reported_and_the_others_finish(launcher, tmp_path):
    own = LAUNCHERS[launcher]
    grid = ("method=nettrim", "method.relative_tolerance=-1,0.3,0.4,0.5")
    done = run("compress", tmp_path, *SWEEP, *grid, f"launcher={launcher}", *own)
    assert done.returncode == 1
    assert "3 runs finished, 1 failed, 0 not done" in done.stderr
    assert "failed: mlp_digits nettrim nettrim -1 seed 0," in done.stderr
    assert "SettingError: method.relative_tolerance is -1" in done.stderr
    assert "method.relative_tolerance=-1" in done.stderr.rpartition("config:")[2]
    assert len(tables(tmp_path)[0]) == 3


@pytest.mark.parametrize(
    ("launcher", "victim"), [("joblib", "worker"), ("joblib", "sweep"), ("local", "sweep")]
)
def test_a_killed_sweep_is_completed_by_the_same_command(launcher, victim, tmp_path):
    command = (*SWEEP, *LONG_GRID, f"launcher={launcher}", *LAUNCHERS[launcher], "threads=1")
    folder = tmp_path / "results/records"
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen(
            arguments("compress", tmp_path, *command), cwd=tmp_path, stdout=log, stderr=log
        )
    # Kill it in the middle: some runs are finished, and one is under way.
    deadline = time.monotonic() + PATIENCE
    while True:
        assert sweep.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        at_work = [holder(path) for path in folder.glob("locks/*.lock")]
        processes = [about["process"] for about in at_work if about]
        if processes and list(folder.glob("*.json")):
            break
        time.sleep(0.01)
    os.kill(processes[0] if victim == "worker" else sweep.pid, signal.SIGKILL)
    assert sweep.wait(PATIENCE) != 0
    while any(holder(path) for path in folder.glob("locks/*.lock")):
        time.sleep(0.1)  # workers that outlive the sweep finish what they have begun

    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert 0 < len(finished) < RUNS
    done = run("compress", tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert f"{RUNS} runs finished, 0 failed, 0 not done" in done.stderr
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    sweeps, layers = tables(tmp_path)
    assert len(sweeps) == sweeps["run"].nunique() == RUNS
    assert len(layers) == 3 * RUNS
    status = run("status", tmp_path, *command, f"checkpoint_dir={REPOSITORY}/results/checkpoints")
    assert f"{RUNS} runs: {RUNS} finished, 0 running, 0 failed, 0 missing" in status.stdout


@pytest.mark.parametrize("path", sorted(Path(CONFIG_PATH).glob("launcher/*")), ids=lambda p: p.stem)
def test_every_launcher_composes(path):
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        cfg = compose("compress", [f"launcher={path.stem}"], return_hydra_config=True)
    assert cfg.launcher.name == path.stem
    assert cfg.hydra.launcher._target_.rpartition(".")[2].removesuffix("Launcher")
    if path.stem == "slurm":
        assert (cfg.hydra.launcher.mem_gb, cfg.hydra.launcher.cpus_per_task) == (16, 4)
        assert (cfg.hydra.launcher.timeout_min, cfg.threads) == (120, 4)
