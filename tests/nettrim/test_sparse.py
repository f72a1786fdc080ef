"""Net-Trim's solver and refit: searches find the minimum, losses fall, biases stand apart."""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from ddlr import ConvergenceError
from ddlr.constraints import OutputSet
from ddlr.reduced_rank import RIDGE
from made_up import made_up_layer
from nettrim import refit_sparse, solve_sparse
from nettrim.sparse import _line_search

ACTIVATIONS = ["relu", "none"]


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def along(outputs: OutputSet, outcome, change, slope, curvature, length: Tensor) -> Tensor:
    """The loss of each output by itself, at its length."""
    deviation = outputs.deviation(outcome + length * change)
    return deviation.square().sum(dim=0) + 2 * slope * length + curvature * length.square()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(5))
def test_the_line_search_finds_the_minimum_for_each_output(activation, seed):
    """With the ridge's part: its slope at the beginning and its curvature."""
    targets = normal(50, 8, seed=seed)
    targets = targets.relu() if activation == "relu" else targets
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    outcome = targets + 0.5 * normal(50, 8, seed=seed + 10)
    # Down the gradient, more or less, as directions of the refit are.
    change = -outputs.deviation(outcome) + 0.3 * normal(50, 8, seed=seed + 20)
    line = outcome, change, 2 * normal(8, seed=seed + 30), 10 * normal(8, seed=seed + 40).abs()
    best = _line_search(outputs, *line)
    least = along(outputs, *line, best) - 1e-3 * along(outputs, *line, torch.zeros_like(best))
    for length in torch.linspace(-3, 3, 601, dtype=torch.float64):
        assert (least <= along(outputs, *line, length.expand(8))).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_line_search_never_goes_up(activation):
    """Not even along directions in which Newton's steps lead astray."""
    for seed in range(50):
        targets = normal(6, 40, seed=seed)
        targets = targets.relu() if activation == "relu" else targets
        outputs = OutputSet(targets, 0.0, activation, "hinge")
        line = normal(6, 40, seed=seed + 100), 3 * normal(6, 40, seed=seed + 200)
        line = *line, normal(40, seed=seed + 300), torch.zeros(40, dtype=torch.float64)
        reached = along(outputs, *line, _line_search(outputs, *line))
        assert (reached <= along(outputs, *line, torch.zeros(40, dtype=torch.float64))).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("samples", "seed"), [(15, 0), (60, 1), (200, 2)])
def test_no_outputs_loss_rises_from_one_iteration_to_the_next(activation, samples, seed):
    inputs, targets = made_up_layer(samples, 20, 12, activation=activation, seed=seed)
    weight = normal(12, 20, seed=seed) * (normal(12, 20, seed=seed + 10) > 0)
    bias = normal(12, seed=seed + 20)
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    penalty = RIDGE * (inputs - inputs.mean(dim=0)).square().sum(dim=0).mean()

    def losses(fit: Tensor, shift: Tensor) -> Tensor:
        missed = outputs.deviation(inputs @ fit.T + shift).square().sum(dim=0)
        return missed + penalty * (fit - weight).square().sum(dim=1)

    before = losses(weight, bias)
    for iterations in range(1, 20):
        fit, shift = refit_sparse(
            inputs,
            targets,
            weight,
            bias,
            activation=activation,
            tolerance=0.0,
            max_iterations=iterations,
        )
        assert torch.equal(fit != 0, weight != 0)
        now = losses(fit, shift)
        assert (now <= before * (1 + 1e-9)).all()
        before = now


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conjugate_directions_need_far_fewer_iterations_than_the_gradient(activation):
    """With exact searches a quadratic of n unknowns an output takes about n of them."""
    inputs, targets = made_up_layer(200, 8, 5, activation=activation, seed=3)
    inputs = inputs @ (torch.eye(8, dtype=inputs.dtype) + 0.9)  # far from white
    targets = inputs @ normal(8, 5, seed=4)
    targets = targets.relu() if activation == "relu" else targets
    fit, shift = refit_sparse(
        inputs,
        targets,
        normal(5, 8, seed=5),
        normal(5, seed=6),
        activation=activation,
        ridge=1e-9,
        tolerance=0.0,
        max_iterations=11 if activation == "none" else 80,
    )
    produced = inputs @ fit.T + shift
    produced = produced.relu() if activation == "relu" else produced
    assert (produced - targets).norm() <= 1e-3 * targets.norm()


