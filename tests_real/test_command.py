"""``python -m experiments.real``: rows, and runs that are there already."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.configuration import REPOSITORY

PATIENCE = 1800  # seconds; far more than anything here takes
SMALL = (
    "network=mtcnn_rnet",
    "network.calibration_samples=700",
    "network.searching_samples=200",
    "network.choosing_samples=100",
    "network.judging_samples=100",
    "search.tolerances=[0.2,0.4,0.7]",
)


def command(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    own = (f"results_dir={folder}/results", f"output_dir={folder}/outputs")
    return subprocess.run(
        [sys.executable, "-m", "experiments.real", *SMALL, *overrides, *own],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for fraction in (0.4, 0.6):
        done = command(folder, f"goal.kept_fraction={fraction}")
        assert done.returncode == 0, done.stderr
    return folder


def test_a_row_has_size_quality_file_and_cost(folder):
    table = pd.read_csv(folder / "results/real.csv")
    assert len(table) == 2
    assert (table["kept_fraction"] <= table["wanted"]).all()
    assert (table["parameters_dense"] == 576 * 128 + 128 * 6).all()
    assert (table["file_bytes"] < table["file_bytes_dense"]).all()
    assert table["quality"].between(0.5, 1).all()
    assert (table["peak_memory_bytes"] > 1e8).all()
    # The second run takes the allocation's measurements from the first.
    assert len(list((folder / "outputs/real").glob("options_*.json"))) == 1


def test_a_run_whose_row_is_there_is_passed_over(folder):
    path = folder / "results/real.csv"
    before = path.read_bytes()
    done = command(folder, "goal.kept_fraction=0.6")
    assert done.returncode == 0, done.stderr
    assert "has this run already" in done.stdout
    assert path.read_bytes() == before


def test_the_cost_of_capture_has_a_table_of_its_own(folder):
    done = command(folder, "task=capture")
    assert done.returncode == 0, done.stderr
    [row] = pd.read_csv(folder / "results/real_capture.csv").to_dict("records")
    assert (row["network"], row["samples"], row["rows"], row["layers"]) == (
        "mtcnn_rnet",
        700,
        700,
        3,
    )
    assert row["ratio"] > 0


def test_an_unknown_task_is_named(folder):
    done = command(folder, "task=captures")
    assert done.returncode != 0
    assert "task is 'captures'; choose one of compress, capture" in done.stderr


def test_a_compressed_network_is_timed_beside_the_original(folder):
    timing = ("task=latency", "goal.kept_fraction=0.6", "latency.rounds=2", "latency.threads=[1]")
    done = command(folder, *timing)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(folder / "results/real_latency.csv")
    assert len(table) == 2 * 2 * 2  # forms, engines and batches
    assert (table["file_bytes"] < table["file_bytes_dense"]).all()
    ratio = table["microseconds_dense"] / table["microseconds"]
    assert (table["speedup"] / ratio - 1).abs().max() < 1e-4
    compressed = pd.read_csv(folder / "results/real.csv").query("wanted == 0.6")
    assert set(table["settings"]) == set(compressed["settings"])
    assert (table["quality"] - compressed["quality"].item()).abs().max() < 1e-3
    assert "has this run already" in command(folder, *timing).stdout
