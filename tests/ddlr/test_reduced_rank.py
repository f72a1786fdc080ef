"""Fits of one rank never lose, find what other methods find, and weigh the ridge as it says."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddlr import CentredInputs, WarmStart, lowest_rank, refit_low_rank, solve_low_rank
from ddlr.constraints import OutputSet
from ddlr.layers import numerical_rank
from ddlr.reduced_rank import RIDGE, RankFit, WhitenedInputs, _truncate
from made_up import made_up_layer
from nettrim import refit_sparse, solve_sparse

ACTIVATIONS = ["relu", "none"]
RIDGES = [1e-2, 1.0]


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ridge_of(inputs: Tensor, ridge: float) -> float:
    """Relative to the mean eigenvalue of the centred inputs' Gram matrix."""
    return ridge * torch.linalg.svdvals(inputs - inputs.mean(dim=0)).square().sum() / len(inputs.T)


def ridge_regression(inputs: Tensor, targets: Tensor, weight: Tensor, ridge: float):
    """The minimum of ||X Wt + 1 bt - T||_F^2 + ridge * ||W - weight||_F^2, by added samples."""
    middle, target_mean = inputs.mean(dim=0), targets.mean(dim=0)
    held = ridge_of(inputs, ridge) ** 0.5
    design = torch.cat([inputs - middle, held * torch.eye(len(inputs.T), dtype=inputs.dtype)])
    sides = torch.cat([targets - target_mean, held * weight.T])
    fit = torch.linalg.lstsq(design, sides, driver="gelsd").solution.T
    return fit, target_mean - fit @ middle


def loss(inputs, targets, weight, bias, activation) -> float:
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    return outputs.deviation(inputs @ weight.T + bias).square().sum().item()


def fit_of_a_shrunk_weight() -> tuple[RankFit, Tensor, Tensor]:
    """A fit at its beginning, its inputs and its targets."""
    inputs, targets = made_up_layer(200, 20, 12, seed=3)
    solved = solve_low_rank(inputs, targets, 0.3 * targets.norm().item())
    outputs = OutputSet(targets, 0.0, "relu", "hinge")
    white = WhitenedInputs(CentredInputs(inputs), RIDGE)
    left, right = _truncate(white.whiten(solved.weight), numerical_rank(solved.weight))
    bias = solved.bias + solved.weight @ white.mean
    return RankFit(white, outputs, left @ right.T, left, right, bias), inputs, targets


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("samples", "seed"), [(60, 0), (200, 1), (15, 2)])
@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_a_refit_keeps_the_rank_and_lowers_the_error(activation, samples, seed, fraction):
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


