"""The bound on a network's outputs: from its layers, never exceeded, nan where none is proven."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

import ddlr
import nettrim
from ddlr import CapturedLayers
from experiments.baselines import activation_svd, svd
from experiments.checkpoints import checkpoint_path, load_checkpoint
from experiments.configuration import REPOSITORY
from experiments.networks import mlp_digits

ROUNDING = 1 + 1e-5
NUCLEAR = {"constraint": "hinge", "tolerance": 0.1}
METHODS = {
    "ddlr": functools.partial(ddlr.compress, output="classes", **NUCLEAR),
    "lowest_rank": functools.partial(ddlr.compress, method="lowest_rank", output="classes"),
    "fewest_weights": functools.partial(ddlr.compress, method="fewest_weights", output="classes"),
    "nettrim": functools.partial(nettrim.prune, output="classes", **NUCLEAR),
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    model = mlp_digits()
    path = checkpoint_path(REPOSITORY / "results/checkpoints", "mlp_digits", "digits", 0)
    load_checkpoint(path, model, "")
    return model.eval()


@pytest.fixture(scope="module")
def captured(network, digits) -> CapturedLayers:
    return ddlr.capture_layers(network, digits.calibration(300, seed=0))


@torch.no_grad()
def error_of(model: nn.Module, compressed: nn.Module, inputs: torch.Tensor) -> float:
    wanted = model(inputs)
    return ((compressed(inputs) - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["parallel", "cascade"])
@pytest.mark.parametrize("refit", ["none", "network"])
def test_the_error_of_the_outputs_is_within_it(method, order, refit, network, captured):
    for tolerance in (0.1, 0.4):
        result = METHODS[method](
            network, captured, relative_tolerance=tolerance, order=order, refit=refit
        )
        bound = ddlr.output_bound(network, result, captured)
        assert 0 < error_of(network, result.model, captured.batches[0]) <= bound * ROUNDING
        if order == "cascade":  # the last layer's own promise, or what its refit made of it
            last = result.layers[-1]
            assert bound <= last.relative_tolerance * (1 + last.violation) * ROUNDING
            if refit == "none":
                assert bound < 3 * tolerance


@pytest.mark.parametrize("method", [svd, activation_svd, METHODS["fewest_weights"]])
def test_it_is_the_sum_of_the_layers_deviations_as_they_grow(method, network, captured):
    tolerances = {"fc1": 0.1, "fc2": 0.3, "fc3": 0.2}
    result = method(network, captured, relative_tolerance=tolerances)
    stored = [result.model.get_submodule(layer.name).weight for layer in captured.layers]
    second, third = (torch.linalg.matrix_norm(weight, ord=2).item() for weight in stored[1:])
    norms = [layer.targets.norm().item() for layer in captured.layers]
    sums = 0.1 * norms[0] * second * third + 0.3 * norms[1] * third + 0.2 * norms[2]
    bound = ddlr.output_bound(network, result, captured)
    assert bound == pytest.approx(sums / norms[2], rel=1e-2)


def test_an_error_may_be_as_large_as_the_bound():
    """A single path, along which nothing makes up for anything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0 if parameter.ndim > 1 else 1.0)
    inputs = torch.rand(1, 3)  # of one sample every bias makes the output that is wanted
    captured = ddlr.capture_layers(model, inputs)
    result = svd(model, captured, relative_tolerance=0)
    moved = result.model
    reports = []
    for report, layer in zip(result.layers, captured.layers, strict=True):
        with torch.no_grad():
            moved.get_submodule(report.name).bias += 0.1 * layer.targets[0, 0]
        reports.append(dataclasses.replace(report, relative_tolerance=0.1))
    result = dataclasses.replace(result, layers=tuple(reports))
    error = error_of(model, moved, inputs)
    assert ddlr.output_bound(model, result, captured) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("method", ["lowest_rank", "fewest_weights"])
@pytest.mark.parametrize("order", ["parallel", "cascade"])
@pytest.mark.parametrize("kept", [("fc1",), ("fc2",), ("fc3",), ("fc2", "fc3")])
def test_layers_that_are_kept_pass_errors_on(method, order, kept, network, captured):
    tolerances = {layer.name: 0.0 if layer.name in kept else 0.3 for layer in captured.layers}
    for refit in ("none", "network"):
        result = METHODS[method](
            network, captured, relative_tolerance=tolerances, order=order, refit=refit
        )
        bound = ddlr.output_bound(network, result, captured)
        assert 0 < error_of(network, result.model, captured.batches[0]) <= bound * ROUNDING


def two_layers(*between: nn.Module, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), *between, nn.Linear(width, 5)).eval()


INPUTS = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "proven"),
    [
        (two_layers(nn.ReLU()), True),
        (two_layers(nn.ReLU(), nn.Dropout(0.5)), True),
        (two_layers(), True),
        (two_layers(nn.Tanh()), False),
        (two_layers(nn.LayerNorm(8)), False),
        (
            two_layers(nn.ReLU(), nn.Unflatten(1, (1, 8)), nn.MaxPool1d(2), nn.Flatten(), width=4),
            False,
        ),
        (nn.Sequential(two_layers(nn.ReLU()), nn.Softmax(dim=1)), False),
    ],
    ids=["relu", "dropout", "nothing", "tanh", "normalised", "pooled", "softmax"],
)
def test_there_is_none_where_more_than_relu_is_between_the_layers(model, proven):
    captured = ddlr.capture_layers(model, INPUTS)
    result = ddlr.compress(model, captured, method="lowest_rank", relative_tolerance=0.3)
    bound = ddlr.output_bound(model, result, captured)
    if proven:
        assert error_of(model, result.model, INPUTS) <= bound * ROUNDING
    else:
        assert math.isnan(bound)


@pytest.mark.parametrize("layers", [["fc1"], ["fc1", "fc2"], ["fc1", "fc3"]], ids=str)
def test_there_is_none_where_only_some_layers_were_captured_or_compressed(
    layers, network, captured
):
    result = svd(network, captured.only(layers), relative_tolerance=0.2)
    assert math.isnan(ddlr.output_bound(network, result, captured.only(layers)))
    assert math.isnan(ddlr.output_bound(network, result, captured))
    last = svd(network, captured.only(["fc2", "fc3"]), relative_tolerance=0.2)
    bound = ddlr.output_bound(network, last, captured.only(["fc2", "fc3"]))
    assert error_of(network, last.model, captured.batches[0]) <= bound * ROUNDING


@pytest.mark.parametrize("order", ["parallel", "cascade"])
@pytest.mark.parametrize("method", ["lowest_rank", "fewest_weights"])
def test_a_goal_reports_the_error_and_its_bound(method, order, network, captured):
    for goal in ({"kept_fraction": 0.5}, {"max_output_error": 0.3}):
        result = ddlr.compress_to_goal(
            *(METHODS[method], network, captured), **goal, order=order, tolerances=(0.1, 0.2, 0.5)
        )
        report = result.goal
        error = error_of(network, result.model, captured.batches[0])
        assert report.output_error == pytest.approx(error, rel=1e-4)
        assert report.output_bound == ddlr.output_bound(network, result, captured)
        assert 0 < error <= report.output_bound * ROUNDING
