"""Tables hold what finished runs recorded, and sizes follow from the whole of them."""

import logging
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from experiments import collect
from experiments.collect import merge, smallest_sizes
from experiments.runs.records import write_json


def row(run: str, kept: float, drop: float, test_drop: float = 0.0, **about) -> dict:
    """Of `sweeps.csv`; its setting is its kept fraction, unless another is given."""
    keys = ("dataset", "model", "method", "constraint", "refit", "order")
    row = {"run": run, **dict.fromkeys(keys, "x"), "ridge": 0.01, "calibration_samples": 500}
    row |= {"cascade_bound": "tolerance", "network_refit": ""}
    row |= {"goal": "relative_tolerance", "wanted": kept, "relative_tolerance": kept, "seed": 0}
    row |= {"kept_fraction": kept, "bytes_dense": 1000, "bytes_stored": 500 * kept}
    return row | {"accuracy_drop_held_out": drop, "accuracy_drop": test_drop, **about}


def record(folder: Path, run: dict, **content) -> None:
    layers = [{"run": run["run"], "layer": name, "rank": 3} for name in ("fc2", "fc1")]
    write_json(folder / f"{run['run']}.json", {"row": run, "layers": layers, **content})


def run_command(tmp_path: Path) -> None:
    collect.main(
        OmegaConf.create({"results_dir": f"{tmp_path}/tables", "record_dir": f"{tmp_path}/records"})
    )


def test_only_finished_runs_are_in_the_tables_and_failed_ones_are_named(tmp_path, caplog):
    (tmp_path / "records").mkdir()
    record(tmp_path / "records", row("a", 0.5, 0.1))
    # Should it have a row all the same, that is not a result.
    broken = {"state": "failed", "name": "the broken one", "error": "no memory"}
    record(tmp_path / "records", row("b", 0.1, 0.1), **broken)
    with caplog.at_level(logging.WARNING):
        run_command(tmp_path)
    assert "1 of 2 runs failed" in caplog.text and "the broken one" in caplog.text
    tables = tmp_path / "tables"
    assert list(pd.read_csv(tables / "sweeps.csv")["run"]) == ["a"]
    layers = pd.read_csv(tables / "layers.csv")
    assert list(zip(layers["run"], layers["layer"], strict=True)) == [("a", "fc2"), ("a", "fc1")]
    assert set(pd.read_csv(tables / "sizes.csv")["fraction"]) == {0.5, 0.25}


def test_a_column_without_values_leaves_the_numbers_of_earlier_rows_as_they_were(tmp_path):
    path = tmp_path / "table.csv"
    for run, gaps in {"a": [0.0, 0.123456789012], "b": [None, None]}.items():
        merge(path, pd.DataFrame({"run": run, "relative_gap": gaps}))
    assert path.read_text().split() == ["run,relative_gap", "a,0", "a,0.12345679", "b,", "b,"]


def test_sizes_follow_from_rows_of_earlier_records_too(tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    record(records, row("a", 0.5, 0.1))
    run_command(tmp_path)
    (records / "a.json").unlink()
    record(records, row("b", 0.8, 0.1))
    run_command(tmp_path)
    sweeps, sizes = (pd.read_csv(tmp_path / f"tables/{name}.csv") for name in ("sweeps", "sizes"))
    assert sorted(sweeps["run"]) == ["a", "b"]
    assert set(sizes.loc[sizes["counted"] == "weights", "wanted"]) == {0.5}
    # Without any record the table stays, and so do they.
    (records / "b.json").unlink()
    (tmp_path / "tables/sizes.csv").unlink()
    run_command(tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tables/sweeps.csv"), sweeps)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tables/sizes.csv"), sizes)


def test_without_records_and_tables_nothing_is_written(tmp_path, caplog):
    (tmp_path / "records").mkdir()
    run_command(tmp_path)
    assert "holds no finished record" in caplog.text
    assert not (tmp_path / "tables").exists()


def test_the_layers_of_a_run_keep_the_order_of_the_network(tmp_path):
    names = [f"fc{place}" for place in range(40, 0, -1)]
    rows = [{"run": run, "layer": name} for name in names for run in ("b", "a")]
    merge(tmp_path / "layers.csv", pd.DataFrame(rows))
    table = pd.read_csv(tmp_path / "layers.csv")
    for run in ("a", "b"):
        assert list(table.loc[table["run"] == run, "layer"]) == names


@pytest.mark.parametrize("drop", [0.5, 1.0])
def test_a_drop_that_is_just_allowed_is_allowed_and_the_smallest_within_it_is_chosen(drop):
    rows = [row("a", 0.5, 0.0), row("b", 0.3, drop), row("c", 0.4, drop), row("d", 0.1, drop + 0.1)]
    table = pd.DataFrame(rows).assign(bytes_fraction=[0.1, 0.4, 0.2, 0.05])
    sizes = smallest_sizes(table)
    sizes = sizes[sizes["largest_drop"] == drop].set_index("counted")["wanted"]
    # What is smallest in weights need not be so in bytes.
    assert (sizes["weights"], sizes["bytes"]) == (0.3, 0.5)


def test_the_test_set_chooses_nothing():
    rows = [row("a", 0.5, 0.1, 5.0), row("b", 0.2, 2.0, 0.0)]
    sizes = smallest_sizes(pd.DataFrame(rows).assign(bytes_fraction=0.5))
    assert set(sizes["wanted"]) == {0.5}
    assert set(sizes["accuracy_drop"]) == {5.0}


def test_each_variant_and_goal_has_a_size_of_its_own():
    variants = [
        {},
        {"refit": "layer"},
        {"order": "cascade"},
        {"ridge": 1.0},
        {"goal": "kept_fraction"},
        {"method": "y"},
        {"calibration_samples": 900},
    ]
    rows = [row(str(place), 0.3, 0.1, **about) for place, about in enumerate(variants)]
    sizes = smallest_sizes(pd.DataFrame(rows).assign(bytes_fraction=0.5))
    assert len(sizes) == 4 * len(variants)  # two drops, two ways of counting


def test_runs_that_the_tables_cannot_tell_apart_are_named(tmp_path, caplog):
    (tmp_path / "records").mkdir()
    for name, kept in (("a", 0.5), ("b", 0.4)):
        record(tmp_path / "records", row(name, kept, 0.1, wanted=0.5))
    with caplog.at_level(logging.WARNING):
        run_command(tmp_path)
    assert "2 runs are the same as another" in caplog.text and "a, b" in caplog.text


def test_runs_of_another_seed_or_setting_are_told_apart(tmp_path, caplog):
    (tmp_path / "records").mkdir()
    for name, about in (("a", {}), ("b", {"seed": 1}), ("c", {"ridge": 1.0})):
        record(tmp_path / "records", row(name, 0.5, 0.1, **about))
    with caplog.at_level(logging.WARNING):
        run_command(tmp_path)
    assert not caplog.text
