"""Networks that others trained, from compression to a file and an export, with no special case."""

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

import ddlr
from experiments.configuration import CONFIG_PATH
from experiments.real.network import AsCalled, RealNetwork

# What keeps a network within the time and memory of a small machine: few samples, small images, and
# of the largest only a layer or two.
SMALL = {
    "sentence_encoder": ("network.longest=32",),
    "mtcnn_rnet": (),
    "mtcnn_onet": (),
    "alexnet": ("+network.layers=[classifier.6]",),
    "vgg16": ("+network.layers=[classifier.6]", "network.calibration_samples=4"),
    "vit_b_16": ("+network.layers=[encoder.layers.encoder_layer_0.mlp.0,heads.head]",),
}
SAMPLES = {
    "network.calibration_samples": 24,
    "network.searching_samples": 8,
    "network.choosing_samples": 2,
    "network.judging_samples": 6,
    "network.batch": 4,
}


def load(name: str, *overrides: str) -> RealNetwork:
    few = [f"{key}={value}" for key, value in SAMPLES.items()]
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        cfg = compose("real", overrides=[f"network={name}", *few, *overrides])
    return instantiate(cfg.network)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:too few calibration samples")
def test_a_network_is_compressed_saved_loaded_and_exported(name, tmp_path):
    network = load(name, *SMALL[name])
    result = ddlr.compress(
        network.model,
        network.data.calibration,
        relative_tolerance=0.5,
        method="lowest_rank",
        layers=network.layers,
        forward=network.forward,
    )
    assert any(layer.form == "low_rank" for layer in result.layers)
    wanted = network.outputs(result.model, network.data.judging)
    assert not torch.equal(wanted, network.outputs(network.model, network.data.judging))

    path = tmp_path / "small.safetensors"
    ddlr.save(result, path)
    dense = sum(4 * parameter.numel() for parameter in network.model.parameters())
    assert path.stat().st_size < dense
    loaded = ddlr.load(path, network.model)
    torch.testing.assert_close(
        network.outputs(loaded, network.data.judging), wanted, rtol=1e-4, atol=1e-4
    )

    example = network.data.judging[0]
    exported = torch.export.export(AsCalled(network, loaded).eval(), (example,))
    torch.testing.assert_close(
        exported.module()(example), wanted[: len(exported.module()(example))], rtol=1e-3, atol=1e-3
    )


def test_the_encoder_keeps_similarities_that_a_cut_of_its_weights_loses():
    samples = ("calibration_samples=150", "judging_samples=150", "batch=50")
    network = load("sentence_encoder", *(f"network.{each}" for each in samples))
    captured = ddlr.capture_layers(
        network.model, network.data.calibration, forward=network.forward, layers="encoder.*"
    )
    result = ddlr.compress(network.model, captured, relative_tolerance=0.13, method="lowest_rank")
    cut = copy.deepcopy(network.model)
    for layer in result.layers:
        truncate(cut.get_submodule(layer.name), layer.rank)
    kept = sum(layer.parameters_kept for layer in result.layers) / captured.weights
    quality = network.quality_of(result.model, network.data.judging)
    assert 0.3 < kept < 0.65
    assert quality > 0.7
    assert quality > network.quality_of(cut, network.data.judging) + 0.05


@torch.no_grad()
def truncate(layer: nn.Linear, rank: int) -> None:
    """The best weight of a rank, whatever the data."""
    left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
    layer.weight.copy_((left[:, :rank] * values[:rank]) @ right[:rank])
