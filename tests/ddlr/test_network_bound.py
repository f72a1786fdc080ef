"""The bound on a network's outputs: from its layers, never exceeded, nan where none is proven."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

import ddlr
import doors
from doors import activation_svd, svd

ROUNDING = 1 + 1e-5
NUCLEAR = {"constraint": "hinge", "tolerance": 0.1}
METHODS = {
    "ddlr": functools.partial(doors.compress, output="classes", **NUCLEAR),
    "lowest_rank": functools.partial(doors.compress, method="lowest_rank", output="classes"),
    "fewest_weights": functools.partial(doors.compress, method="fewest_weights", output="classes"),
    "nettrim": functools.partial(doors.prune, output="classes", **NUCLEAR),
}


@torch.no_grad()
def error_of(model: nn.Module, compressed: nn.Module, inputs: torch.Tensor) -> float:
    outputs = model(inputs)
    return ((compressed(inputs) - outputs).norm() / outputs.norm()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["parallel", "cascade"])
@pytest.mark.parametrize("refit", ["none", "network"])
def test_the_error_of_the_outputs_is_within_it(method, order, refit, network, captured):
    for tolerance in (0.1, 0.4):
        result = METHODS[method](
            network, captured, relative_tolerance=tolerance, order=order, refit=refit
        )
        bound = ddlr.output_bound(network, result, captured)
        if order == "cascade" and refit == "network":
            assert math.isnan(bound)  # no layer has a bound, and what was measured is no proof
            continue
        assert 0 < error_of(network, result.model, captured.batches[0].values) <= bound * ROUNDING
        if order == "cascade":  # the last layer's own promise
            last = result.layers[-1]
            assert bound <= last.relative_bound * (1 + last.violation) * ROUNDING
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
        reports.append(dataclasses.replace(report, relative_bound=0.1))
    result = dataclasses.replace(result, layers=tuple(reports))
    error = error_of(model, moved, inputs)
    assert ddlr.output_bound(model, result, captured) == pytest.approx(error, rel=1e-4)


@pytest.mark.slow
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
        if order == "cascade" and refit == "network":
            assert math.isnan(bound)
            continue
        assert 0 < error_of(network, result.model, captured.batches[0].values) <= bound * ROUNDING


class SilentPath(nn.Module):
    """Beside its two layers a path that nothing passes before a hidden unit is above its peak."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)
        with torch.no_grad():
            self.peak = self.first(INPUTS).relu().max(dim=0).values

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.second(hidden) + 100 * (hidden - self.peak).relu().sum(dim=1, keepdim=True)


def test_there_is_none_where_a_path_is_silent_in_the_original_alone():
    model = SilentPath()
    captured = ddlr.capture_layers(model, INPUTS)
    same = svd(model, captured, relative_tolerance=0)
    assert ddlr.output_bound(model, same, captured) == 0
    result = doors.compress(model, captured, method="lowest_rank", relative_tolerance=0.3)
    assert error_of(model, result.model, INPUTS) > 1
    assert math.isnan(ddlr.output_bound(model, result, captured))


def test_there_is_none_where_the_outputs_are_not_one_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = two_layers(nn.ReLU())

        def forward(self, x):
            return {"logits": self.layers(x), "inputs": x}

    model = Two()
    captured = ddlr.capture_layers(model, INPUTS)
    result = doors.compress(model, captured, method="lowest_rank", relative_tolerance=0.3)
    assert math.isnan(ddlr.output_bound(model, result, captured))


def test_a_layer_that_is_further_off_than_reported_counts_as_it_is():
    model = two_layers(nn.ReLU())
    captured = ddlr.capture_layers(model, INPUTS)
    result = doors.compress(model, captured, method="lowest_rank", relative_tolerance=0.1)
    with torch.no_grad():
        result.model[2].bias += 10.0
    bound = ddlr.output_bound(model, result, captured)
    assert error_of(model, result.model, INPUTS) <= bound * ROUNDING


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
    result = doors.compress(model, captured, method="lowest_rank", relative_tolerance=0.3)
    bound = ddlr.output_bound(model, result, captured)
    if proven:
        assert error_of(model, result.model, INPUTS) <= bound * ROUNDING
    else:
        assert math.isnan(bound)


class Slightly(nn.Module):
    """Passes on a little more, or less, than it gets, as a normalisation that was folded may."""

    def __init__(self, more: float):
        super().__init__()
        self.more = more

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (1 + self.more) * inputs


@pytest.mark.parametrize("more", [-0.05, 1e-3])
@pytest.mark.parametrize("place", ["between", "behind"])
def test_there_is_none_where_something_changes_activations_by_more_than_rounding(more, place):
    if place == "between":
        model = two_layers(nn.ReLU(), Slightly(more))
    else:
        model = nn.Sequential(two_layers(nn.ReLU()), Slightly(more))
    captured = ddlr.capture_layers(model, INPUTS)
    result = doors.compress(model, captured, method="lowest_rank", relative_tolerance=0.3)
    assert math.isnan(ddlr.output_bound(model, result, captured))


@pytest.mark.parametrize("layers", [["fc1"], ["fc1", "fc2"], ["fc1", "fc3"]], ids=str)
def test_there_is_none_where_only_some_layers_were_captured_or_compressed(
    layers, network, captured
):
    result = svd(network, captured.only(layers), relative_tolerance=0.2)
    assert math.isnan(ddlr.output_bound(network, result, captured.only(layers)))
    assert math.isnan(ddlr.output_bound(network, result, captured))
    last = svd(network, captured.only(["fc2", "fc3"]), relative_tolerance=0.2)
    bound = ddlr.output_bound(network, last, captured.only(["fc2", "fc3"]))
    assert error_of(network, last.model, captured.batches[0].values) <= bound * ROUNDING


@pytest.mark.parametrize("order", ["parallel", "cascade"])
@pytest.mark.parametrize("method", ["lowest_rank", "fewest_weights"])
def test_a_goal_reports_the_error_and_its_bound(method, order, network, captured):
    for goal in ({"kept_fraction": 0.5}, {"max_output_error": 0.3}):
        result = METHODS[method](network, captured, **goal, order=order, tolerances=(0.1, 0.2, 0.5))
        report = result.goal
        error = error_of(network, result.model, captured.batches[0].values)
        assert report.output_error == pytest.approx(error, rel=1e-4)
        assert report.output_bound == ddlr.output_bound(network, result, captured)
        assert 0 < error <= report.output_bound * ROUNDING


def test_a_network_that_is_no_chain_is_not_run_for_a_bound(monkeypatch):
    model = two_layers(nn.Tanh())
    inputs = torch.randn(50, model[0].in_features)
    captured = ddlr.capture_layers(model, inputs)
    result = ddlr.compress(model, captured, relative_tolerance=0.3, method="lowest_rank")
    passes = []
    for network in (model, result.model):
        network.register_forward_hook(lambda *_: passes.append(1))
    assert math.isnan(ddlr.output_bound(model, result, captured))
    assert not passes  # each would hold what all layers are given
