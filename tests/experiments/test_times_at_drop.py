"""Times at equal drops: which runs are timed, that they are those of the table, and resuming."""

import subprocess
import sys

import pandas as pd
import pytest

from experiments.configuration import REPOSITORY
from experiments.report.tables import read_table
from experiments.times_at_drop import smallest_networks
from patience import PATIENCE


def rows(**columns) -> pd.DataFrame:
    usual = {"dataset": "mnist", "model": "lenet5", "seed": 0, "method": "alps", "refit": "layer"}
    length = len(next(iter(columns.values())))
    return pd.DataFrame({**{key: [value] * length for key, value in usual.items()}, **columns})


def test_each_method_has_its_smallest_network_within_the_drop():
    sweeps = pd.concat(
        [
            rows(
                run=["a", "b", "c"],
                kept_fraction=[0.01, 0.02, 0.03],
                accuracy_drop_held_out=[1.2, 0.9, 0.4],
            ),
            rows(
                run=["d", "e"],
                kept_fraction=[0.001, 0.05],
                accuracy_drop_held_out=[0.1, 0.6],
                method=["svd", "svd"],
                refit=["network", "none"],  # the first one's layers were trained together
            ),
        ],
        ignore_index=True,
    )
    found = {
        drop: list(chosen["run"])
        for drop in (0.5, 1.0, 0.05)
        for chosen in smallest_networks(sweeps, [drop])
    }
    assert found == {0.5: ["c"], 1.0: ["b", "e"]}


@pytest.mark.slow
def test_the_command_times_what_stands_in_the_table_and_not_twice(tmp_path):
    sweeps = pd.read_csv(REPOSITORY / "results/sweeps.csv", dtype={"run": str})
    chosen = sweeps[
        (sweeps["model"] == "lenet_300_100")
        & (sweeps["method"] == "svd")
        & (sweeps["seed"] == 0)
        & (sweeps["goal"].fillna("relative_tolerance") == "kept_fraction")
        & (sweeps["refit"] == "none")
        & (sweeps["accuracy_drop_held_out"] <= 1)
    ]
    # With one seed the settings have all seeds of their network.
    chosen.to_csv(tmp_path / "sweeps.csv", index=False)
    layers = pd.read_csv(REPOSITORY / "results/layers.csv", dtype={"run": str})
    layers = layers[layers["run"].isin(chosen["run"])]
    layers.to_csv(tmp_path / "layers.csv", index=False)
    command = [
        *(sys.executable, "-m", "experiments.times_at_drop", "drops=[1.0]", "rounds=2"),
        *("seconds=0.0001", "batches=[1,16]", f"results_dir={tmp_path}"),
        *(f"checkpoint_dir={REPOSITORY}/results/checkpoints", f"output_dir={tmp_path}/outputs"),
    ]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        assert "is sought again" not in done.stdout + done.stderr
    assert "timed" not in done.stdout + done.stderr  # the second time
    layers.assign(relative_tolerance=0.5).to_csv(tmp_path / "layers.csv", index=False)
    again = subprocess.run(
        [*command, "rerun=true"], cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE
    )
    assert again.returncode == 0, again.stderr
    assert "is sought again" in again.stdout + again.stderr
    table = read_table(tmp_path / "times_at_drop.csv")
    smallest = chosen.loc[chosen["kept_fraction"].idxmin()]
    assert set(table["run"]) == {smallest["run"]}
    assert list(zip(table["form"], table["batch"], strict=True)) == [
        (form, batch) for form in ("stored", "fused") for batch in (1, 16)
    ]
    assert (table["speedup"] > 0).all()
    assert (table["largest_drop"] == 1).all()
