"""The table of singular values, made by its command on real digits, against values found anew."""

import subprocess
import sys

import pandas as pd
import pytest
import torch

from ddlr import capture_layers
from experiments.configuration import REPOSITORY
from experiments.networks import mlp_digits
from experiments.runs.checkpoints import checkpoint_path, load_checkpoint
from patience import PATIENCE

CHECKPOINTS = REPOSITORY / "results/checkpoints"


def command(folder, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(sys.executable, "-m", "experiments.spectrum", "dataset=digits", "model=mlp_digits"),
            *("calibration_samples=300", "relative_tolerance=0.2", "device=cpu"),
            *(f"results_dir={folder}", f"output_dir={folder}/outputs"),
            *(f"checkpoint_dir={CHECKPOINTS}", *overrides),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("spectrum")
    done = command(folder)
    assert done.returncode == 0, done.stderr
    return pd.read_csv(folder / "spectrum.csv")


def values(table: pd.DataFrame, method: str, refit: str, metric: str) -> torch.Tensor:
    chosen = (table["method"] == method) & (table["refit"] == refit) & (table["metric"] == metric)
    rows = table[chosen]
    assert list(rows["index"]) == list(range(1, len(rows) + 1))
    assert (rows["value"].diff().dropna() <= 0).all()
    return torch.tensor(rows["value"].to_numpy())


def test_the_original_values_are_those_of_its_weight_and_of_its_outputs(table, digits):
    network = mlp_digits()
    load_checkpoint(checkpoint_path(CHECKPOINTS, "mlp_digits", "digits", 0), network, "")
    layer = capture_layers(network, digits.calibration(300, seed=0)).layers[0]
    weight = layer.weight[layer.live_out][:, layer.live_in].double()
    outputs = layer.inputs[:, layer.live_in].double() @ weight.T
    outputs = (outputs - outputs.mean(dim=0)) / 300**0.5
    for metric, wanted in {"plain": weight, "input": outputs}.items():
        found = values(table, "original", "none", metric)
        expected = torch.linalg.svdvals(wanted)[: len(found)]
        assert len(found) == min(weight.shape)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected[0].item())
    assert table["relative_tolerance"].isna().equals(table["method"] == "original")


def test_ddlr_shrinks_and_its_refit_keeps_the_rank(table):
    original, shrunk = (values(table, method, "none", "plain") for method in ("original", "ddlr"))
    refitted = values(table, "ddlr", "layer", "plain")
    assert len(shrunk) == len(refitted) < len(original)
    # The original weight is feasible, so the least nuclear norm is below its own.
    assert shrunk.sum() < original.sum()
    assert shrunk[0] < original[0]


def test_activation_svd_keeps_the_leading_values_in_the_metric_of_the_inputs(table):
    original, kept = (values(table, m, "none", "input") for m in ("original", "activation_svd"))
    assert len(kept) < len(original)
    torch.testing.assert_close(kept, original[: len(kept)], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_an_unknown_layer_is_named_with_those_there_are(tmp_path):
    done = command(tmp_path, "layer=fc9")
    assert done.returncode != 0
    assert "layer is 'fc9'; the network has ['fc1', 'fc2', 'fc3']" in done.stderr
