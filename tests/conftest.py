"""What the tests share: data, a network trained on it, and what its layers saw. No downloads."""

import pytest
from torch import nn

import ddlr
from ddlr import CapturedLayers
from experiments.configuration import REPOSITORY
from experiments.data import Dataset, load_dataset
from experiments.networks import mlp_digits
from experiments.runs.checkpoints import checkpoint_path, load_checkpoint


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits", "unused", held_out=200)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    model = mlp_digits()
    path = checkpoint_path(REPOSITORY / "results/checkpoints", "mlp_digits", "digits", 0)
    load_checkpoint(path, model, "")
    return model.eval()


@pytest.fixture(scope="module")
def captured(network, digits) -> CapturedLayers:
    return ddlr.capture_layers(network, digits.calibration(300, seed=0))