def test_extrapolation_saves_more_than_half_of_the_steps():
    (plain, *_), (fit, *_) = fit_of_a_shrunk_weight(), fit_of_a_shrunk_weight()
    for _ in range(40):
        plain._sweep(plain.nearest)  # a step without extrapolation
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
        inputs,
        targets,
        solved.weight,
        solved.bias,
        rank=rank,
        activation="none",
        tolerance=1e-9,
        max_iterations=2000,
    )
    # The closed form: project the least-squares fit on its leading principal components.
    centred, residual = inputs - inputs.mean(dim=0), targets - targets.mean(dim=0)
    fitted = centred @ torch.linalg.lstsq(centred, residual).solution
    directions = torch.linalg.svd(fitted, full_matrices=False).Vh[:rank]
    best = (residual - fitted @ directions.T @ directions).square().sum().item()
    # The ridge is what keeps the two from being equal.
    assert best <= loss(inputs, targets, weight, bias, "none") <= 1.01 * best


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
            inputs[seen], targets[seen], original.weight, original.bias, rank=4, ridge=ridge
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


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("samples", [12, 50, 400])
@pytest.mark.parametrize("refit", [refit_low_rank, refit_sparse])
def test_a_refit_of_everything_without_activation_is_ridge_regression(refit, samples, ridge):
    inputs, targets = made_up_layer(samples, 20, 6, activation="none", seed=samples)
    targets = targets + 3 * normal(*targets.shape, seed=0)
    weight, bias = normal(6, 20, seed=1), normal(6, seed=2)
    options = {"rank": 6} if refit is refit_low_rank else {}
    fit, shift = refit(
        inputs,
        targets,
        weight,
        bias,
        activation="none",
        ridge=ridge,
        tolerance=1e-14,
        max_iterations=3000,
        **options,
    )
    expected, expected_bias = ridge_regression(inputs, targets, weight, ridge)
    if refit is refit_low_rank:  # it has nothing in directions in which the inputs do not vary
        seen = torch.linalg.svd(inputs - inputs.mean(dim=0)).Vh[: min(samples - 1, 20)]
        mean = expected_bias + expected @ inputs.mean(dim=0)
        expected = expected @ seen.T @ seen
        expected_bias = mean - expected @ inputs.mean(dim=0)
    assert torch.allclose(fit, expected, atol=1e-5)
    assert torch.allclose(shift, expected_bias, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_refits_do_not_depend_on_how_often_the_samples_are_repeated(activation):
    inputs, targets = made_up_layer(60, 20, 12, activation=activation, seed=2)
    weight, bias = normal(12, 20, seed=1), normal(12, seed=2)
    options = {"activation": activation, "ridge": 0.1}
    answers = []
    for times in (1, 5):
        problem = inputs.repeat(times, 1), targets.repeat(times, 1), weight, bias
        answers.append(
            [
                refit_low_rank(*problem, rank=4, **options)[0],
                refit_sparse(*problem, **options)[0],
            ]
        )
    for once, repeated in zip(*answers, strict=True):
        assert torch.allclose(once, repeated, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
@pytest.mark.parametrize(("samples", "rank"), [(200, None), (200, 6), (15, None)], ids=str)
def test_in_white_coordinates_gram_matrix_and_ridge_add_up_to_the_identity(samples, rank, ridge):
    inputs, _ = made_up_layer(samples, 20, 4, rank=rank, seed=1)
    white = WhitenedInputs(inputs, ridge)
    whole = white.inputs.T @ white.inputs + torch.diag(
        white.ridge_by_direction.expand(len(white.scale))
    )
    assert torch.allclose(whole, torch.eye(len(whole), dtype=whole.dtype), atol=1e-9)
    assert white.ridge == pytest.approx(ridge_of(inputs, ridge))
    assert len(whole) == (rank or min(samples - 1, 20))  # what does not vary is left out
    weight = normal(5, 20, seed=0)
    outputs = white.inputs @ white.whiten(weight).T
    assert torch.allclose(outputs, (inputs - inputs.mean(dim=0)) @ weight.T, atol=1e-8)
    factors = normal(5, 3, seed=1), normal(len(whole), 3, seed=2)
    assert torch.allclose(white.whiten(white.unwhiten(*factors)), factors[0] @ factors[1].T)


@pytest.mark.parametrize("noise", [3e-6, 5e-6])
def test_directions_that_single_precision_does_not_resolve_are_left_out(noise):
    """They would be rounding errors of the others, made as large as these."""
    inputs = normal(200, 6, seed=1) @ normal(6, 20, seed=2)
    inputs = (inputs + noise * normal(200, 20, seed=3)).float()
    white = WhitenedInputs(inputs, 0.0)
    assert len(white.scale) == 6
    assert torch.allclose(white.inputs.T @ white.inputs, torch.eye(6), atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("samples", [5, 512, 513, 1300])
def test_losses_count_every_sample(samples, activation):
    """Also those of the last and incomplete block; the last sample alone is missed here."""
    inputs, targets = made_up_layer(samples, 3, 2, activation=activation, seed=1)
    weight, bias = normal(2, 3, seed=0), normal(2, seed=1)
    targets = inputs @ weight.T + bias
    if activation == "relu":
        targets = targets.relu()
    targets[-1] += 100
    fit, shift = refit_low_rank(
        inputs, targets, weight, bias, rank=2, activation=activation, max_iterations=1
    )
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    missed = [
        outputs.deviation(inputs @ each.T + one).norm()
        for each, one in ((weight, bias), (fit, shift))
    ]
    assert missed[1] < missed[0]


@pytest.mark.parametrize("rank", [2, 6])
def test_a_refit_begins_at_the_weight_or_at_its_best_truncation_on_the_inputs(rank):
    inputs, targets = made_up_layer(100, 20, 6, seed=1)
    weight, bias = normal(6, 20, seed=2), normal(6, seed=3)
    fit, shift = refit_low_rank(inputs, targets, weight, bias, rank=rank, max_iterations=0)
    before, after = inputs @ weight.T + bias, inputs @ fit.T + shift
    assert torch.allclose(after.mean(dim=0), before.mean(dim=0))
    if rank == 6:
        assert torch.allclose(after, before)
    # The ridge weighs as added samples do.
    held = ridge_of(inputs, 1e-2) ** 0.5 * torch.eye(20, dtype=inputs.dtype)
    design = torch.cat([inputs - inputs.mean(dim=0), held])
    least = torch.linalg.svdvals(design @ weight.T)[rank:].norm()
    assert (design @ (fit - weight).T).norm() == pytest.approx(least.item(), abs=1e-8)


def test_the_loss_of_a_fit_is_the_error_and_the_ridges_part():
    inputs, targets = made_up_layer(100, 20, 6, seed=1)
    white, start = WhitenedInputs(inputs, 0.1), normal(6, 20, seed=2)
    outputs = OutputSet(targets, 1.0, "relu", "hinge")
    origin = white.whiten(start)
    left, right = origin[:, :4], torch.eye(20, 4, dtype=inputs.dtype)
    fit = RankFit(white, outputs, origin, left, right, targets.mean(dim=0))
    for _ in range(5):
        weight, bias = fit.answer()
        missed = outputs.deviation(inputs @ weight.T + bias).square().sum()
        assert fit.square == pytest.approx(missed.item())
        held = ridge_of(inputs, 0.1) * (weight - start).square().sum()
        assert fit.loss == pytest.approx((missed + held).item())
        fit.step()


def test_a_fit_is_truncated_to_what_is_nearest_of_lower_rank():
    inputs, targets = made_up_layer(100, 20, 6, seed=1)
    white = WhitenedInputs(inputs, 1e-2)
    left, right = normal(6, 5, seed=2), torch.linalg.qr(normal(20, 5, seed=3)).Q
    outputs = OutputSet(targets, 1.0, "relu", "hinge")
    fit = RankFit(white, outputs, left @ right.T, left, right, targets.mean(dim=0))
    for rank in range(6):
        lower = fit.truncated(rank)
        assert lower.rank == rank
        missed = (lower.left @ lower.right.T - left @ right.T).norm()
        assert missed == pytest.approx(torch.linalg.svdvals(left)[rank:].norm().item(), abs=1e-9)
        assert torch.allclose(lower.right.T @ lower.right, torch.eye(rank, dtype=left.dtype))


@pytest.mark.parametrize("ridge", [0, -1.0, float("inf"), float("nan"), "much"])
def test_a_ridge_that_is_none_is_refused(ridge):
    inputs, targets = made_up_layer(30, 5, 4)
    start = WarmStart(torch.zeros(4, 5, dtype=inputs.dtype), torch.zeros(4, dtype=inputs.dtype))
    for solve in (
        lambda: refit_low_rank(inputs, targets, start.weight, start.bias, rank=2, ridge=ridge),
        lambda: refit_sparse(inputs, targets, start.weight, start.bias, ridge=ridge),
        lambda: lowest_rank(inputs, targets, 1.0, warm_start=start, ridge=ridge),
    ):
        with pytest.raises(ValueError, match=r"ridge is .*; it must be a positive number"):
            solve()


def test_a_fit_is_never_worse_than_the_activation_aware_svd_of_its_rank():
    inputs, targets = made_up_layer(200, 20, 12, seed=3)
    weight = normal(12, 20, seed=4)
    bias = targets.mean(dim=0) - inputs.mean(dim=0) @ weight.T
    produced = inputs @ weight.T + bias
    targets = produced.relu()
    white = WhitenedInputs(inputs, 0.0)
    outputs = OutputSet(targets, 0.0, "relu", "hinge")
    left, values, right = torch.linalg.svd(white.whiten(weight), full_matrices=False)
    for rank in range(1, 12):
        # In closed form, by the projection of the outputs on their principal components.
        middle = produced.mean(dim=0)
        directions = torch.linalg.svd(produced - middle, full_matrices=False).Vh[:rank]
        closed = middle + (produced - middle) @ directions.T @ directions
        before = outputs.deviation(closed).norm().item()
        fit = RankFit(
            white,
            outputs,
            white.whiten(weight),
            left[:, :rank] * values[:rank],
            right[:rank].T,
            middle,
        )
        assert fit.square**0.5 == pytest.approx(before, rel=1e-6)
        fit.descend(1e-6, 100)
        assert fit.square**0.5 < before


def test_without_an_activation_the_refit_is_the_best_weight_of_its_rank():
    """It is the closed form in float64, which no other weight of the rank has a lower loss than."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(60, 8, generator=generator)
    start = torch.randn(6, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    bias = torch.randn(6, generator=generator)
    targets = torch.randn(60, 6, generator=generator)
    ridge = 0.05
    weight, shift = refit_low_rank(
        inputs, targets, start, bias, rank=2, activation="none", ridge=ridge
    )

    centred = (inputs - inputs.mean(dim=0)).double()
    gram = centred.T @ centred
    penalty = ridge * gram.diagonal().mean()
    gram += penalty * torch.eye(8)
    best = torch.linalg.solve(gram, centred.T @ targets.double() + penalty * start.T.double()).T
    root = torch.linalg.cholesky(gram)
    left, values, right = torch.linalg.svd(best @ root, full_matrices=False)
    expected = torch.linalg.solve(root.T, ((left[:, :2] * values[:2]) @ right[:2]).T).T
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift, targets.mean(dim=0) - weight @ inputs.mean(dim=0))
