"""The whole path as a user walks it, on real digits: train, sweep, collect, plot, read wandb."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_method

from commands import DIGITS, command
from experiments.configuration import CONFIG_PATH, REPOSITORY
from experiments.runs.records import read_records
from offline_wandb import entries

# What a sweep of both methods as published has the data for.
DRAWN = ("frontier_weights", "frontier_bytes", "layers", "bound")


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A folder after training and a sweep of both methods at two tolerances."""
    folder = tmp_path_factory.mktemp("elsewhere")
    done = command("train_baseline", *DIGITS, "model.training.epochs=15", folder=folder)
    assert done.returncode == 0, done.stderr
    done = command(
        "compress",
        "-m",
        *DIGITS,
        "calibration_samples=300",
        "method=ddlr,nettrim",
        "method.relative_tolerance=0.1,0.3",
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    done = command("collect", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_checkpoint_says_what_it_is_and_is_not_overwritten(swept):
    path = swept / "results/checkpoints/mlp_digits_digits_seed0.safetensors"
    described = json.loads(path.with_suffix(".json").read_text())
    assert described["accuracy"]["test"] > 90
    assert described["seed"] == 0
    assert {"config", "data_sha256", "provenance", "sha256"} <= set(described)
    before = path.read_bytes()
    done = command("train_baseline", *DIGITS, "model.training.epochs=1", folder=swept)
    assert "overwrite=true" in done.stdout
    assert path.read_bytes() == before


def test_records_hold_config_versions_and_checkpoint(swept):
    records = read_records(swept / "results/records")
    assert len(records) == 4
    for record in records:
        assert record["config"]["calibration_samples"] == 300
        assert record["provenance"]["versions"]["torch"]
        assert record["checkpoint"]["model"] == "mlp_digits"
        assert len(record["layers"]) == 3


def test_tables_hold_a_row_a_run_and_a_row_a_layer(swept):
    sweeps = pd.read_csv(swept / "results/sweeps.csv")
    layers = pd.read_csv(swept / "results/layers.csv")
    assert sorted(zip(sweeps["method"], sweeps["relative_tolerance"], strict=True)) == [
        ("ddlr", 0.1),
        ("ddlr", 0.3),
        ("nettrim", 0.1),
        ("nettrim", 0.3),
    ]
    assert (sweeps["status"] == "converged").all()
    assert (sweeps["worst_violation"] <= 1e-3).all()
    assert (sweeps["worst_relative_gap"] <= 1e-2).all()
    drop = sweeps["accuracy_dense"] - sweeps["accuracy"]
    assert (drop - sweeps["accuracy_drop"]).abs().max() < 1e-3
    # The two tables tell of the same networks.
    total = layers.groupby("run")[["parameters_kept", "parameters_dense", "bytes_stored"]].sum()
    for column in total:
        assert (sweeps.set_index("run")[column].sort_index() == total[column].sort_index()).all()
    assert (layers["relative_error_read"] <= layers["relative_tolerance"] * (1 + 1e-3)).all()


def test_the_summary_has_a_line_a_method_and_says_where_to_look(swept):
    done = command("summary", folder=swept)
    assert done.returncode == 0, done.stderr
    sweeps = pd.read_csv(swept / "results/sweeps.csv").set_index(["method", "relative_tolerance"])
    for method in ("ddlr", "nettrim"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(method)]
        rows = sweeps.loc[method].sort_index()
        cells = [f"{100 * row.kept_fraction:.1f} / {row.accuracy:.1f}" for row in rows.itertuples()]
        assert line.split()[1:] == " ".join(cells).split()
    assert f"{swept}/results/sweeps.csv: one row per run" in done.stdout
    assert len(done.stdout.splitlines()) < 24


def test_the_demo_writes_into_a_folder_of_its_own_and_needs_no_download():
    shown = subprocess.run(
        ["make", "-n", "demo"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    steps = [line for line in shown.stdout.splitlines() if "-m experiments." in line]
    names = ("train_baseline", "compress", "compress", "collect", "plot", "summary")
    assert len(steps) == len(names)
    for step, name in zip(steps, names, strict=True):
        assert f"-m experiments.{name} " in step
        assert "results_dir=demo output_dir=demo/outputs" in step
    assert "demo/" in (REPOSITORY / ".gitignore").read_text().splitlines()
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        cfg = compose("compress", overrides=["suite=demo"])
    assert (cfg.dataset.name, cfg.model.name, cfg.tracking.name) == ("digits", "mlp_digits", "none")


@pytest.mark.slow
def test_a_rerun_gives_the_same_numbers_in_the_same_row(swept):
    before = pd.read_csv(swept / "results/sweeps.csv").drop(columns="seconds")
    overrides = ("calibration_samples=300", "method=nettrim", "method.relative_tolerance=0.3")
    again = ("tracking=none", "rerun=true")
    done = command("compress", *DIGITS, *overrides, *again, folder=swept)
    assert done.returncode == 0, done.stderr
    assert command("collect", folder=swept).returncode == 0
    after = pd.read_csv(swept / "results/sweeps.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(before, after)


@pytest.mark.slow
def test_figures_are_drawn_from_the_table_alone(swept):
    done = command("plot", folder=swept)
    assert done.returncode == 0, done.stderr
    for name in DRAWN:
        assert (swept / f"results/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "no inference.png without inference.csv; python -m experiments.inference" in done.stdout
    assert "no order.png: sweeps.csv has no rows for it; python -m experiments.paper" in done.stdout
    code = "import sys, experiments.plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_offline_wandb_runs_of_a_sweep_can_be_read_back(swept):
    runs = [
        read_wandb(folder) for folder in sorted((swept / "outputs/wandb").glob("offline-run-*"))
    ]
    runs = [run for run in runs if run["job_type"] != "plot"]
    assert sorted(run["job_type"] for run in runs) == [*4 * ["compress"], "sweep"]
    assert len({run["group"] for run in runs}) == 1
    rows = pd.read_csv(swept / "results/sweeps.csv").set_index("run")
    for run in runs:
        if run["job_type"] == "sweep":
            continue
        row = rows.loc[run["summary"]["run"]]
        assert run["summary"]["accuracy"] == pytest.approx(row["accuracy"])
        assert run["config"]["method"]["relative_tolerance"] == row["relative_tolerance"]
        assert run["tags"] == sorted(["compress", "digits", "mlp_digits", row["method"]])
        table = run["tables"]["layers"]
        assert list(table["layer"]) == ["fc1", "fc2", "fc3"]
        assert run["summary"]["layer/fc2/rank"] == table["rank"][1]


@pytest.mark.slow
def test_the_run_of_a_sweep_holds_its_rows_and_its_frontier(swept):
    runs = [read_wandb(folder) for folder in (swept / "outputs/wandb").glob("offline-run-*")]
    (sweep,) = [run for run in runs if run["job_type"] == "sweep"]
    rows = pd.read_csv(swept / "results/sweeps.csv")
    table = sweep["tables"]["runs"]
    assert sorted(table["run"]) == sorted(rows["run"])
    (chart,) = [table for name, table in sweep["tables"].items() if name.startswith("frontier")]
    assert sorted(chart["lineVal"].round(4)) == sorted(rows["accuracy"])
    assert chart["step"].round(6).tolist() == pytest.approx(
        rows.sort_values(["method", "kept_fraction"])["kept_fraction"].tolist(), abs=1e-5
    )


@pytest.mark.slow
def test_figures_are_logged_with_the_table_they_are_drawn_from(swept):
    done = command("plot", "group=mine", folder=swept)
    assert done.returncode == 0, done.stderr
    folders = [
        folder
        for folder in (swept / "outputs/wandb").glob("offline-run-*")
        if read_wandb(folder)["group"] == "mine"
    ]
    assert len(folders) == 1
    images = sorted((folders[0] / "files/media/images").glob("*.png"))
    assert [image.name.partition("_0_")[0] for image in images] == sorted(DRAWN)
    run = read_wandb(folders[0])
    assert run["job_type"] == "plot"
    assert len(run["tables"]["runs"]) == 4


def read_wandb(folder: Path) -> dict:
    """What an offline run holds, as wandb itself reads it back; tables by their name."""
    found = entries(folder)
    run = next(entry["run"] for entry in found if entry["type"] == "run")
    summary, tables = {}, {}
    for entry in found:
        summary |= entry.get("summary", {}).get("update", {})
    for path in (folder / "files/media/table").glob("*.table.json"):
        content = json.loads(path.read_text())
        frame = pd.DataFrame(content["data"], columns=content["columns"])
        tables[path.name.partition("_0_")[0]] = frame
    return {
        "group": run["run_group"],
        "job_type": run["job_type"],
        "tags": sorted(run.get("tags", [])),
        "config": run["config"]["update"],
        "summary": summary,
        "tables": tables,
    }


@pytest.mark.slow
def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    done = command("compress", *DIGITS, "seed=7", "tracking=none", folder=tmp_path)
    assert done.returncode != 0
    making = "python -m experiments.train_baseline model=mlp_digits dataset=digits seed=7"
    assert making in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("method=ddlrr", ["Could not find 'method/ddlrr'", "ddlr", "nettrim"]),
        ("method.tolerence=1e-3", ["Could not override 'method.tolerence'"]),
        ("model=lenet5", ["does not take images of shape (1, 8, 8)", "mlp_digits"]),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(override, messages, tmp_path):
    name = "train_baseline" if override.startswith("model") else "compress"
    done = command(name, "dataset=digits", override, folder=tmp_path)
    assert done.returncode != 0
    for message in messages:
        assert message in done.stderr


def config_choices() -> list[tuple[str, ...]]:
    conf = Path(CONFIG_PATH)
    groups = ("dataset", "model", "method", "tracking", "networks")
    choices = [(f"{group}={path.stem}",) for group in groups for path in conf.glob(f"{group}/*")]
    choices.append(("launcher=local",))  # the others need their extras: tests_distributed
    return choices


@pytest.mark.slow
@pytest.mark.parametrize("overrides", config_choices(), ids="".join)
def test_every_choice_composes_and_its_target_exists(overrides):
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        cfg = compose("compress", overrides=list(overrides))
    for group in ("dataset", "model", "method"):
        assert callable(get_method(cfg[group]._target_))
        assert cfg[group].name
    assert REPOSITORY / "results" == Path(cfg.results_dir)
