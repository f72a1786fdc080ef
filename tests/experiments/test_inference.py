"""The command writes the times of each method's network, which keeps the accuracy it is to keep."""

import subprocess
import sys

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments import inference
from experiments.configuration import CONFIG_PATH, REPOSITORY, SettingError
from experiments.runs.checks import check_settings
from patience import PATIENCE

DIGITS = "heads=[{dataset: digits, model: mlp_digits}]"
CHECKPOINTS = f"checkpoint_dir={REPOSITORY}/results/checkpoints"


@pytest.mark.slow
def test_the_command_writes_a_row_for_each_method_form_engine_and_batch(tmp_path):
    known = ["dataset", "model", "method", "engine", "microseconds"]
    others = [
        ("mnist", "other", "magnitude", "torch", 1.0),
        ("digits", "mlp_digits", "nettrim", "torch", 2.0),
        ("digits", "mlp_digits", "magnitude", "compiled", 3.0),
        ("digits", "mlp_digits", "magnitude", "torch", 4.0),
    ]
    pd.DataFrame(others, columns=known).to_csv(tmp_path / "inference.csv", index=False)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.inference", DIGITS, CHECKPOINTS),
            *("methods=[fewest_weights,magnitude]", "engines=[torch,onnxruntime]"),
            *("batches=[1,16]", "threads=[1]", "rounds=2", "seconds=0.0001"),
            *(f"results_dir={tmp_path}", f"output_dir={tmp_path}/outputs"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "inference.csv")
    # Of the rows that were there only that of the same network, method and engine is replaced.
    assert list(table[known].itertuples(index=False, name=None))[:3] == others[:3]
    table = table.iloc[3:]
    wanted = [
        ("mlp_digits", method, form, engine, 1, batch)
        for method in ("fewest_weights", "magnitude")
        for form in ("stored", "fused")
        for engine in ("torch", "onnxruntime")
        for batch in (1, 16)
    ]
    key = ["model", "method", "form", "engine", "threads", "batch"]
    assert list(table[key].itertuples(index=False, name=None)) == wanted
    assert (table[["microseconds", "microseconds_dense", "load_milliseconds"]] > 0).all(axis=None)
    assert (table["accuracy_drop_held_out"] <= 1).all()
    for value, quotient in {
        "speedup": table["microseconds_dense"] / table["microseconds"],
        "promised": table["multiplications_dense"] / table["multiplications"],
        "share_of_promise": table["speedup"] / table["promised"],
        "kept_fraction": table["multiplications"] / table["multiplications_dense"],
    }.items():
        assert (table[value] / quotient - 1).abs().max() < 1e-4, value
    # All have been timed beside the same dense network.
    beside = table.groupby(["engine", "batch"])["microseconds_dense"].nunique()
    assert (beside == 1).all()
    assert (table["file_bytes"] < table["file_bytes_dense"]).all()


def configured(*overrides: str):
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return compose("inference", overrides=[*overrides])


def test_all_runs_that_are_timed_can_be_made():
    cfg = configured()
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        runs = [
            inference.run_of(network, method, cfg)
            for network in cfg.heads
            for method in cfg.methods
        ]
    assert len(runs) == len(cfg.heads) * len(cfg.methods)
    for run in runs:
        check_settings(run)
        assert run.goal.max_accuracy_drop == 1 and run.method.relative_tolerance is None
        refit = "none" if run.method.name in ("activation_svd", "magnitude") else "layer"
        assert run.method.refit == refit


def test_a_method_without_settings_is_named():
    cfg = configured("methods=[svd]")
    with pytest.raises(SettingError, match=r"settings has no mnist\.svd"):
        inference.run_of(cfg.heads[0], "svd", cfg)
