"""The fewest nonzeros: promises, brute force on tiny layers, and never more than Net-Trim's."""

import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn

import ddlr
import nettrim
from ddlr import ConvergenceError
from ddlr.constraints import OutputSet
from ddlr.input_elimination import order_of_elimination, regress_on_fewest
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from made_up_quadratics import least_squares, normal, supports
from nettrim import fewest_nonzeros, refit_nonzeros, refit_sparse, solve_sparse


def made_up_layer(out_features, in_features, samples, *, seed, activation="relu"):
    """Inputs that depend on each other, the layer, and its outputs after the activation."""
    inputs = normal(samples, in_features, seed=seed) + normal(samples, 1, seed=seed + 1)
    weight = normal(out_features, in_features, seed=seed + 2)
    weight *= normal(out_features, in_features, seed=seed + 3).abs()  # unlike sizes
    start = WarmStart(weight, normal(out_features, seed=seed + 4))
    targets = inputs @ start.weight.T + start.bias
    return inputs, targets.relu() if activation == "relu" else targets, start


def deviation(inputs, targets, weight, bias, activation):
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    return outputs.deviation(inputs @ weight.T + bias).norm().item()


@pytest.mark.parametrize("selection", [0.0, 0.5])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.7])
def test_the_outputs_are_within_the_radius(share, activation, selection):
    for seed in range(3):
        inputs, targets, start = made_up_layer(8, 12, 200, seed=100 * seed, activation=activation)
        radius = share * targets.norm().item()
        solved = fewest_nonzeros(
            inputs, targets, radius, activation=activation, selection=selection, warm_start=start
        )
        error = deviation(inputs, targets, solved.weight, solved.bias, activation)
        assert error <= radius * (1 + 1e-6)
        assert solved.objective == int((solved.weight != 0).sum()) < start.weight.numel()
        assert solved.violation == pytest.approx(max(error / radius - 1, 0), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_tiny_layers_come_near_the_fewest_of_all(seed):
    inputs, targets, start = made_up_layer(2, 4, 60, seed=1000 + seed, activation="none")
    radius = 0.35 * targets.norm().item()
    found = fewest_nonzeros(
        inputs, targets, radius, activation="none", ridge=1e-9, warm_start=start
    )
    centred, outputs = CentredInputs(inputs), OutputSet(targets, 0.0, "none", "hinge")
    quadratic = OutputQuadratic.of(centred, outputs, start, 1e-9)

    def within(support):
        weight = least_squares(quadratic, support)
        bias = quadratic.bias_of(weight)
        return deviation(inputs, targets, weight, bias, "none") <= radius

    fewest = next(
        number for number in range(9) if any(within(support) for support in supports(2, 4, number))
    )
    assert fewest <= found.objective <= fewest + 1


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_there_are_never_more_than_in_net_trim_within_the_same_error(activation):
    for seed, share in itertools.product(range(2), (0.1, 0.3)):
        inputs, targets, start = made_up_layer(10, 16, 300, seed=10 + seed, activation=activation)
        convex = solve_sparse(
            inputs, targets, share * targets.norm().item(), activation=activation, warm_start=start
        )
        weight, bias = refit_sparse(
            inputs, targets, convex.weight, convex.bias, activation=activation
        )
        reached = deviation(inputs, targets, weight, bias, activation)
        found = fewest_nonzeros(inputs, targets, reached, activation=activation, warm_start=start)
        assert found.objective <= (weight != 0).sum()


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_refit_keeps_the_number_and_the_unused_inputs_and_lowers_the_error(activation):
    inputs, targets, start = made_up_layer(8, 12, 200, seed=5, activation=activation)
    pruned = start.weight * (start.weight.abs() > start.weight.abs().median())
    pruned[:, 3] = 0
    weight, bias = refit_nonzeros(inputs, targets, pruned, start.bias, activation=activation)
    assert (weight != 0).sum() <= (pruned != 0).sum()
    assert not weight[:, 3].any()
    fixed, fixed_bias = refit_sparse(inputs, targets, pruned, start.bias, activation=activation)
    error = deviation(inputs, targets, weight, bias, activation)
    assert error < deviation(inputs, targets, pruned, start.bias, activation)
    assert error < 0.99 * deviation(inputs, targets, fixed, fixed_bias, activation)


def test_a_constant_a_radius_of_zero_and_inputs_that_do_not_vary():
    inputs, targets, start = made_up_layer(4, 6, 50, seed=0)
    nothing = fewest_nonzeros(inputs, targets, targets.norm().item(), warm_start=start)
    assert nothing.objective == 0 and not nothing.weight.any() and nothing.violation == 0
    all_of_it = fewest_nonzeros(inputs, targets, 0.0, warm_start=start)
    assert torch.equal(all_of_it.weight, start.weight)
    with pytest.raises(ConvergenceError, match=r"no number of nonzeros is within the radius"):
        fewest_nonzeros(torch.ones_like(inputs), targets, 1e-3, warm_start=start)


def test_a_share_that_is_not_one_is_refused():
    inputs, targets, start = made_up_layer(4, 6, 50, seed=0)
    for bad in (-0.1, 1.0, float("nan"), "half"):
        with pytest.raises(ValueError, match=r"selection is"):
            fewest_nonzeros(inputs, targets, 1.0, selection=bad, warm_start=start)


def test_inputs_go_in_the_order_of_what_their_removal_adds():
    inputs = normal(80, 7, seed=1) + normal(80, 1, seed=2)
    weight, gram = normal(3, 7, seed=3), inputs.T @ inputs
    order = order_of_elimination(weight, torch.linalg.inv(gram), 6).tolist()
    left = list(range(7))

    def loss(kept):
        outputs = inputs @ weight.T
        fitted = torch.linalg.lstsq(inputs[:, kept], outputs).solution
        return (inputs[:, kept] @ fitted - outputs).square().sum().item()

    for gone in order:
        each = {j: loss([i for i in left if i != j]) for j in left}
        assert min(each, key=each.get) == gone
        left.remove(gone)


def test_the_fewest_inputs_are_within_their_radius_and_one_fewer_is_not():
    inputs, targets, start = made_up_layer(6, 20, 200, seed=7)
    centred, outputs = CentredInputs(inputs), OutputSet(targets, 0.0, "relu", "hinge")
    radius = 0.3 * targets.norm().item()
    kept, fitted = regress_on_fewest(centred, outputs, start, 1e-2, radius)
    error = deviation(inputs[:, kept], targets, fitted.weight, fitted.bias, "relu")
    assert error <= radius and 0 < len(kept) < 20


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(10, 40),
            a=nn.ReLU(),
            fc2=nn.Linear(40, 20),
            b=nn.ReLU(),
            fc3=nn.Linear(20, 5),
        )
    ).double()


