"""Runs that compress to a goal: what their rows say, what they are known by, what they share."""

from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments import compress
from experiments.collect import merge
from experiments.configuration import CONFIG_PATH, REPOSITORY
from experiments.report.tables import at_one_tolerance, read_table, with_choices
from experiments.runs import preparation
from experiments.runs.records import read_records
from experiments.runs.units import read_record, record_path, run_key

TOLERANCES = (0.2, 0.5)
METHODS = {
    "lowest_rank": ("method=lowest_rank", "method.order=cascade"),
    "fewest_weights": ("method=fewest_weights", "method.refit=layer"),
    "svd": ("method=svd",),
    "nettrim": ("method=nettrim", "method.tolerance=0.1"),
}
GOALS = {"kept_fraction": 0.4, "max_accuracy_drop": 6.0}


def configured(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return compose(
            "compress",
            overrides=[
                *("dataset=digits", "model=mlp_digits", "calibration_samples=200"),
                *("tracking=none", "device=cpu", "goal.tolerances=[0.2,0.5]"),
                *(f"results_dir={folder}/results", f"output_dir={folder}/outputs"),
                *(f"checkpoint_dir={REPOSITORY}/results/checkpoints", *overrides),
            ],
        )


def run(folder: Path, *overrides: str) -> dict:
    return compress.run(configured(folder, *overrides), group="g")[0]


@pytest.fixture(autouse=True)
def nothing_in_memory():
    preparation.forget()


def numbers(record: dict) -> list[dict]:
    rows = [record["row"], *record["layers"]]
    return [{key: repr(row[key]) for key in row if key != "seconds"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_row_says_what_was_wanted_and_how_it_was_met(method, tmp_path):
    for goal, wanted in GOALS.items():
        cfg = configured(tmp_path, *METHODS[method], f"goal.{goal}={wanted}")
        compress.run(cfg, group="g")
        record = read_record(record_path(cfg, run_key(cfg)))
        row, layers = record["row"], record["layers"]
        assert (row["goal"], row["wanted"]) == (goal, wanted)
        assert row["relative_tolerance"] is None
        assert row["goal_met"] is True
        assert row["goal_measured"] <= wanted
        measured = {
            "kept_fraction": row["kept_fraction"],
            "max_accuracy_drop": row["accuracy_drop_held_out"],
        }
        assert row["goal_measured"] == pytest.approx(measured[goal], abs=1e-4)
        if goal == "max_accuracy_drop":
            assert row["goal_low"] <= row["goal_measured"] <= row["goal_high"]
        else:
            assert row["goal_low"] is row["goal_high"] is None
        assert row["networks_tried"] >= 1
        assert 0 < row["output_error"] <= row["output_bound"] * (1 + 1e-5)
        # Each layer has a tolerance of its own; in cascade what it comes to is in the report.
        asked = [layer["relative_tolerance"] for layer in layers]
        assert all(each in (0, *TOLERANCES) or each > 0.2 for each in asked)
        assert sum(layer["parameters_kept"] for layer in layers) == row["parameters_kept"]
        assert row["kept_fraction"] < 1


@pytest.mark.slow
def test_a_run_is_known_by_its_goal_and_not_by_the_tolerance_it_replaces(tmp_path):
    def key(*overrides: str) -> str:
        return run_key(configured(tmp_path, "method=lowest_rank", *overrides))

    half = key("goal.kept_fraction=0.5")
    assert key("goal.kept_fraction=0.5", "method.relative_tolerance=0.3") == half
    others = [
        key(),
        key("method.relative_tolerance=0.3"),
        key("goal.kept_fraction=0.4"),
        key("goal.min_agreement=0.5"),
        key("goal.max_accuracy_drop=0.5"),
        key("goal.kept_fraction=0.5", "goal.tolerances=[0.2]"),
        key("goal.kept_fraction=0.5", "goal.tolerances=null"),
        key("goal.kept_fraction=0.5", "goal.largest_layer=0.5"),
        key("goal.kept_fraction=0.5", "goal.trials=4"),
        key("goal.kept_fraction=0.5", "goal.trials=4", "goal.trial_sizes=[0.1,0.9]"),
        key("goal.kept_fraction=0.5", "method.refit=network"),
        key("goal.kept_fraction=0.5", "method.refit=network", "network_refit.samples=500"),
        key("goal.kept_fraction=0.5", "method.refit=network", "network_refit.temperature=8"),
        key("goal.kept_fraction=0.5", "method.order=cascade"),
        key("goal.kept_fraction=0.5", "seed=1"),
    ]
    assert len({half, *others}) == 1 + len(others)
    # Without a refit of the network as a whole, how it goes says nothing.
    assert key("goal.kept_fraction=0.5", "network_refit.samples=500") == half
    # Without a goal the tolerances of one say nothing.
    assert key("goal.tolerances=null") == key()


def test_two_goals_at_once_are_refused(tmp_path):
    with pytest.raises(ValueError, match="goal has kept_fraction, max_accuracy_drop; set one"):
        run(tmp_path, "method=svd", "goal.kept_fraction=0.5", "goal.max_accuracy_drop=1")
    assert not (tmp_path / "results").exists()


def test_one_threshold_for_all_layers_has_no_goal(tmp_path):
    with pytest.raises(ValueError, match=r"'magnitude_global' has one relative_tolerance"):
        run(tmp_path, "method=magnitude_global", "goal.kept_fraction=0.5")
    (record,) = read_records(tmp_path / "results/records")
    assert record["state"] == "failed"
    assert "take another method for goals" in record["error"]


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """An entry for each time that layers were tried alone."""
    calls, real = [], compress.layer_options

    def counted(*arguments, **options):
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(compress, "layer_options", counted)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_layers_do_alone_is_computed_once_and_changes_nothing(method, tmp_path, computed):
    goals = [f"goal.{goal}={wanted}" for goal, wanted in GOALS.items()]
    shared = [run(tmp_path / "shared", *METHODS[method], goal) for goal in goals]
    assert len(computed) == 1
    preparation.forget()  # as another process finds it
    again = [run(tmp_path / "shared", *METHODS[method], goal, "rerun=true") for goal in goals]
    assert len(computed) == 1
    plain = [
        run(tmp_path / "plain", *METHODS[method], goal, "cache.enabled=false") for goal in goals
    ]
    assert len(computed) == 3
    assert not (tmp_path / "plain/outputs/cache").exists()
    for one, two, other in zip(shared, again, plain, strict=True):
        assert numbers(one) == numbers(two) == numbers(other)


@pytest.mark.slow
def test_it_is_shared_by_what_has_the_same_layers_alone(tmp_path, computed):
    goal = ("method=lowest_rank", "goal.kept_fraction=0.4")
    steps = [
        (("method.refit=layer",), 1),
        (("method.refit=layer", "method.order=cascade"), 1),
        (("method.refit=network",), 1),  # begins as layer, each layer alone
        (("method.refit=none",), 2),
        (("method.refit=none", "goal.tolerances=[0.2]"), 3),
        (("method.refit=none", "calibration_samples=100"), 4),
        (("method=fewest_weights",), 5),
    ]
    for overrides, count in steps:
        run(tmp_path, *goal, *overrides)
        assert len(computed) == count, overrides


def test_an_entry_that_cannot_be_read_is_computed_anew(tmp_path, computed, caplog):
    goal = ("method=svd", "goal.kept_fraction=0.4", "rerun=true")
    first = run(tmp_path, *goal)
    (entry,) = (tmp_path / "outputs/cache").glob("*.json")
    whole = entry.read_text()
    entry.write_text(whole[: len(whole) // 2])
    assert numbers(run(tmp_path, *goal)) == numbers(first)
    assert "cannot be read" in caplog.text
    assert len(computed) == 2
    assert entry.read_text() == whole


@pytest.mark.parametrize("method", ["fewest_weights", "svd"])
def test_a_refit_of_the_network_keeps_to_the_size_and_the_accuracy(method, tmp_path):
    goal = (f"method={method}", "goal.kept_fraction=0.4")
    before = run(tmp_path, *goal, f"method.refit={'none' if method == 'svd' else 'layer'}")["row"]
    after = run(tmp_path, *goal, "method.refit=network")["row"]
    assert after["kept_fraction"] == before["kept_fraction"] == after["goal_measured"] <= 0.4
    assert after["status"] == "refitted" != before["status"]
    assert after["output_error"] != before["output_error"]
    assert after["accuracy_drop_held_out"] <= before["accuracy_drop_held_out"]


def test_rows_of_before_there_were_goals_have_the_goal_of_one_tolerance(tmp_path):
    row = run(tmp_path, "method=svd", "goal.kept_fraction=0.4")["row"]
    without_goal = ("goal.tolerances=null", "method.relative_tolerance=0.3")
    old = run(tmp_path, "method=svd", *without_goal)["row"]
    early = {key: old[key] for key in old if key not in ("goal", "wanted")} | {"run": "early"}
    path = tmp_path / "sweeps.csv"
    pd.DataFrame([early]).to_csv(path, index=False)
    assert read_table(path)[["goal", "wanted"]].values.tolist() == [["relative_tolerance", 0.3]]
    merge(path, pd.DataFrame([row, old]))
    table = read_table(path).set_index("run")
    assert table.loc["early", ["goal", "wanted"]].tolist() == ["relative_tolerance", 0.3]
    assert table.loc[old["run"], ["goal", "wanted"]].tolist() == ["relative_tolerance", 0.3]
    assert table.loc[row["run"], ["goal", "wanted"]].tolist() == ["kept_fraction", 0.4]
    assert pd.isna(table.loc[row["run"], "relative_tolerance"])
    assert set(at_one_tolerance(table).index) == {"early", old["run"]}
    assert with_choices(table).equals(table)
