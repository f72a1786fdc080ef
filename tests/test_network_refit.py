"""The label-free refit of a whole network: closer outputs, the same sizes, nothing else moved."""

import copy

import pytest
import torch
from torch import nn

import ddlr
import nettrim
from ddlr import refit_network
from ddlr.allocate import divergence
from ddlr.capture import outputs_of
from experiments.networks import mlp_digits
from experiments.training import train


@pytest.fixture(scope="module")
def network(digits) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(mlp_digits(), nn.Dropout(0.3))
    recipe = {"epochs": 15, "batch_size": 32, "learning_rate": 5e-3, "weight_decay": 1e-2}
    train(model, digits, **recipe, seed=0, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("method", [ddlr.compress, nettrim.prune], ids=["ddlr", "nettrim"])
def test_outputs_come_closer_at_the_same_size(method, network, digits):
    calibration = digits.calibration(500, seed=0)
    compressed = method(network, calibration, relative_tolerance=0.4, refit="fixed")
    names = [report.name for report in compressed.layers]
    state = copy.deepcopy(compressed.model.state_dict())
    modes = [module.training for module in compressed.model.modules()]
    refitted = refit_network(network, compressed.model, calibration, names, epochs=60)

    for inputs, less in ((calibration, 0.5), (digits.held_out.images, 0.8)):
        wanted = outputs_of(network, [inputs])
        before, after = (
            divergence(wanted, outputs_of(model, [inputs]))
            for model in (compressed.model, refitted)
        )
        assert after < less * before
    for key, value in compressed.model.state_dict().items():
        assert torch.equal(state[key], value)  # a copy was refitted
    for name in names:
        before, after = (model.get_submodule(name) for model in (compressed.model, refitted))
        for mine, theirs in zip(before.parameters(), after.parameters(), strict=True):
            assert mine.shape == theirs.shape
            if mine.ndim > 1:
                assert torch.equal(mine != 0, theirs != 0)
    assert [module.training for module in refitted.modules()] == modes
    assert all(parameter.requires_grad for parameter in refitted.parameters())


def test_only_the_named_layers_move_and_the_seed_decides(network, digits):
    calibration = digits.calibration(200, seed=0)
    compressed = ddlr.compress(network, calibration, relative_tolerance=0.4).model
    one, same, other = (
        refit_network(network, compressed, calibration, ["0.fc2"], epochs=2, seed=seed)
        for seed in (0, 0, 1)
    )
    for key, value in compressed.state_dict().items():
        assert torch.equal(value, one.state_dict()[key]) == ("fc2" not in key)
        assert torch.equal(one.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(one.get_submodule("0.fc2").weight, other.get_submodule("0.fc2").weight)