@pytest.mark.parametrize("order", ["parallel", "cascade"])
def test_units_that_the_next_layer_leaves_out_are_gone_from_the_network(order):
    model, inputs = network(), normal(400, 10, seed=0)
    without, result = (
        nettrim.prune(
            model,
            inputs,
            method="fewest_nonzeros",
            relative_tolerance=0.3,
            selection=selection,
            order=order,
        )
        for selection in (0.0, 0.7)
    )
    units = [int(result.model.fc1.weight.any(dim=1).sum()) for result in (without, result)]
    assert units[1] < units[0]
    # Nothing is before the first layer, so that no input of it has to go.
    assert result.model.fc1.weight.any(dim=0).all()
    for report in result.layers:
        assert report.violation <= 1e-3
    small = ddlr.compact(result.model)
    assert small.fc1.layer.out_features == units[1]
    torch.testing.assert_close(small(inputs), result.model(inputs))


def test_a_goal_of_size_is_met_and_a_refit_of_layers_brings_it_nearer():
    model, inputs = network(), normal(400, 10, seed=0)
    goal = {"kept_fraction": 0.3, "tolerances": (0.05, 0.1, 0.2, 0.3, 0.5)}
    plain, refitted = (
        nettrim.prune(model, inputs, method="fewest_nonzeros", refit=refit, **goal)
        for refit in ("none", "layer")
    )
    assert plain.goal.met and refitted.goal.met
    assert refitted.goal.output_error < 1.05 * plain.goal.output_error


def test_the_size_of_parallel_order_stays_in_cascade_and_the_support_may_move():
    model, inputs = network(), normal(400, 10, seed=0)
    common = {"method": "fewest_nonzeros", "relative_tolerance": 0.1, "refit": "layer"}
    parallel = nettrim.prune(model, inputs, **common)
    reached = nettrim.prune(
        model,
        inputs,
        **common,
        order="cascade",
        settings=ddlr.Settings(cascade_bound="reached"),
    )
    sizes = [sum(layer.parameters_kept for layer in each.layers) for each in (parallel, reached)]
    assert 0.9 * sizes[0] <= sizes[1] <= sizes[0]  # a unit that nothing reads any longer is gone
    errors = [(each.model(inputs) - model(inputs)).norm() for each in (parallel, reached)]
    assert errors[1] < errors[0]
