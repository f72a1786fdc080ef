"""Timed heads compute what the compressed networks do, and the command writes a row a timing."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import doors
from ddlr import LowRankLinear
from ddlr.layers import store_linear
from experiments import inference
from experiments.configuration import CONFIG_PATH, REPOSITORY
from experiments.inference import CSRLinear, as_linear, head, in_stored_form
from experiments.networks import fc_nettrim, split_at_first_linear
from patience import PATIENCE

DIGITS = "heads=[{dataset: digits, model: mlp_digits}]"
CHECKPOINTS = f"checkpoint_dir={REPOSITORY}/results/checkpoints"


@pytest.mark.slow
def test_the_command_writes_a_row_for_each_network_tolerance_and_batch(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.inference", DIGITS, CHECKPOINTS),
            *("calibration_samples=300", "relative_tolerances=[0.05,0.3]", "seconds=0.001"),
            *(f"results_dir={tmp_path}", f"output_dir={tmp_path}/outputs"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "inference.csv")
    key = ["model", "method", "relative_tolerance", "batch"]
    wanted = [
        ("mlp_digits", method, tolerance, batch)
        for method in ("ddlr", "nettrim")
        for tolerance in (0.05, 0.3)
        for batch in (1, 256)
    ]
    assert list(table[key].itertuples(index=False, name=None)) == wanted
    assert (table[["microseconds", "microseconds_dense"]] > 0).all(axis=None)
    ratio = table["microseconds_dense"] / table["microseconds"]
    assert (ratio / table["speedup"] - 1).abs().max() < 1e-4
    assert (table["repetitions"] >= 1).all()
    for method, form in {"ddlr": "low_rank", "nettrim": "csr"}.items():
        rows = table[(table["method"] == method) & (table["relative_tolerance"] == 0.3)]
        assert set(rows["form"]) == {"+".join(3 * [form])}
    sizes = table.groupby(["method", "relative_tolerance"])["kept_fraction"].first().unstack()
    assert ((sizes[0.3] < sizes[0.05]) & (sizes[0.3] > 0)).all()


@pytest.mark.parametrize("method", [doors.compress, doors.prune])
@pytest.mark.parametrize("batch", [1, 7])
def test_a_head_in_stored_form_gives_the_outputs_of_the_compressed_network(method, batch):
    torch.manual_seed(0)
    _, network = split_at_first_linear(fc_nettrim())
    inputs = torch.rand(40, 784)
    result = method(network, inputs, relative_tolerance=0.02)
    timed = head(result.model, in_stored_form)
    with torch.inference_mode():
        wanted = result.model.eval()(inputs[:batch])
        for outputs in (timed(inputs[:batch]), head(result.model, as_linear)(inputs[:batch])):
            torch.testing.assert_close(outputs, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(timed(inputs[-batch:]), wanted, rtol=1e-4, atol=1e-5)
    form = LowRankLinear if method is doors.compress else CSRLinear
    assert sum(isinstance(layer, form) for layer in timed) >= 2
    assert not any(isinstance(layer, nn.Dropout) for layer in timed)


def test_a_sparse_layer_is_csr_where_that_is_what_it_stores():
    torch.manual_seed(0)
    for share, form in {0.3: CSRLinear, 0.9: nn.Linear, 1.0: nn.Linear}.items():
        weight = torch.randn(30, 40) * (torch.rand(30, 40) < share)
        assert type(in_stored_form(store_linear(weight, torch.zeros(30)))) is form


def configured(folder, *overrides: str) -> list[dict]:
    """The rows of the first run of a config."""
    places = (f"output_dir={folder}", CHECKPOINTS)
    samples = "calibration_samples=300"
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        cfg = compose("inference", overrides=[DIGITS, *places, samples, *overrides])
        return list(inference.timed(inference.runs(cfg)[0], cfg))


def test_a_form_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    class Wrong(CSRLinear):
        def forward(self, inputs):
            return super().forward(inputs) * (1 if len(inputs) == 1 else 1.01)

    monkeypatch.setattr(inference, "CSRLinear", Wrong)
    with pytest.raises(RuntimeError, match=r"mlp_digits nettrim .*differ by"):
        configured(tmp_path, "methods=[nettrim]", "seconds=0.001")


def test_a_batch_that_the_calibration_set_does_not_fill_is_named(tmp_path):
    with pytest.raises(ValueError, match="batches has 400, but calibration_samples is 300"):
        configured(tmp_path, "batches=[1,400]")
