"""Runs as units of work, the work they share, and what happens around a sweep."""

import csv
import os
import pickle
import pty
import shlex
import shutil
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import ddlr
import doors
from ddlr.reduced_rank import RIDGE
from experiments import compress
from experiments.configuration import CONFIG_PATH, REPOSITORY, SettingError
from experiments.networks import mlp_digits
from experiments.runs import preparation, solves, storage, sweeping
from experiments.runs.checks import check_settings
from experiments.runs.locking import locked
from experiments.runs.records import USUAL_RIDGE, read_records
from experiments.runs.tracking import TrackingError, check_tracking, track
from experiments.runs.units import (
    choices,
    describe,
    lock_path,
    read_record,
    record_path,
    run_key,
    settings,
    state,
)
from experiments.status import expanded, planned, status
from experiments.training import choose_device
from offline_wandb import entries
from patience import PATIENCE

# Solved in a tenth of a second, by the checkpoint that is part of the repository.
QUICK = (
    "dataset=digits",
    "model=mlp_digits",
    "calibration_samples=200",
    "method=nettrim",
    "method.relative_tolerance=0.5",
    "method.tolerance=0.1",
    "tracking=none",
)

EXPERIMENT = ("networks=lenets", "suite=convex", "model=lenet5", "seed=0", "method.order=cascade")
RUNS_OF_SWEEP = 2 * 6 * 2  # methods, tolerances, refits


def places(folder: Path) -> list[str]:
    return [
        f"results_dir={folder}/results",
        f"output_dir={folder}/outputs",
        f"checkpoint_dir={REPOSITORY}/results/checkpoints",
    ]


