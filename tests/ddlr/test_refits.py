"""Refits keep the rank or the support, never lose, and find what independent methods find."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddlr import CentredInputs, refit_low_rank, solve_low_rank
from ddlr.constraints import OutputSet
from ddlr.layers import numerical_rank
from ddlr.reduced_rank import RIDGE, _Fit, _truncate, _Whitened
from made_up import made_up_layer
from nettrim import refit_sparse, solve_sparse

ACTIVATIONS = ["relu", "none"]


def loss(inputs, targets, weight, bias, activation) -> float:
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    return outputs.deviation(inputs @ weight.T + bias).square().sum().item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("samples", "seed"), [(60, 0), (200, 1), (15, 2)])
@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_a_refit_keeps_rank_or_support_and_lowers_the_error(activation, samples, seed, fraction):
    inputs, targets = made_up_layer(samples, 20, 12, activation=activation, seed=seed)
    radius = fraction * targets.norm().item()
    solved = solve_low_rank(inputs, targets, radius, activation=activation, constraint="hinge")
    rank = numerical_rank(solved.weight)
    weight, bias = refit_low_rank(
        inputs, targets, solved.weight, solved.bias, rank=rank, activation=activation
    )
    assert numerical_rank(weight) <= rank
    before = loss(inputs, targets, solved.weight, solved.bias, activation)
    assert loss(inputs, targets, weight, bias, activation) < 0.7 * before

    solved = solve_sparse(inputs, targets, radius, activation=activation, constraint="hinge")
    weight, bias = refit_sparse(inputs, targets, solved.weight, solved.bias, activation=activation)
    assert torch.equal(weight != 0, solved.weight != 0)
    before = loss(inputs, targets, solved.weight, solved.bias, activation)
    assert loss(inputs, targets, weight, bias, activation) < 0.9 * before


def fit_of_a_shrunk_weight() -> tuple[_Fit, Tensor, Tensor]:
    """A fit at its beginning, its inputs and its targets."""
    inputs, targets = made_up_layer(200, 20, 12, seed=3)
    solved = solve_low_rank(inputs, targets, 0.3 * targets.norm().item())
    outputs = OutputSet(targets, 0.0, "relu", "hinge")
    white = _Whitened(CentredInputs(inputs), RIDGE)
    left, right = _truncate(white.enter(solved.weight), numerical_rank(solved.weight))
    bias = solved.bias + solved.weight @ white.mean
    return _Fit(white, outputs, left @ right.T, left, right, bias), inputs, targets


def test_extrapolation_saves_more_than_half_of_the_steps():
    (plain, *_), (fit, *_) = fit_of_a_shrunk_weight(), fit_of_a_shrunk_weight()
    for _ in range(40):
        plain._try(plain.nearest)  # a step without extrapolation
    for _ in range(20):
        fit.step()
    assert fit.loss < plain.loss


def test_every_step_of_the_low_rank_refit_descends():
    fit, inputs, targets = fit_of_a_shrunk_weight()
    losses = [fit.loss]
    for _ in range(50):
        fit.step()
        losses.append(fit.loss)
        weight, bias = fit.answer()
        assert loss(inputs, targets, weight, bias, "relu") <= fit.loss * (1 + 1e-9)
    assert all(after <= before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_a_descent_ends_with_the_first_ten_steps_that_gain_less_than_a_share(tolerance):
    fit, *_ = fit_of_a_shrunk_weight()
    fit.descend(tolerance, 10_000)
    again, *_ = fit_of_a_shrunk_weight()
    losses = [again.loss]
    while again.iterations < fit.iterations:
        again.step()
        losses.append(again.loss)
    tens = losses[::10]
    lowered = [(before - after) / after for before, after in itertools.pairwise(tens)]
    assert losses[-1] == tens[-1] == fit.loss
    assert min([*lowered[:-1], math.inf]) > tolerance >= lowered[-1]
    few, *_ = fit_of_a_shrunk_weight()
    few.descend(0.0, 7)
    assert few.iterations == 7


def test_without_activation_the_low_rank_refit_is_reduced_rank_regression():
    inputs, targets = made_up_layer(300, 20, 12, activation="none", seed=4)
    solved = solve_low_rank(inputs, targets, 0.4 * targets.norm().item(), activation="none")
    rank = numerical_rank(solved.weight)
    weight, bias = refit_low_rank(
        *(inputs, targets, solved.weight, solved.bias),
        rank=rank,
        activation="none",
        tolerance=1e-9,
        max_iterations=2000,
    )
    # The closed form: project the least-squares fit on its leading principal components.
    centred, wanted = inputs - inputs.mean(dim=0), targets - targets.mean(dim=0)
    fitted = centred @ torch.linalg.lstsq(centred, wanted).solution
    directions = torch.linalg.svd(fitted, full_matrices=False).Vh[:rank]
    best = (wanted - fitted @ directions.T @ directions).square().sum().item()
    # The ridge is what keeps the two from being equal.
    assert best <= loss(inputs, targets, weight, bias, "none") <= 1.01 * best


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sparse_refit_finds_the_minimum(activation):
    inputs, targets = made_up_layer(200, 20, 12, activation=activation, seed=5)
    solved = solve_sparse(inputs, targets, 0.3 * targets.norm().item(), activation=activation)
    weight, bias = refit_sparse(
        *(inputs, targets, solved.weight, solved.bias),
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


@pytest.mark.parametrize("sparse", [True, False])
def test_more_ridge_holds_the_weight_more(sparse):
    inputs, targets = made_up_layer(30, 20, 12, seed=7)
    solve, refit = (solve_sparse, refit_sparse) if sparse else (solve_low_rank, refit_low_rank)
    solved = solve(inputs, targets, 0.3 * targets.norm().item())
    options = {} if sparse else {"rank": numerical_rank(solved.weight)}
    moved, losses = [], []
    for ridge in (1e-3, 1e-1, 10.0):
        weight, bias = refit(inputs, targets, solved.weight, solved.bias, ridge=ridge, **options)
        moved.append((weight - solved.weight).norm().item())
        losses.append(loss(inputs, targets, weight, bias, "relu"))
    assert moved[0] > 1.2 * moved[1] > 1.2**2 * moved[2]
    assert losses[0] < losses[1] < losses[2]
    with pytest.raises(ValueError, match=r"ridge is 0; it must be a positive number"):
        refit(inputs, targets, solved.weight, solved.bias, ridge=0, **options)


def test_with_few_samples_for_each_input_more_ridge_serves_others_better():
    inputs, targets = made_up_layer(400, 20, 12, seed=8)
    original = solve_low_rank(inputs, targets, 0.02 * targets.norm().item())
    seen, others = slice(0, 30), slice(30, None)
    errors = []
    for ridge in (1e-2, 1.0):
        weight, bias = refit_low_rank(
            *(inputs[seen], targets[seen], original.weight, original.bias), rank=4, ridge=ridge
        )
        errors.append(loss(inputs[others], targets[others], weight, bias, "relu"))
    assert errors[1] < 0.8 * errors[0]


def test_null_directions_and_dead_inputs_are_left_alone():
    inputs, targets = made_up_layer(50, 20, 12, rank=6, seed=6)
    inputs[:, 3] = 1.0  # does not vary
    solved = solve_low_rank(inputs, targets, 0.2 * targets.norm().item())
    rank = numerical_rank(solved.weight)
    weight, bias = refit_low_rank(inputs, targets, solved.weight, solved.bias, rank=rank)
    assert weight.isfinite().all()
    assert weight.norm() < 10 * solved.weight.norm()
    assert loss(inputs, targets, weight, bias, "relu") < loss(
        inputs, targets, solved.weight, solved.bias, "relu"
    )
