"""The label-free refit of a whole network: closer outputs, the same sizes, nothing else moved."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

import ddlr
import doors
from ddlr import CapturedLayers, NetworkRefit, Settings, SolverStatus, refit_network
from ddlr.layers import numerical_rank
from ddlr.outputs import divergence
from ddlr.sizes import layer_size
from doors import activation_svd, magnitude, magnitude_global, outputs_of, svd
from experiments.networks import mlp_digits
from experiments.training import train


@pytest.fixture(scope="module")
def network(digits) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(mlp_digits(), nn.Dropout(0.3))
    recipe = {"epochs": 15, "batch_size": 32, "learning_rate": 5e-3, "weight_decay": 1e-2}
    train(model, digits, **recipe, seed=0, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("method", [doors.compress, doors.prune], ids=["ddlr", "nettrim"])
def test_outputs_come_closer_at_the_same_size(method, network, digits):
    calibration = digits.calibration(500, seed=0)
    compressed = method(network, calibration, relative_tolerance=0.4, refit="layer")
    names = [report.name for report in compressed.layers]
    state = copy.deepcopy(compressed.model.state_dict())
    modes = [module.training for module in compressed.model.modules()]
    refitted = refit_network(
        network, compressed.model, calibration, names, output="classes", epochs=60
    )

    for inputs, less in ((calibration, 0.5), (digits.held_out.images, 0.8)):
        wanted = outputs_of(network, [inputs])
        before, after = (
            divergence(wanted, outputs_of(model, [inputs]), "classes")
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
    compressed = doors.compress(network, calibration, relative_tolerance=0.4).model
    one, same, other = (
        refit_network(
            network, compressed, calibration, ["0.fc2"], output="classes", epochs=2, seed=seed
        )
        for seed in (0, 0, 1)
    )
    for key, value in compressed.state_dict().items():
        assert torch.equal(value, one.state_dict()[key]) == ("fc2" not in key)
        assert torch.equal(one.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(one.get_submodule("0.fc2").weight, other.get_submodule("0.fc2").weight)


# As a refit of every method

LOOSE = {"constraint": "hinge", "tolerance": 0.1}
CLOSED = {
    name: functools.partial(method, output="classes")
    for name, method in {
        "svd": svd,
        "activation_svd": activation_svd,
        "magnitude": magnitude,
        "magnitude_global": magnitude_global,
    }.items()
}
METHODS = {
    "ddlr": functools.partial(doors.compress, output="classes", **LOOSE),
    "nettrim": functools.partial(doors.prune, output="classes", **LOOSE),
    "lowest_rank": functools.partial(doors.compress, method="lowest_rank", output="classes"),
    "fewest_weights": functools.partial(doors.compress, method="fewest_weights", output="classes"),
}
ORDERS = [(name, order) for name in METHODS for order in ("parallel", "cascade")]


@pytest.fixture(scope="module")
def captured(network, digits) -> CapturedLayers:
    return ddlr.capture_layers(network, digits.calibration(300, seed=0))


def error_and_violation(after, layer, stored, inputs, bound: float) -> tuple[float, float]:
    """The relative error, and by how much ||D||_F is over its bound, of outputs that are read."""
    read = ~after.unread[layer.name]
    produced, targets = stored(inputs)[:, read].double(), layer.targets[:, read].double()
    norm = (targets if after.drops_unread else layer.targets.double()).norm()
    relu = layer.activation == "relu"
    error = ((produced.relu() if relu else produced) - targets).norm() / norm
    off = (targets == 0) & relu
    deviation = torch.where(off, produced.clamp(min=0), produced - targets).norm() / norm
    return error.item(), max(0.0, deviation.item() / bound - 1)


@torch.no_grad()
def assert_refitted(before, after, network, digits, captured) -> None:
    inputs = digits.held_out.images
    wanted = outputs_of(network, [inputs])
    apart, closer = (
        divergence(wanted, outputs_of(result.model, [inputs]), "classes")
        for result in (before, after)
    )
    assert closer < apart
    assert before.order == after.order
    got = captured.layers[0].inputs
    for layer, old, new in zip(captured.layers, before.layers, after.layers, strict=True):
        one, other = (result.model.get_submodule(layer.name) for result in (before, after))
        assert numerical_rank(one.weight) == numerical_rank(other.weight) == new.rank == old.rank
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine != 0, theirs != 0) or mine.ndim == 1
        assert layer_size(other) == layer_size(one)
        assert (new.form, new.parameters_kept) == (old.form, old.parameters_kept)
        assert new.outputs_dropped == old.outputs_dropped
        assert new.status is SolverStatus.REFITTED
        assert math.isnan(new.relative_gap)
        assert new.relative_tolerance == old.relative_tolerance
        seen = got if after.order == "cascade" else layer.inputs
        error, violation = error_and_violation(after, layer, other, seen, new.relative_bound)
        read = new.relative_error_read
        assert read == pytest.approx(error, rel=1e-4) != old.relative_error_read
        assert new.violation == pytest.approx(violation, abs=1e-4)
        got = other(got).relu()


@pytest.mark.parametrize(("method", "order"), ORDERS)
def test_it_goes_on_from_the_layer_refit_of_each_method(method, order, network, digits, captured):
    before, after = (
        METHODS[method](network, captured, relative_tolerance=0.1, order=order, refit=refit)
        for refit in ("layer", "network")
    )
    assert_refitted(before, after, network, digits, captured)


@pytest.mark.parametrize("method", CLOSED)
def test_it_goes_on_from_the_closed_forms(method, network, digits, captured):
    before, after = (
        CLOSED[method](network, captured, relative_tolerance=0.1, refit=refit)
        for refit in ("none", "network")
    )
    assert_refitted(before, after, network, digits, captured)
    with pytest.raises(ValueError, match=r"refit is 'layer'; method '.*' has"):
        CLOSED[method](network, captured, relative_tolerance=0.1, refit="layer")


@pytest.mark.parametrize("method", [*METHODS, *CLOSED])
def test_inputs_alone_are_enough_and_give_the_same(method, network, captured):
    compress = {**METHODS, **CLOSED}[method]
    images = captured.batches[0].values
    results = [
        compress(network, calibration, relative_tolerance=0.3, refit="network")
        for calibration in (captured, images)
    ]
    first, second = (result.model.state_dict().values() for result in results)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="refit is 'all'"):
        compress(network, images, relative_tolerance=0.3, refit="all")


@pytest.mark.parametrize("method", METHODS)
def test_of_some_layers_the_others_stay(method, network, captured):
    names = ["0.fc1", "0.fc2"]
    for calibration in (captured, captured.batches[0].values):
        result = METHODS[method](
            network, calibration, relative_tolerance=0.2, refit="network", layers=names
        )
        assert [report.name for report in result.layers] == names
        for mine, theirs in zip(
            network.get_submodule("0.fc3").parameters(),
            result.model.get_submodule("0.fc3").parameters(),
            strict=True,
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("asked", [{"relative_tolerance": 0.3}, {"kept_fraction": 0.3}])
def test_it_may_learn_from_other_samples_than_those_of_the_compression(asked, network, digits):
    few, more = digits.calibration(200, seed=0), digits.calibration(700, seed=0)
    how = {"epochs": 3, "batch_size": 50, "learning_rate": 3e-3, "temperature": 5.0}
    settings = Settings(network_refit=NetworkRefit(more, **how))
    compress = functools.partial(ddlr.compress, network, few, output="classes", **asked)
    result = compress(refit="network", settings=settings)
    before = compress(refit="layer")
    names = [report.name for report in before.layers]
    expected = refit_network(network, before.model, more, names, output="classes", **how)
    for mine, theirs in zip(result.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_other_samples_are_called_as_those_of_the_compression_are(network, digits):
    few, more = digits.calibration(200, seed=0), digits.calibration(700, seed=0)

    def forward(model, batch):
        return model(batch["images"])

    compress = functools.partial(
        ddlr.compress, network, relative_tolerance=0.3, refit="network", output="classes"
    )
    first = compress(few, settings=Settings(network_refit=NetworkRefit(more)))
    second = compress(
        [{"images": few}],
        forward=forward,
        settings=Settings(network_refit=NetworkRefit([{"images": more}])),
    )
    inputs = digits.held_out.images
    torch.testing.assert_close(
        outputs_of(second.model, [inputs]), outputs_of(first.model, [inputs]), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("refit", ["none", "layer"])
def test_how_the_network_is_refitted_is_refused_where_it_is_not(refit, network, digits):
    with pytest.raises(ValueError, match=rf"network_refit is given with refit='{refit}'"):
        ddlr.compress(
            network,
            digits.calibration(200, seed=0),
            relative_tolerance=0.3,
            refit=refit,
            settings=Settings(network_refit=NetworkRefit(epochs=3)),
        )


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_size": 1.5}, {"learning_rate": 0}, {"temperature": math.nan}]
)
def test_numbers_of_a_refit_that_make_none_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        NetworkRefit(**wrong)