def configured(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return compose("compress", overrides=[*QUICK, *places(folder), *overrides])


def command(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.compress", *overrides, *places(folder)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture(autouse=True)
def nothing_in_memory():
    """Each test begins as a new process does, and leaves torch's threads as they were."""
    threads = torch.get_num_threads()
    preparation.forget()
    yield
    torch.set_num_threads(threads)


def numbers(record: dict) -> tuple[dict, list[dict]]:
    """A record's results without the times."""
    rows = [record["row"], *record["layers"]]
    row, *layers = [{key: row[key] for key in row if key != "seconds"} for row in rows]
    return row, layers


# Runs as units of work


def test_a_run_is_known_by_what_decides_its_result(tmp_path):
    key = run_key(configured(tmp_path))
    elsewhere = [f"data_dir={tmp_path}", "device=cpu", "tracking=csv", "threads=1", "workers=2"]
    assert run_key(configured(tmp_path / "b", *elsewhere, "rerun=true")) == key
    # Where code lies, how a checkpoint was trained, and what becomes of a run that fails.
    for change in ("method._target_=a.b", "model._target_=a.b", "+model.dropout=0.1"):
        assert run_key(configured(tmp_path, change)) == key
    assert run_key(configured(tmp_path, "method.raise_on_failure=true")) == key
    # A setting that is added changes no run while it has its usual value.
    assert run_key(configured(tmp_path, "~method.penalise_bias")) == key
    changes = ("method.relative_tolerance=0.4", "seed=1", "dataset.held_out=100", "method=ddlr")
    further = ("method.penalise_bias=true", "method.tolerance=0.2", "+method.unheard_of=1")
    for change in (*changes, *further):
        assert run_key(configured(tmp_path, change)) != key
    shutil.copytree(REPOSITORY / "results/checkpoints", tmp_path / "checkpoints")
    own = f"checkpoint_dir={tmp_path}/checkpoints"
    assert run_key(configured(tmp_path, own)) == key
    with (tmp_path / "checkpoints/mlp_digits_digits_seed0.safetensors").open("ab") as stream:
        stream.write(b"\0")
    assert run_key(configured(tmp_path, own)) != key


def test_a_finished_run_is_skipped_before_anything_is_loaded(tmp_path, monkeypatch):
    cfg = configured(tmp_path)
    first, skipped = compress.run(cfg, group="g")
    assert not skipped
    monkeypatch.setattr(compress, "prepare", lambda *_: pytest.fail("the network was loaded"))
    again, skipped = compress.run(cfg, group="g")
    assert skipped
    assert again == read_record(record_path(cfg, run_key(cfg)))
    assert numbers(again) == numbers(first)


def test_the_usual_ridge_is_that_of_runs_from_before_there_was_a_choice(tmp_path):
    usual, more = configured(tmp_path), configured(tmp_path, "method.ridge=1.0")
    assert USUAL_RIDGE == RIDGE == usual.method.ridge
    assert "ridge" not in settings(usual)
    assert run_key(usual) != run_key(more) == run_key(configured(tmp_path, "method.ridge=1"))
    assert ("ridge" in describe(usual), "ridge 1 " in describe(more)) == (False, True)
    assert [choices(cfg)["ridge"] for cfg in (usual, more)] == [RIDGE, 1.0]


def test_rerun_does_a_finished_run_again_and_its_failure_leaves_the_record(tmp_path, monkeypatch):
    cfg = configured(tmp_path, "rerun=true")
    path = record_path(cfg, run_key(cfg))
    first, _ = compress.run(cfg, group="g")
    second, skipped = compress.run(cfg, group="again")
    assert not skipped
    assert read_record(path)["group"] == "again"
    assert numbers(first) == numbers(second)
    before = path.read_bytes()
    monkeypatch.setattr(compress, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress.run(cfg, group="failing")
    assert path.read_bytes() == before


def test_a_failed_run_keeps_its_error_and_config_and_is_tried_again(tmp_path, monkeypatch):
    cfg = configured(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(compress, "judge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress.run(cfg, group="g")
    (failed,) = read_records(tmp_path / "results/records")
    assert failed["state"] == "failed"
    assert failed["error"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in failed["traceback"]
    assert failed["config"]["method"]["relative_tolerance"] == 0.5
    assert status([cfg]).startswith("1 runs: 0 finished, 0 running, 1 failed, 0 missing")
    _, skipped = compress.run(cfg, group="g")
    assert not skipped
    (record,) = read_records(tmp_path / "results/records")
    assert record["state"] == "finished"
    assert "error" not in record


def test_a_record_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    cfg = configured(tmp_path, "rerun=true")
    compress.run(cfg, group="g")
    path = record_path(cfg, run_key(cfg))
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        compress.run(cfg, group="g")
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*"))


@pytest.mark.slow
def test_two_processes_with_the_same_run_do_it_once(tmp_path):
    slower = ("method=ddlr", "method.relative_tolerance=0.2", "calibration_samples=400")
    arguments = ["-m", "experiments.compress", *QUICK, *slower, *places(tmp_path)]
    processes = [
        subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("finished already" in text for text in printed) == [False, True]
    assert len(read_records(tmp_path / "results/records")) == 1


def test_status_tells_what_is_finished_running_failed_and_missing(tmp_path):
    grid = "method.relative_tolerance=0.3,0.4,0.5,-1"
    shown = planned([*QUICK, grid, *places(tmp_path)])
    running, _, finished, failing = shown
    compress.run(finished, group="g")
    with pytest.raises(SettingError, match=r"method.relative_tolerance is -1"):
        compress.run(failing, group="g")
    with locked(lock_path(running, run_key(running))):
        text = status(shown)
    assert text.startswith("4 runs: 1 finished, 1 running, 1 failed, 1 missing\nabout ")
    assert (
        f"running  mlp_digits nettrim nettrim 0.3 seed 0, 200 samples  process {os.getpid()}"
        in text
    )
    assert (
        "failed   mlp_digits nettrim nettrim -1 seed 0, 200 samples  "
        "SettingError: method.relative_tolerance is -1" in text
    )
    assert "missing  mlp_digits nettrim nettrim 0.4 seed 0, 200 samples" in text
    assert "running" not in status([finished]).partition("\n")[2]


def test_status_reads_the_grid_of_an_experiment(tmp_path):
    shown = planned([*EXPERIMENT, *places(tmp_path)])
    assert len(shown) == RUNS_OF_SWEEP
    assert {cfg.model.name for cfg in shown} == {"lenet5"}


# Work that runs share


@pytest.mark.parametrize("method", ["ddlr", "nettrim"])
def test_the_cache_changes_nothing(method, tmp_path, monkeypatch):
    grid = (f"method={method}", "method.tolerance=0.3", "rerun=true")
    without, _ = compress.run(configured(tmp_path, *grid, "cache.enabled=false"), group="g")
    assert not (tmp_path / "outputs/cache").exists()
    cfg = configured(tmp_path, *grid)
    stored, _ = compress.run(cfg, group="g")
    monkeypatch.setattr(preparation, "capture_layers", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(solves, "store_solve", lambda *_: pytest.fail("solved again"))
    in_memory, _ = compress.run(cfg, group="g")
    preparation.forget()
    from_disk, _ = compress.run(cfg, group="g")
    for record in (stored, in_memory, from_disk):
        assert numbers(record) == numbers(without)


def test_an_entry_of_the_cache_is_for_one_content_only(tmp_path):
    shutil.copytree(REPOSITORY / "results/checkpoints", tmp_path / "checkpoints")
    own = f"checkpoint_dir={tmp_path}/checkpoints"
    cpu = torch.device("cpu")
    key = preparation.content_key(configured(tmp_path), cpu)
    same = ("method=ddlr", "method.relative_tolerance=0.1", own)
    assert preparation.content_key(configured(tmp_path, *same), cpu) == key
    others = [
        preparation.content_key(configured(tmp_path, change), cpu)
        for change in ("calibration_samples=100", "dataset.held_out=100")
    ]
    with (tmp_path / "checkpoints/mlp_digits_digits_seed0.safetensors").open("ab") as stream:
        stream.write(b"\0")
    others.append(preparation.content_key(configured(tmp_path, own), cpu))
    torch.set_num_threads(torch.get_num_threads() + 1)
    others.append(preparation.content_key(configured(tmp_path), cpu))
    assert len({key, *others}) == 1 + len(others)


def test_an_entry_that_cannot_be_read_is_made_anew(tmp_path, caplog):
    cfg = configured(tmp_path, "rerun=true")
    first, _ = compress.run(cfg, group="g")
    entries = list((tmp_path / "outputs/cache").glob("*.safetensors"))
    sizes = {entry: entry.stat().st_size for entry in entries}
    assert len(entries) == 1 + 3  # of activations, and of a solve a layer
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: sizes[entry] // 2])
    preparation.forget()
    second, _ = compress.run(cfg, group="g")
    assert caplog.text.count("cannot be read") == len(entries)
    assert numbers(second) == numbers(first)
    assert {entry: entry.stat().st_size for entry in entries} == sizes


def test_a_refit_and_a_cascade_begin_with_what_another_run_has_solved(tmp_path):
    def entries_after(*overrides: str) -> int:
        compress.run(configured(tmp_path, *overrides), group="g")
        return len(storage.entries(tmp_path / "outputs/cache"))

    assert entries_after() == 1 + 3  # activations, and a solve a layer
    assert entries_after("method.refit=layer") == 4 + 3  # a refit a layer
    # The first layer is that of parallel order, solve and refit.
    assert entries_after("method.refit=layer", "method.order=cascade") == 7 + 4
    # Another output set or tolerance is another problem.
    assert entries_after("method.constraint=hinge") == 11 + 3
    assert entries_after("method.relative_tolerance=0.51") == 14 + 3
    # With another ridge a refit is another one, of the same solve.
    assert entries_after("method.refit=layer", "method.ridge=1.0") == 17 + 3


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_whole", full)
    record, _ = compress.run(configured(tmp_path), group="g")
    assert record["state"] == "finished"
    assert "not kept on disk" in caplog.text


# Layers captured once, and solved side by side


@pytest.fixture(scope="module")
def network(digits):
    cfg = configured(Path("unused"))
    return preparation.load_network(cfg, torch.device("cpu"))[0], digits.calibration(200, seed=0)


METHODS = {"ddlr": doors.compress, "nettrim": doors.prune}
LOOSE = {"relative_tolerance": 0.4, "tolerance": 0.1}


def assert_same(one: ddlr.CompressionResult, other: ddlr.CompressionResult) -> None:
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert [report.iterations for report in one.layers] == [
        report.iterations for report in other.layers
    ]


@pytest.mark.parametrize("method", METHODS)
def test_captured_layers_give_what_the_data_give(method, network):
    model, calibration = network
    captured = ddlr.capture_layers(model, calibration)
    for _ in range(2):
        shared = METHODS[method](model, captured, **LOOSE)
        assert_same(shared, METHODS[method](model, calibration, **LOOSE))
    one = METHODS[method](model, captured, layers=["fc2"], **LOOSE)
    assert [report.name for report in one.layers] == ["fc2"]


def test_captured_layers_are_refused_where_they_do_not_belong(network):
    model, calibration = network
    captured = ddlr.capture_layers(model, calibration, layers=["fc1"])
    with pytest.raises(ValueError, match="layer 'fc2' was not captured"):
        doors.compress(model, captured, layers=["fc1", "fc2"], **LOOSE)
    with pytest.raises(ValueError, match="layer 'fc1' was captured with other weights"):
        doors.compress(mlp_digits(), captured, layers=["fc1"], **LOOSE)
    with pytest.raises(ValueError, match="activations was settled"):
        doors.compress(model, captured, activations={"fc1": "none"}, **LOOSE)


def test_workers_give_the_same_network_and_the_same_errors(network):
    model, calibration = network
    # Sums over another number of threads are rounded differently, so one for either.
    torch.set_num_threads(1)
    alone = doors.prune(model, calibration, **LOOSE)
    seen = []
    together = doors.prune(model, calibration, **LOOSE, workers=2, on_layer=seen.append)
    assert_same(alone, together)
    # As each was solved: what is dead in the network is removed once all are there.
    for one, other in zip(seen, together.layers, strict=True):
        assert (one.name, one.iterations) == (other.name, other.iterations)
        assert one.parameters_kept >= other.parameters_kept
    with pytest.raises(ddlr.ConvergenceError, match="layer 'fc1': the iteration limit") as caught:
        doors.compress(model, calibration, **LOOSE, max_iterations=1, workers=2)
    assert pickle.loads(pickle.dumps(caught.value)).result.iterations == 1
    with pytest.raises(ValueError, match="workers is 0"):
        doors.compress(model, calibration, **LOOSE, workers=0)


# Around a sweep


@pytest.mark.slow
def test_two_sweeps_that_start_in_the_same_second_do_not_share_a_folder(tmp_path):
    grids = ("method.relative_tolerance=0.5,0.6", "method.relative_tolerance=0.7,0.8,0.9")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.compress", "-m", *QUICK, grid, *places(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for grid in grids
    ]
    for runs, process in zip((2, 3), started, strict=True):
        _, said = process.communicate(timeout=PATIENCE)
        assert f"sweep: {runs} runs finished, 0 failed, 0 not done" in said
        (folder,) = (tmp_path / "outputs/compress").glob(f"*_{process.pid}")
        assert len(list(folder.glob("outcomes/*/*.json"))) == runs


@pytest.mark.slow
def test_a_sweep_reports_what_failed_and_finishes_the_rest(tmp_path):
    grid = ("method.max_iterations=1,4000,5000", "method.raise_on_failure=true")
    done = command(tmp_path, "-m", *QUICK, *grid, "tracking=wandb")
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("sweep:") :]
    assert report.startswith("sweep: 2 runs finished, 1 failed, 0 not done")
    assert (
        "failed: mlp_digits nettrim nettrim 0.5 seed 0, 200 samples\n  "
        "ConvergenceError: layer 'fc1'" in report
    )
    assert "method.max_iterations=1 " in report.partition("config:")[2]
    records = read_records(tmp_path / "results/records")
    assert sorted(record["state"] for record in records) == ["failed", "finished", "finished"]
    # Three runs and the sweep's own, each finished: none goes on in the next one's folder.
    folders = list((tmp_path / "outputs/wandb").glob("offline-run-*"))
    assert len(folders) == 4
    exits = sorted(exit_code(folder) for folder in folders)
    assert exits == [0, 0, 0, 1]
    collected = subprocess.run(
        [sys.executable, "-m", "experiments.collect", *places(tmp_path)[:2]],
        capture_output=True,
        text=True,
    )
    assert "1 of 3 runs failed and are left out" in collected.stdout
    with (tmp_path / "results/sweeps.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 2


def exit_code(folder: Path) -> int:
    found = entries(folder)
    (code,) = [entry["exit"]["exit_code"] for entry in found if entry["type"] == "exit"]
    return int(code)


@pytest.mark.slow
def test_a_sweep_with_a_failure_does_not_exit_with_0_whatever_makes_its_runs(tmp_path):
    grid = ("method=glob(lowest_*)", "method.relative_tolerance=abc,0.5")
    kept = [each for each in QUICK if not each.startswith("method")]
    done = command(tmp_path, "-m", *kept, *grid)
    assert done.returncode == 1
    assert "sweep: 1 runs finished, 1 failed, 0 not done" in done.stderr
    assert (
        "failed: mlp_digits lowest_rank hinge abc seed 0, 200 samples\n  "
        "SettingError: method.relative_tolerance is 'abc'" in done.stderr
    )
    assert len(read_records(tmp_path / "results/records")) == 1


@pytest.mark.slow
def test_outcomes_of_an_earlier_sweep_in_the_same_folder_do_not_count(tmp_path):
    folder = f"hydra.sweep.dir={tmp_path}/sweep"
    failing = command(tmp_path, "-m", *QUICK, folder, "method.relative_tolerance=-1,nan")
    assert failing.returncode == 1
    assert "sweep: 0 runs finished, 2 failed, 0 not done" in failing.stderr
    done = command(tmp_path, "-m", *QUICK, folder, "method.relative_tolerance=0.5")
    assert done.returncode == 0, done.stderr
    assert "sweep: 1 runs finished, 0 failed, 0 not done" in done.stderr


SWEEP = (*EXPERIMENT, "verbosity=quiet", "tracking=none")


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Iterator[DictConfig]:
    """The config of a sweep that is under way in this process."""
    monkeypatch.setattr(sys, "argv", ["compress"])
    overrides = [*SWEEP, f"hydra.sweep.dir={tmp_path}/sweep", "hydra.mode=MULTIRUN"]
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        cfg = compose("compress", [*overrides, *places(tmp_path)], return_hydra_config=True)
        yield cfg
    sweeping._watched.clear()


def start(cfg: DictConfig) -> None:
    sweeping.SweepCallback(cfg.hydra.callbacks.sweep.outcomes).on_multirun_start(config=cfg)


def note(cfg: DictConfig, number: int, state: str = "finished") -> None:
    """What the job of that number leaves."""
    cfg.hydra.job.num = number
    about = {"key": "k", "skipped": True} if state == "finished" else {"cause": "an error"}
    sweeping.note_outcome(cfg.hydra, f"run {number}", state, **about)


def nothing() -> None:
    pass


def dead() -> None:
    sys.exit(0)


def test_a_sweep_succeeds_when_every_run_has_left_word_that_it_finished(sweep):
    start(sweep)
    for number in range(RUNS_OF_SWEEP):
        note(sweep, number)
    sweeping.command(nothing)


@pytest.mark.parametrize(
    ("last", "main"),
    [("failed", nothing), (None, nothing), (None, dead), ("unreadable", nothing)],
)
def test_a_run_that_failed_or_left_no_word_gives_exit_code_1(last, main, sweep, capsys):
    start(sweep)
    for number in range(RUNS_OF_SWEEP - 1):
        note(sweep, number)
    if last:
        note(sweep, RUNS_OF_SWEEP - 1, last)
    if last == "unreadable":
        outcomes = Path(sweep.hydra.callbacks.sweep.outcomes)
        (outcomes / f"{RUNS_OF_SWEEP - 1}.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        sweeping.command(main)
    assert ended.value.code == 1
    counts = "1 failed, 0 not done" if last == "failed" else "0 failed, 1 not done"
    assert f"sweep: {RUNS_OF_SWEEP - 1} runs finished, {counts}" in capsys.readouterr().err


def test_errors_of_the_launcher_pass_through_after_the_report(sweep, capsys):
    start(sweep)
    with pytest.raises(ZeroDivisionError):
        sweeping.command(lambda: 1 / 0)
    assert f"{RUNS_OF_SWEEP} not done" in capsys.readouterr().err


def test_a_watch_that_cannot_begin_ends_the_command(sweep, monkeypatch):
    monkeypatch.setattr(sweeping, "expand", lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match="Error: division by zero"):
        start(sweep)


def test_a_sweep_that_nobody_watches_is_refused(sweep):
    sweeping.check_watched(sweep.hydra)
    sweep.hydra.callbacks.sweep._target_ = "hydra.experimental.callback.Callback"
    with pytest.raises(ValueError, match=r"hydra.callbacks.sweep is not that of"):
        sweeping.check_watched(sweep.hydra)
    del sweep.hydra.callbacks.sweep
    with pytest.raises(ValueError, match=r"hydra.callbacks.sweep is not that of"):
        sweeping.check_watched(sweep.hydra)


def test_all_jobs_of_a_sweep_and_no_others_share_a_folder_of_outcomes(sweep):
    mine = sweep.hydra.callbacks.sweep.outcomes
    # As launchers take the config to other processes.
    there = pickle.loads(pickle.dumps(sweep))
    loader = GlobalHydra.instance().config_loader()
    for job in (sweep, there):
        assert loader.load_sweep_config(job, ["seed=3"]).hydra.callbacks.sweep.outcomes == mine
    again = compose("compress", [*SWEEP, f"hydra.sweep.dir={sweep.hydra.sweep.dir}"], True)
    other = again.hydra.callbacks.sweep.outcomes
    assert Path(other).parent == Path(mine).parent
    assert other != mine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "runs"),
    [
        (["seed=0,1", "method=svd"], 2),
        (["method=choice(svd,ddlr,nettrim)", "seed=range(3)"], 9),
        (["method=glob(magnitude*)"], 2),
        (["method=glob(*, exclude=[*_*, a*, o*, s*])"], 3),  # ddlr, magnitude and nettrim
        (["suite=mine"], 4),
        (["suite=mine", "method=svd"], 2),
    ],
)
def test_runs_are_counted_whatever_makes_them(overrides, runs, tmp_path):
    own = tmp_path / "suite/mine.yaml"
    own.parent.mkdir()
    params = {"method": "glob(magnitude*)", "method.relative_tolerance": "${grid}"}
    content = {"grid": "0.1,0.2", "hydra": {"sweeper": {"params": params}}}
    own.write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(content)))
    assert len(planned([f"hydra.searchpath=[file://{tmp_path}]", *overrides])) == runs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=glob(nothing*)"], "the sweep has no runs, since a glob"),
        (["hydra.sweeper._target_=another.Sweeper", "seed=0,1"], "hydra/sweeper is another"),
    ],
)
def test_a_sweep_whose_runs_are_not_known_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        planned(overrides)


# Settings that are refused

WRONG = {
    "method.relative_tolerance": ("abc", "nan", "inf", "-1", "null", "true", "[0.1]", "'0.1'"),
    "calibration_samples": ("abc", "1.5", "0", "-5", "1e2", "true", "null", "1201"),
    "method.max_iterations": ("abc", "0", "1.5"),
    "method.tolerance": ("abc", "0", "nan"),
    "method.ridge": ("abc", "0", "inf"),
    "method.refit": ("fxed", "null"),
    "method.order": ("fxed",),
    "method.constraint": ("fxed",),
    "method.penalise_bias": ("1",),
    "method.raise_on_failure": ("maybe",),
    "seed": ("abc", "1.5", "-1", "null"),
    "workers": ("abc", "0"),
    "threads": ("abc", "0"),
    "device": ("cdua", "3"),
    "rerun": ("maybe",),
    "verbosity": ("loud",),
    "cache.enabled": ("maybe",),
    "cache.limit_gib": ("abc", "-1"),
    "dataset.held_out": ("abc", "0", "1400"),
    "goal.max_parameters": ("abc", "-1", "1.5"),
    "goal.kept_fraction": ("abc", "nan", "1.5"),
    "goal.max_output_error": ("abc", "inf"),
    "goal.max_accuracy_drop": ("abc", "-1"),
    "goal.min_agreement": ("abc", "2"),
    "goal.tolerances": ("[0.1,abc]", "0.1", "[]"),
    "goal.largest_layer": ("abc", "2"),
    "goal.trials": ("abc", "-1", "null"),
    "goal.trial_sizes": ("[0.1,2]", "[0.1,abc]", "0.1"),
    "goal.allocation": ("fxed", "null"),
    "network_refit.samples": ("abc", "0", "1400"),
    "network_refit.epochs": ("0", "1.5"),
    "network_refit.learning_rate": ("0", "nan"),
    "network_refit.temperature": ("abc", "-1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_the_wrong_kind_is_named_in_one_line(key, tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "prepare", lambda *_: pytest.fail("the network was loaded"))
    of_measured = ("goal.tolerances", "goal.largest_layer", "goal.trials", "goal.trial_sizes")
    own = [f"goal.kept_fraction={0.5 if key in of_measured else 'null'}"]
    if key.startswith("goal."):
        own.append("method.relative_tolerance=null")
    for value in WRONG[key]:
        cfg = configured(tmp_path, *own, f"{key}={value}")
        with pytest.raises(SettingError) as refused:
            sweeping.set_verbosity(cfg.verbosity)
            compress.run(cfg, group="g")
        assert str(refused.value).startswith(f"{key} is ")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["calibration_samples=1.5"], "calibration_samples is 1.5"),
        (["goal.kept_fraction=0.5"], "method.relative_tolerance is 0.5 and goal.kept_fraction"),
    ],
)
def test_a_single_run_that_is_refused_says_so_in_one_line(overrides, key, tmp_path):
    done = command(tmp_path, *QUICK, *overrides)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert key in line
    assert not (tmp_path / "results").exists()


def method_names() -> list[str]:
    return sorted(path.stem for path in (Path(CONFIG_PATH) / "method").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_a_method_has_a_tolerance_by_default_and_none_beside_a_goal(method):
    def composed(*overrides: str) -> DictConfig:
        with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
            return compose("compress", [f"method={method}", *overrides])

    assert composed().method.relative_tolerance == 0.1
    goal = composed("goal.kept_fraction=0.5")
    assert goal.method.relative_tolerance is None
    check_settings(goal)
    # The default, given by the user, is given all the same.
    for given in ("0.1", "0.3"):
        both = composed("goal.kept_fraction=0.5", f"method.relative_tolerance={given}")
        with pytest.raises(SettingError, match=r"method.relative_tolerance is .*, not both"):
            check_settings(both)


@pytest.mark.parametrize("given", ["tolerances=[0.1]", "largest_layer=0.5", "trials=3"])
def test_what_a_goal_is_sought_by_is_refused_without_a_goal(given, tmp_path):
    key = given.partition("=")[0]
    with pytest.raises(SettingError, match=rf"goal.{key} is given without a goal"):
        compress.run(configured(tmp_path, f"goal.{given}"), group="g")


@pytest.mark.parametrize("sizes", ["[0.5]", "[0.5,0.1]", "[0.1,0.2,0.3]"])
def test_sizes_of_trials_that_are_no_range_are_refused(sizes, tmp_path):
    own = ("goal.kept_fraction=0.5", "goal.trials=3", "method.relative_tolerance=null")
    with pytest.raises(SettingError, match=r"goal.trial_sizes is \["):
        compress.run(configured(tmp_path, *own, f"goal.trial_sizes={sizes}"), group="g")


def experiments() -> list[str]:
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return [*compose("paper").experiments, "suite=demo"]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", experiments())
def test_the_runs_of_every_experiment_are_allowed_and_found_in_the_tables(experiment):
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        _, runs = expanded(shlex.split(experiment))
        for run in (runs[0], runs[-1]):
            cfg = compose("compress", [*run, "finished_in=tables"])
            check_settings(cfg)
            if experiment != "suite=demo":
                assert state(cfg, run_key(cfg))[0] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["convex", "goals"])
def test_runs_are_known_by_the_names_that_the_committed_tables_have(suite):
    networks = "lenets" if suite == "convex" else "mnist"
    one_network = ("model=lenet_300_100", "seed=0", "method.refit=layer", "method.order=cascade")
    grid = (f"networks={networks}", f"suite={suite}", *one_network)
    runs = planned([*grid, "finished_in=tables"])
    assert {state(cfg, run_key(cfg))[0] for cfg in runs} == {"finished"}


def test_the_default_number_of_samples_is_no_more_than_there_are(tmp_path, digits):
    own = [each for each in QUICK if not each.startswith("calibration_samples")]
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        cfg = compose("compress", [*own, *places(tmp_path)])
        usual = [compose("compress", [f"dataset={name}"]) for name in ("mnist", "cifar10")]
    assert cfg.calibration_samples == len(digits.train)
    assert [each.calibration_samples for each in usual] == [5000, 5000]
    record, _ = compress.run(cfg, group="g")
    assert record["row"]["calibration_samples"] == len(digits.train)


@pytest.mark.slow
def test_on_a_terminal_a_line_shows_how_far_the_sweep_is(tmp_path):
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    arguments = ["-m", *QUICK, "method.relative_tolerance=0.5,0.6", *places(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compress", *arguments],
        stdout=subprocess.PIPE,
        stderr=terminal,
        timeout=PATIENCE,
    )
    os.close(terminal)
    shown = os.read(master, 1 << 16).decode()
    assert done.returncode == 0
    assert "sweep: 0 done, 0 failed, 2 remaining" in shown
    assert "sweep: 2 done, 0 failed, 0 remaining" in shown


def test_the_line_counts_and_estimates_from_what_was_computed():
    outcomes = [{"state": "finished", "skipped": True}, {"state": "finished"}, {"state": "failed"}]
    line = sweeping.progress_line(outcomes, total=13, elapsed=60)
    assert line == "sweep: 2 done, 1 failed, 10 remaining, about 5 min left"
    assert "left" not in sweeping.progress_line(outcomes[:1], total=13, elapsed=60)


@pytest.mark.parametrize(
    ("launcher", "extra"),
    [("joblib", "joblib"), ("submitit_local", "submitit"), ("slurm", "submitit"), ("ray", "ray")],
)
def test_a_launcher_that_is_not_installed_names_its_extra(launcher, extra, monkeypatch):
    monkeypatch.setattr(sweeping, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=rf'-e "\.\[{extra}\]"'):
        sweeping.check_launcher(["-m", f"launcher={launcher}"])
    sweeping.check_launcher(["-m", "launcher=local"])


def test_jobs_are_spread_over_several_gpus(monkeypatch):
    assert choose_device("cpu", job=3) == torch.device("cpu")
    assert choose_device("cuda:1", job=0) == torch.device("cuda:1")
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    chosen = [choose_device("auto", job) for job in range(5)]
    assert chosen == [torch.device("cuda", index) for index in (0, 1, 2, 0, 1)]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert choose_device("auto", job=1) == torch.device("cpu")


# Tracking


def no_account(folder: Path) -> dict[str, str]:
    return {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_API_KEY": ""}


def test_online_without_a_login_ends_at_once_with_the_command(tmp_path):
    online = ("tracking=wandb", "tracking.mode=online")
    sweep = ("-m", *QUICK, "method.relative_tolerance=0.5,0.6", *online)
    done = command(tmp_path, *sweep, **no_account(tmp_path))
    assert done.returncode == 1
    assert "wandb login" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_without_a_network_online_runs_are_logged_offline(tmp_path):
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "0"}
    online = ("tracking=wandb", "tracking.mode=online")
    done = command(tmp_path, *QUICK, *online, **{**no_account(tmp_path), **nobody})
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" in done.stdout
    assert len(list((tmp_path / "outputs/wandb").glob("offline-run-*"))) == 1
    assert len(read_records(tmp_path / "results/records")) == 1


def test_csv_tracking_writes_the_rows_of_the_record(tmp_path):
    record, _ = compress.run(configured(tmp_path, "tracking=csv"), group="sweep")
    folder = tmp_path / "outputs/csv/sweep"
    for name, rows in (("runs", [record["row"]]), ("layers", record["layers"])):
        with (folder / f"{name}.csv").open() as stream:
            read = list(csv.DictReader(stream))
        assert read == [{key: str(value) for key, value in row.items()} for row in rows]


def test_an_unknown_mode_is_named_with_what_would_be_right():
    tracking = OmegaConf.create({"name": "wandb", "mode": "onlin"})
    with pytest.raises(TrackingError, match=r"tracking.mode is 'onlin'.*'offline', 'online'"):
        check_tracking(tracking)


def test_tracking_finishes_a_run_that_raises(tmp_path):
    tracking = OmegaConf.create(
        {"name": "wandb", "mode": "offline", "project": "p", "directory": str(tmp_path)}
    )
    about = {"name": "n", "group": "g", "job_type": "compress", "config": {}}
    with pytest.raises(ZeroDivisionError), track(tracking, **about):
        _ = 1 / 0
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert exit_code(folder) == 1
