"""The command behind all results: what it goes on from, what it shows, how it ends."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments import compress
from experiments.agreement import compare
from experiments.configuration import CONFIG_PATH, REPOSITORY
from experiments.paper import Progress
from experiments.report.tables import read_table, write_table
from experiments.runs.records import read_records
from experiments.runs.units import FINISHED, MISSING, run_key
from experiments.status import planned, seconds_left, status
from patience import PATIENCE

# Solved in a tenth of a second, by the checkpoint that is part of the repository.
QUICK = (
    "dataset=digits",
    "model=mlp_digits",
    "calibration_samples=200",
    "method.tolerance=0.1",
    "tracking=none",
)
GRID = ("method=ddlr,nettrim", "method.relative_tolerance=0.4,0.5")


def places(folder: Path) -> list[str]:
    return [
        f"results_dir={folder}/results",
        f"output_dir={folder}/outputs",
        f"checkpoint_dir={REPOSITORY}/results/checkpoints",
    ]


def command(folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-m", f"experiments.{name}", *overrides, *places(folder)]
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


def paper(folder: Path, *overrides: str, sweep: tuple[str, ...] = ()) -> list[str]:
    """The arguments of a small paper: one experiment, on digits, with nothing measured."""
    sweep = ",".join(f'"{each}"' for each in (*QUICK, "method=nettrim", *sweep))
    one = "'seed=0','method.order=parallel','method.refit=none'"
    return [
        'experiments=["networks=lenets suite=convex"]',
        f"sweep=[{one},{sweep},'method.relative_tolerance=0.4,0.5']",
        "measurements=[]",
        "conclusions=[collect]",
        *overrides,
    ]


@pytest.fixture(scope="module")
def tables_alone(tmp_path_factory) -> Path:
    """A folder with the tables of a finished sweep, without its records."""
    folder = tmp_path_factory.mktemp("tables")
    done = command(folder, "compress", "-m", *QUICK, *GRID)
    assert done.returncode == 0, done.stderr
    assert command(folder, "collect").returncode == 0
    shutil.rmtree(folder / "results/records")
    return folder


@pytest.mark.slow
def test_with_the_tables_alone_nothing_is_computed_again(tables_alone, monkeypatch):
    runs = planned([*QUICK, *GRID, "finished_in=tables", *places(tables_alone)])
    monkeypatch.setattr(compress, "prepare", lambda *_: pytest.fail("the network was loaded"))
    sweeps = read_table(tables_alone / "results/sweeps.csv").set_index("run")
    for cfg in runs:
        record, skipped = compress.run(cfg, group="again")
        assert skipped
        row = sweeps.loc[run_key(cfg)]
        assert record["row"]["accuracy"] == row["accuracy"]
        assert record["row"]["relative_tolerance"] == cfg.method.relative_tolerance
        assert [layer["layer"] for layer in record["layers"]] == ["fc1", "fc2", "fc3"]
    assert status(runs).startswith("4 runs: 4 finished")


def test_records_are_what_counts_by_default_and_rerun_forces(tables_alone, tmp_path):
    shutil.copytree(tables_alone / "results", tmp_path / "results")
    (cfg,) = planned([*QUICK, "method.relative_tolerance=0.4", *places(tmp_path)])
    assert status([cfg]).startswith("1 runs: 0 finished, 0 running, 0 failed, 1 missing")
    assert not compress.run(cfg, group="g")[1]
    shutil.rmtree(tmp_path / "results/records")
    cfg.finished_in, cfg.rerun = "tables", True
    assert not compress.run(cfg, group="g")[1]


def test_a_row_without_its_layers_is_no_finished_run(tables_alone, tmp_path):
    shutil.copytree(tables_alone / "results", tmp_path / "results")
    overrides = ("method.relative_tolerance=0.4", "finished_in=tables")
    (cfg,) = planned([*QUICK, *overrides, *places(tmp_path)])
    layers = read_table(tmp_path / "results/layers.csv")
    write_table(tmp_path / "results/layers.csv", layers[layers["run"] != run_key(cfg)])
    assert not compress.run(cfg, group="g")[1]


def test_an_unknown_place_of_what_is_finished_is_named(tmp_path):
    (cfg,) = planned([*QUICK, "finished_in=table", *places(tmp_path)])
    with pytest.raises(ValueError, match=r"finished_in is 'table'.*'records', 'tables'"):
        compress.run(cfg, group="g")


def test_the_time_left_is_of_runs_of_the_same_network_and_method():
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        runs = {
            f"{model} {method} {number}": compose(
                "compress", overrides=[f"model={model}", f"method={method}"]
            )
            for model, method in (("lenet5", "ddlr"), ("lenet5", "nettrim"), ("vgg_small", "ddlr"))
            for number in range(2)
        }
    found = {key: (MISSING, None) for key in runs}
    assert seconds_left(runs, found) is None
    found["lenet5 ddlr 0"] = (FINISHED, {"seconds": 10.0})
    assert seconds_left(runs, found) == 5 * 10.0
    found["lenet5 nettrim 0"] = (FINISHED, {"seconds": 100.0})
    # One of each on LeNet-5, and two on a network of which nothing is known but the mean.
    assert seconds_left(runs, found) == 10 + 100 + 2 * 55


def test_progress_is_over_all_runs(tables_alone):
    more = (*QUICK, "method=nettrim", "method.relative_tolerance=0.4,0.5,0.6,0.7")
    runs = planned([*more, "finished_in=tables", *places(tables_alone)])
    progress = Progress({run_key(cfg): cfg for cfg in runs})
    assert progress.line().startswith("2 of 4 runs finished, about ")
    assert not progress.finished()


@pytest.mark.slow
def test_the_whole_is_run_and_then_found_done(tmp_path):
    first = command(tmp_path, "paper", *paper(tmp_path))
    assert first.returncode == 0, first.stderr
    assert "0 of 2 runs finished" in first.stdout
    assert "suite=convex: done; 2 of 2 runs finished" in first.stdout
    assert len(read_table(tmp_path / "results/sweeps.csv")) == 2
    assert (tmp_path / "results/sizes.csv").is_file()
    shutil.rmtree(tmp_path / "results/records")
    again = command(tmp_path, "paper", *paper(tmp_path))
    assert again.returncode == 0, again.stderr
    assert "suite=convex: finished already" in again.stdout
    assert not (tmp_path / "results/records").exists()


@pytest.mark.slow
def test_on_a_terminal_a_line_shows_how_far_the_whole_is(tmp_path):
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    arguments = [sys.executable, "-m", "experiments.paper", *paper(tmp_path), *places(tmp_path)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=terminal, timeout=PATIENCE)
    os.close(terminal)
    shown = os.read(master, 1 << 16).decode()
    assert done.returncode == 0, shown
    assert "0 of 2 runs finished; now networks=lenets suite=convex" in shown


@pytest.mark.slow
def test_what_fails_is_named_and_does_not_stop_the_rest(tmp_path):
    failing = paper(tmp_path, "measurements=[nothing]", sweep=("seed=0,7",))
    done = command(tmp_path, "paper", *failing)
    assert done.returncode == 1
    left = "networks=lenets suite=convex, nothing; the same command does what is left"
    assert f"failed: {left}" in done.stderr
    assert "train_baseline model=mlp_digits dataset=digits seed=7" in done.stderr
    assert len(read_table(tmp_path / "results/sweeps.csv")) == 2


def test_a_measurement_is_taken_where_its_table_is_missing(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/nothing.csv").write_text("a\n1\n")
    done = command(tmp_path, "paper", "experiments=[]", "measurements=[nothing]", "conclusions=[]")
    assert done.returncode == 0, done.stderr
    assert "nothing.csv is there already" in done.stdout


@pytest.mark.slow
def test_an_interrupt_ends_it_and_the_same_command_goes_on(tmp_path):
    arguments = paper(tmp_path, sweep=("calibration_samples=200,1000", "method.tolerance=1e-6"))
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.paper", *arguments, *places(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell, SIGINT is ignored, and would be here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    records = tmp_path / "results/records"
    while not list(records.glob("*.json")) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on from here" in printed
    before = {record["row"]["run"] for record in read_records(records)}
    assert 1 <= len(before) < 4
    done = command(tmp_path, "paper", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of 4 runs finished" in done.stdout
    assert len(read_table(tmp_path / "results/sweeps.csv")) == 4


# What is made again


def runs_table(folder: Path, accuracies: dict[str, float], kept: float = 0.5) -> None:
    about = {"dataset": "d", "model": "m", "method": "ddlr", "constraint": "c", "refit": "none"}
    rows = [
        {**about, "run": run, "order": "parallel", "calibration_samples": 1, "seed": 0}
        | {"relative_tolerance": 0.1, "accuracy": accuracy, "kept_fraction": kept}
        for run, accuracy in accuracies.items()
    ]
    write_table(folder / "sweeps.csv", pd.DataFrame(rows))


def test_tables_are_compared_by_run():
    columns = ["goal", "wanted", "seed", "dataset", "model", "method", "constraint", "refit"]
    about = dict.fromkeys([*columns, "order", "cascade_bound", "ridge", "calibration_samples"], 0)
    about["network_refit"] = ""
    one = pd.DataFrame([{**about, "run": run, "kept_fraction": 0.5} for run in "ab"])
    other = one.assign(run=["b", "c"], accuracy=[97.0, 1.0], kept_fraction=[0.4, 0.0])
    both = compare(one.assign(accuracy=[98.0, 96.97]), other)
    assert list(both["run"]) == ["b"]
    assert both["accuracy_difference"].item() == 0.03
    assert both["kept_difference"].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("again", "code", "said"),
    [
        ({"a": 98.05, "b": 97.0}, 0, "2 runs in both tables; largest difference 0.050 points"),
        ({"a": 98.06, "x": 50.0}, 1, "1 runs differ by more than 0.05 points"),
        ({"x": 98.0}, 1, "have no run in common"),
    ],
)
def test_agreement_passes_small_differences_and_names_large_ones(again, code, said, tmp_path):
    runs_table(tmp_path / "results", {"a": 98.0, "b": 97.0, "c": 96.0})
    runs_table(tmp_path / "reproduced", again)
    done = command(tmp_path, "agreement", f"reproduced_dir={tmp_path}/reproduced")
    assert done.returncode == code
    assert said in done.stdout + done.stderr
