"""Files are written whole or not at all, and tables merge by run."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from torch import nn

from experiments.collect import merge, smallest_sizes
from experiments.runs.checkpoints import (
    CheckpointError,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
)
from experiments.runs.records import identity, read_records, write_json, write_whole


def test_an_interrupted_write_leaves_the_old_file_and_no_scratch(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("complete")

    def interrupted(scratch):
        scratch.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_text() == "complete"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_being_written_is_not_read_as_a_record(tmp_path):
    write_json(tmp_path / "a.json", {"row": {}, "layers": []})
    seen = []

    def killed_after_this(scratch):
        shutil.copy(tmp_path / "a.json", scratch)
        seen.append(read_records(tmp_path))

    write_whole(tmp_path / "b.json", killed_after_this)
    assert [len(records) for records in [*seen, read_records(tmp_path)]] == [1, 2]


def test_records_are_strict_json_and_others_are_named(tmp_path):
    write_json(tmp_path / "a.json", {"row": {"gap": math.nan}, "layers": [{"x": 1.5}]})
    read = {"row": {"gap": None}, "layers": [{"x": 1.5}], "state": "finished"}
    assert read_records(tmp_path) == [read]
    (tmp_path / "b.json").write_text(json.dumps({"no": "record"}))
    with pytest.raises(ValueError, match=r"b\.json is not a run record"):
        read_records(tmp_path)


def test_identity_depends_on_content_alone():
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})
    assert identity({"a": 1}) != identity({"a": 2})


def rows(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns)


def test_a_rerun_replaces_its_earlier_self_and_other_rows_stay(tmp_path):
    path = tmp_path / "layers.csv"
    merge(path, rows(run=["b", "b", "a"], layer=["fc2", "fc1", "fc1"], rank=[1, 2, 3]))
    merge(path, rows(run=["b"], layer=["fc2"], rank=[9]))
    merge(path, rows(run=["c"], layer=["fc1"], rank=[4], new=[0.5]))
    table = pd.read_csv(path)
    assert list(zip(table["run"], table["layer"], table["rank"], strict=True)) == [
        ("a", "fc1", 3),
        ("b", "fc2", 9),
        ("c", "fc1", 4),
    ]


def test_checkpoints_come_back_and_mismatches_are_refused(tmp_path):
    path = checkpoint_path(tmp_path, "net", "digits", 0)
    with pytest.raises(CheckpointError, match="make it with\n  train it"):
        load_checkpoint(path, nn.Linear(3, 2), "train it")
    network = nn.Linear(3, 2)
    save_checkpoint(path, network, {"seed": 0})
    again = nn.Linear(3, 2)
    assert load_checkpoint(path, again, "train it")["seed"] == 0
    assert torch.equal(again.weight, network.weight)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        load_checkpoint(path, nn.Linear(4, 2), "train it")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is not what net_digits_seed0\.json describes"):
        load_checkpoint(path, again, "train it")
    path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match="is missing beside"):
        load_checkpoint(path, again, "train it")


def settings(*rows_: tuple, **columns) -> pd.DataFrame:
    """Rows of `sweeps.csv`: tolerance, seed, kept, held-out drop, test drop; bytes are twice."""
    names = ("wanted", "seed", "kept_fraction", "accuracy_drop_held_out")
    table = pd.DataFrame(rows_, columns=[*names, "accuracy_drop"])
    table["bytes_fraction"] = 2 * table["kept_fraction"]
    keys = ("dataset", "model", "method", "constraint", "refit", "order", "goal")
    about = {key: "x" for key in keys}
    return table.assign(
        **{
            **about,
            "cascade_bound": "tolerance",
            "network_refit": "",
            "ridge": 0.01,
            "calibration_samples": 500,
            **columns,
        }
    )


def test_sizes_are_chosen_by_held_out_samples_and_the_test_set_is_reported():
    table = settings(
        (0.1, 0, 0.5, 0.1, 9.0),
        (0.1, 1, 0.7, 0.3, 5.0),
        (0.2, 0, 0.4, 0.2, 0.1),
        (0.2, 1, 0.2, 1.0, 0.3),
        (0.3, 0, 0.1, 2.0, 0.0),
        (0.3, 1, 0.1, 0.5, 0.0),
    )
    sizes = smallest_sizes(table)
    weights = sizes[sizes["counted"] == "weights"].set_index("largest_drop")
    assert list(weights.index) == [0.5, 1.0]
    tight, loose = weights.loc[0.5], weights.loc[1.0]
    # Means over seeds of the held-out drop: 0.2, 0.6 and 1.25.
    assert (tight["wanted"], loose["wanted"]) == (0.1, 0.2)
    assert (tight["fraction"], tight["fraction_min"], tight["fraction_max"]) == (0.6, 0.5, 0.7)
    assert tight["accuracy_drop_held_out"] == 0.2
    drops = ("accuracy_drop", "accuracy_drop_min", "accuracy_drop_max")
    assert [tight[drop] for drop in drops] == [7.0, 5.0, 9.0]
    assert loose["seeds"] == 2
    in_bytes = sizes[sizes["counted"] == "bytes"].set_index("largest_drop")
    assert list(in_bytes["fraction"]) == [1.2, 0.6]


def test_sizes_leave_out_settings_that_lack_a_seed_and_keep_sample_numbers_apart():
    table = settings(
        (0.1, 0, 0.5, 0.1, 0.1), (0.1, 1, 0.5, 0.1, 0.1), (0.2, 0, 0.2, 0.1, 0.1), model="a"
    )
    more = settings((0.1, 0, 0.3, 0.1, 0.1), (0.1, 1, 0.3, 0.1, 0.1), model="a")
    other = settings((0.3, 5, 0.1, 0.4, 0.1), model="b")
    sizes = smallest_sizes(pd.concat([table, more.assign(calibration_samples=900), other]))
    sizes = sizes[(sizes["counted"] == "weights") & (sizes["largest_drop"] == 0.5)]
    chosen = sizes[["model", "calibration_samples", "fraction", "seeds"]].to_numpy().tolist()
    assert chosen == [["a", 500, 0.5, 2], ["a", 900, 0.3, 2], ["b", 500, 0.1, 1]]
