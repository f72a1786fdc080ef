"""Fits of one rank: the ridge is what it says, coordinates are white, and radii mean the radius."""

import pytest
import torch
from torch import Tensor

from ddlr import CentredInputs, ConvergenceError, WarmStart, lowest_rank, refit_low_rank
from ddlr.constraints import OutputSet
from ddlr.input_selection import regress_onto
from ddlr.reduced_rank import _Fit, _Whitened, lowest_truncation
from made_up import made_up_layer
from nettrim import refit_sparse

RIDGES = [1e-2, 1.0]


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ridge_of(inputs: Tensor, ridge: float) -> float:
    """Relative to the mean eigenvalue of the centred inputs' Gram matrix."""
    return ridge * torch.linalg.svdvals(inputs - inputs.mean(dim=0)).square().sum() / len(inputs.T)


def ridge_regression(inputs: Tensor, targets: Tensor, weight: Tensor, ridge: float):
    """The minimum of ||X Wt + 1 bt - T||_F^2 + ridge * ||W - weight||_F^2, by added samples."""
    middle, wanted = inputs.mean(dim=0), targets.mean(dim=0)
    held = ridge_of(inputs, ridge) ** 0.5
    design = torch.cat([inputs - middle, held * torch.eye(len(inputs.T), dtype=inputs.dtype)])
    sides = torch.cat([targets - wanted, held * weight.T])
    found = torch.linalg.lstsq(design, sides, driver="gelsd").solution.T
    return found, wanted - found @ middle


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("samples", [12, 50, 400])
@pytest.mark.parametrize("refit", [refit_low_rank, refit_sparse])
def test_a_refit_of_everything_without_activation_is_ridge_regression(refit, samples, ridge):
    inputs, targets = made_up_layer(samples, 20, 6, activation="none", seed=samples)
    targets = targets + 3 * normal(*targets.shape, seed=0)
    weight, bias = normal(6, 20, seed=1), normal(6, seed=2)
    options = {"rank": 6} if refit is refit_low_rank else {}
    fit, shift = refit(
        *(inputs, targets, weight, bias),
        **{"activation": "none", "ridge": ridge, "tolerance": 1e-14, "max_iterations": 3000},
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


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("samples", [12, 50, 400])
def test_regression_onto_some_inputs_is_ridge_regression_towards_the_weight(samples, ridge):
    """Of ||Xc (W - W0)t||_F^2 + ridge * ||W - W0||_F^2 over W on the inputs kept."""
    inputs, _ = made_up_layer(samples, 20, 6, seed=samples)
    start = WarmStart(normal(6, 20, seed=1), normal(6, seed=2))
    kept = torch.arange(0, 20, 3)
    found = regress_onto(CentredInputs(inputs), kept, start, ridge)
    middle = inputs.mean(dim=0)
    held = ridge_of(inputs, ridge) ** 0.5
    design = torch.cat([inputs - middle, held * torch.eye(20, dtype=inputs.dtype)])
    expected = torch.linalg.lstsq(design[:, kept], design @ start.weight.T).solution.T
    assert torch.allclose(found.weight, expected, atol=1e-8)
    # The mean output is that of the start.
    assert torch.allclose(
        found.weight @ middle[kept] + found.bias, start.weight @ middle + start.bias
    )


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_answers_do_not_depend_on_how_often_the_samples_are_repeated(activation):
    inputs, targets = made_up_layer(60, 20, 12, activation=activation, seed=2)
    weight, bias = normal(12, 20, seed=1), normal(12, seed=2)
    answers = []
    for times in (1, 5):
        problem = inputs.repeat(times, 1), targets.repeat(times, 1)
        options = {"activation": activation, "ridge": 0.1}
        kept = torch.arange(0, 20, 2)
        start = WarmStart(weight, bias)
        once = regress_onto(CentredInputs(problem[0]), kept, start, options["ridge"])
        answers.append(
            [
                refit_low_rank(*problem, weight, bias, rank=4, **options)[0],
                refit_sparse(*problem, weight, bias, **options)[0],
                once.weight,
            ]
        )
    for one, other in zip(*answers, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
@pytest.mark.parametrize(("samples", "rank"), [(200, None), (200, 6), (15, None)], ids=str)
def test_in_white_coordinates_gram_matrix_and_ridge_add_up_to_the_identity(samples, rank, ridge):
    inputs, _ = made_up_layer(samples, 20, 4, rank=rank, seed=1)
    white = _Whitened(inputs, ridge)
    whole = white.inputs.T @ white.inputs + torch.diag(white.held.expand(len(white.scale)))
    assert torch.allclose(whole, torch.eye(len(whole), dtype=whole.dtype), atol=1e-9)
    assert white.ridge == pytest.approx(ridge_of(inputs, ridge))
    assert len(whole) == (rank or min(samples - 1, 20))  # what does not vary is left out
    weight = normal(5, 20, seed=0)
    outputs = white.inputs @ white.enter(weight).T
    assert torch.allclose(outputs, (inputs - inputs.mean(dim=0)) @ weight.T, atol=1e-8)
    factors = normal(5, 3, seed=1), normal(len(whole), 3, seed=2)
    assert torch.allclose(white.enter(white.leave(*factors)), factors[0] @ factors[1].T)


@pytest.mark.parametrize("noise", [3e-6, 5e-6])
def test_directions_that_single_precision_does_not_resolve_are_left_out(noise):
    """They would be rounding errors of the others, made as large as these."""
    inputs = normal(200, 6, seed=1) @ normal(6, 20, seed=2)
    inputs = (inputs + noise * normal(200, 20, seed=3)).float()
    white = _Whitened(inputs, 0.0)
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
    white, start = _Whitened(inputs, 0.1), normal(6, 20, seed=2)
    outputs = OutputSet(targets, 1.0, "relu", "hinge")
    origin = white.enter(start)
    left, right = origin[:, :4], torch.eye(20, 4, dtype=inputs.dtype)
    fit = _Fit(white, outputs, origin, left, right, targets.mean(dim=0))
    for _ in range(5):
        weight, bias = fit.answer()
        missed = outputs.deviation(inputs @ weight.T + bias).square().sum()
        assert fit.square == pytest.approx(missed.item())
        held = ridge_of(inputs, 0.1) * (weight - start).square().sum()
        assert fit.loss == pytest.approx((missed + held).item())
        fit.step()


def test_a_fit_is_truncated_to_what_is_nearest_of_lower_rank():
    inputs, targets = made_up_layer(100, 20, 6, seed=1)
    white = _Whitened(inputs, 1e-2)
    left, right = normal(6, 5, seed=2), torch.linalg.qr(normal(20, 5, seed=3)).Q
    outputs = OutputSet(targets, 1.0, "relu", "hinge")
    fit = _Fit(white, outputs, left @ right.T, left, right, targets.mean(dim=0))
    for rank in range(6):
        lower = fit.truncated(rank)
        assert lower.rank == rank
        missed = (lower.left @ lower.right.T - left @ right.T).norm()
        assert missed == pytest.approx(torch.linalg.svdvals(left)[rank:].norm().item(), abs=1e-9)
        assert torch.allclose(lower.right.T @ lower.right, torch.eye(rank, dtype=left.dtype))


def test_without_a_start_there_is_nothing_that_a_ridge_could_hold():
    inputs, targets = made_up_layer(40, 12, 9, seed=0)
    radius = 0.2 * targets.norm().item()
    few, much = (lowest_rank(inputs, targets, radius, ridge=ridge) for ridge in (1e-6, 1e3))
    assert torch.equal(few.weight, much.weight) and few.objective == much.objective
    start = WarmStart(few.weight, few.bias)
    held = lowest_rank(inputs, targets, radius, ridge=1e3, warm_start=start)
    assert not torch.equal(held.weight, few.weight)


@pytest.mark.parametrize("share", [0.95, 0.995])
def test_a_radius_that_is_missed_by_half_a_per_cent_is_missed(share):
    """Without activation full rank is least squares, so the smallest error is known."""
    inputs, targets = made_up_layer(100, 8, 5, activation="none", seed=1)
    targets = targets + normal(100, 5, seed=2)
    centred, wanted = inputs - inputs.mean(dim=0), targets - targets.mean(dim=0)
    least = (wanted - centred @ torch.linalg.lstsq(centred, wanted).solution).norm().item()
    with pytest.raises(ConvergenceError, match="no rank is within the radius") as raised:
        lowest_rank(inputs, targets, share * least, activation="none")
    assert raised.value.result.violation == pytest.approx(1 / share - 1, rel=1e-4)
    assert lowest_rank(inputs, targets, 1.0001 * least, activation="none").objective == 5


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("seed", range(4))
def test_the_lowest_truncation_is_the_first_within_the_radius(seed, scale, activation):
    """By trying every rank from 0 upwards."""
    scores = scale * normal(40, 12, seed=seed) * torch.logspace(1, -1, 12, dtype=torch.float64)
    directions = torch.linalg.qr(normal(12, 12, seed=seed + 10)).Q
    offset = scale * normal(12, seed=seed + 20)
    targets = offset + scores @ directions + 0.1 * scale * normal(40, 12, seed=seed + 30)
    if activation == "relu":
        targets = targets.relu()
    outputs = OutputSet(targets, 0.1 * targets.norm().item(), activation, "hinge")
    ranks = [
        rank
        for rank in range(13)
        if outputs.violation(offset + scores[:, :rank] @ directions[:rank]) == 0
    ]
    assert 0 < ranks[0] < 12
    assert lowest_truncation(outputs, offset, scores, directions) == ranks[0]
    nothing = OutputSet(targets, 0.0, activation, "hinge")
    assert lowest_truncation(nothing, offset, scores, directions) == 12


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