@pytest.mark.parametrize("constraint", ["nettrim", "hinge"])
def test_a_penalised_bias_is_given_apart_from_the_weight_and_starts_from_there(constraint):
    inputs, targets = made_up_layer(60, 8, 5, seed=1)
    radius = 0.1 * targets.norm().item()
    options = {"constraint": constraint, "penalise_bias": True, "tolerance": 1e-4}
    solved = solve_sparse(inputs, targets, radius, **options)
    assert solved.weight.shape == (5, 8) and solved.bias.shape == (5,)
    outputs = OutputSet(targets, radius, "relu", constraint)
    assert outputs.violation(inputs @ solved.weight.T + solved.bias) <= 1e-3
    objective = solved.weight.abs().sum() + solved.bias.abs().sum()
    assert solved.objective == pytest.approx(objective.item())
    # A start that is the solution is ended at once, so it is taken for what it is.
    again = solve_sparse(inputs, targets, radius, warm_start=solved, **options)
    assert again.iterations == 0
    assert torch.equal(again.weight, solved.weight) and torch.equal(again.bias, solved.bias)


def test_an_unfinished_solve_gives_a_penalised_bias_apart_too():
    inputs, targets = made_up_layer(60, 8, 5, seed=1)
    with pytest.raises(ConvergenceError) as raised:
        solve_sparse(
            inputs, targets, 0.1 * targets.norm().item(), penalise_bias=True, max_iterations=1
        )
    result = raised.value.result
    assert result.weight.shape == (5, 8) and result.bias.shape == (5,)
    objective = (result.weight.abs().sum() + result.bias.abs().sum()).item()
    assert result.objective == pytest.approx(objective) and math.isfinite(objective)


@pytest.mark.parametrize("constraint", ["nettrim", "hinge"])
def test_with_the_bias_penalised_it_is_a_weight_like_the_others(constraint):
    inputs, targets = made_up_layer(40, 9, 7, seed=11)
    radius = 0.2 * targets.norm().item()
    options = {"constraint": constraint, "penalise_bias": True}
    ours = solve_sparse(inputs, targets, radius, tolerance=1e-5, max_iterations=50000, **options)

    x, y = inputs.numpy(), targets.numpy()
    weight, bias = cp.Variable((7, 9)), cp.Variable((7, 1))
    produced = x @ weight.T + np.ones((40, 1)) @ bias.T
    slack, on = cp.Variable(y.shape, nonneg=True), y > 0
    rules = [
        cp.multiply(on, cp.abs(produced - y)) <= slack,
        cp.multiply(~on, produced) <= (slack if constraint == "hinge" else 0),
        cp.norm(slack, "fro") <= radius,
    ]
    best = cp.Problem(cp.Minimize(cp.sum(cp.abs(weight)) + cp.sum(cp.abs(bias))), rules)
    best.solve(solver="CLARABEL")
    assert ours.objective == pytest.approx(best.value, rel=1e-4)
    size = ours.weight.abs().sum() + ours.bias.abs().sum()
    assert size.item() == pytest.approx(ours.objective, rel=1e-9)
    outputs = inputs @ ours.weight.T + ours.bias
    miss = torch.where(targets > 0, outputs - targets, outputs.clamp(min=0))
    assert miss.norm() <= radius * (1 + 1e-5)
    free = solve_sparse(inputs, targets, radius, constraint=constraint, tolerance=1e-5)
    assert free.objective < ours.objective


def loss(inputs, targets, weight, bias, activation) -> float:
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    return outputs.deviation(inputs @ weight.T + bias).square().sum().item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("samples", "seed"), [(60, 0), (200, 1), (15, 2)])
@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_a_refit_keeps_the_support_and_lowers_the_error(activation, samples, seed, fraction):
    inputs, targets = made_up_layer(samples, 20, 12, activation=activation, seed=seed)
    radius = fraction * targets.norm().item()
    solved = solve_sparse(inputs, targets, radius, activation=activation, constraint="hinge")
    weight, bias = refit_sparse(inputs, targets, solved.weight, solved.bias, activation=activation)
    assert torch.equal(weight != 0, solved.weight != 0)
    before = loss(inputs, targets, solved.weight, solved.bias, activation)
    assert loss(inputs, targets, weight, bias, activation) < 0.9 * before


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sparse_refit_finds_the_minimum(activation):
    inputs, targets = made_up_layer(200, 20, 12, activation=activation, seed=5)
    solved = solve_sparse(inputs, targets, 0.3 * targets.norm().item(), activation=activation)
    weight, bias = refit_sparse(
        inputs,
        targets,
        solved.weight,
        solved.bias,
        activation=activation,
        tolerance=1e-12,
        max_iterations=2000,
    )
    ridge = RIDGE * (inputs - inputs.mean(dim=0)).square().sum(dim=0).mean()
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    free, shift = solved.weight.clone().requires_grad_(), solved.bias.clone().requires_grad_()

    def whole_loss(weight, bias):
        miss = outputs.deviation(inputs @ weight.T + bias).square().sum()
        return miss + ridge * (weight - solved.weight).square().sum()

    optimizer = torch.optim.LBFGS(
        [free, shift], max_iter=5000, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = whole_loss(free * (solved.weight != 0), shift)
        value.backward()
        return value

    optimizer.step(closure)
    best = whole_loss(free * (solved.weight != 0), shift).item()
    assert whole_loss(weight, bias).item() == pytest.approx(best, rel=1e-6)
