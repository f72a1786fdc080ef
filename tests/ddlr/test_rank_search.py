"""The lowest rank: exact without an activation, and with one not to be beaten from elsewhere."""

import math

import pytest
import torch
from torch import Tensor

from ddlr import ConvergenceError, WarmStart, lowest_rank
from ddlr.constraints import OutputSet
from ddlr.layers import numerical_rank
from ddlr.rank_search import lowest_truncation
from ddlr.result import SolverStatus
from made_up import made_up_layer


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def deviation(inputs, targets, weight, bias, activation="relu") -> float:
    outputs = OutputSet(targets, 0.0, activation, "hinge")
    return outputs.deviation(inputs @ weight.T + bias).norm().item()


def original(inputs, targets) -> WarmStart:
    """A weight that reproduces pre-activations of the targets exactly, where there is one."""
    design = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    solution = torch.linalg.lstsq(design, targets, driver="gelsd").solution
    return WarmStart(solution[:-1].T.contiguous(), solution[-1])


@pytest.mark.parametrize(
    ("samples", "input_rank"), [(300, None), (300, 7), (12, None)], ids=["full", "deficient", "few"]
)
@pytest.mark.parametrize("started", [False, True], ids=["from nothing", "from the original"])
def test_without_activation_the_rank_is_that_of_reduced_rank_regression(
    samples, input_rank, started
):
    inputs, targets = made_up_layer(
        samples, 20, 10, activation="none", seed=samples, rank=input_rank
    )
    inputs[:, 3] = 1.0  # does not vary
    generator = torch.Generator().manual_seed(1)
    targets += torch.randn(targets.shape, generator=generator, dtype=targets.dtype)
    # Every error that a rank can have, in closed form.
    centred, residual = inputs - inputs.mean(dim=0), targets - targets.mean(dim=0)
    fitted = centred @ torch.linalg.lstsq(centred, residual, driver="gelsd").solution
    values = torch.linalg.svdvals(fitted).square()
    rest = (residual - fitted).square().sum()
    errors = [(rest + values[rank:].sum()).sqrt().item() for rank in range(len(values) + 1)]
    start = original(inputs, targets) if started else None
    for share in (0.999, 1.001):  # a radius just too small for a rank, and just enough
        for rank in range(1, numerical_rank(fitted)):
            radius = share * errors[rank]
            if radius <= errors[-1] or radius >= errors[rank - 1]:
                continue
            result = lowest_rank(inputs, targets, radius, activation="none", warm_start=start)
            expected = rank if share > 1 else rank + 1
            assert result.objective == numerical_rank(result.weight) == expected
            assert (result.lower_bound, result.relative_gap) == (expected, 0)
            assert result.status is SolverStatus.CONVERGED
            error = deviation(inputs, targets, result.weight, result.bias, "none")
            assert error == pytest.approx(errors[expected], rel=1e-6)


def best_error(inputs, targets, rank: int, starts: int) -> float:
    """The smallest deviation of a rank that a general optimiser finds, from several starts."""
    outputs = OutputSet(targets, 0.0, "relu", "hinge")
    errors = []
    for seed in range(starts):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: B023

        factors = [normal(targets.shape[1], rank), normal(rank, inputs.shape[1])]
        free = [each.requires_grad_() for each in (*factors, targets.mean(dim=0))]
        optimiser = torch.optim.LBFGS(free, max_iter=2000, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()  # noqa: B023
            left, right, bias = free  # noqa: B023
            square = outputs.deviation(inputs @ (left @ right).T + bias).square().sum()
            square.backward()
            return square

        optimiser.step(closure)
        errors.append(closure().item() ** 0.5)
    return min(errors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.15, 0.3, 0.5])
def test_the_next_lower_rank_is_not_within_the_radius_from_wherever_it_is_fitted(seed, fraction):
    inputs, targets = made_up_layer(120, 12, 9, seed=seed)
    radius = fraction * targets.norm().item()
    result = lowest_rank(inputs, targets, radius)
    rank = numerical_rank(result.weight)
    assert result.objective == rank > 0
    assert deviation(inputs, targets, result.weight, result.bias) <= radius * (1 + 1e-6)
    assert result.violation == pytest.approx(0, abs=1e-6)
    assert result.status is SolverStatus.FITTED
    assert math.isnan(result.lower_bound) and math.isnan(result.relative_gap)
    # The ridge, and the end of the descent, leave a few per cent between the two.
    assert best_error(inputs, targets, rank - 1, starts=4) > 0.97 * radius
    assert best_error(inputs, targets, rank, starts=4) <= radius


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_few_samples_dead_inputs_and_small_radii_are_no_obstacle(activation):
    inputs, targets = made_up_layer(15, 40, 12, activation=activation, seed=5)
    inputs[:, :4] = 0.0
    for fraction in (1e-3, 0.1, 0.9):
        radius = fraction * targets.norm().item()
        result = lowest_rank(inputs, targets, radius, activation=activation)
        assert result.weight.isfinite().all()
        assert result.violation <= 1e-3
        assert not result.weight[:, :4].any()


@pytest.mark.parametrize(("seed", "fraction"), [(3, 1e-4), (51, 0.1)])
def test_units_that_are_on_in_few_samples_are_no_obstacle(seed, fraction):
    """Beyond some rank the regression has nothing left to reckon with."""
    inputs, targets = made_up_layer(5, 3, 4, seed=seed)
    result = lowest_rank(inputs, targets, fraction * targets.norm().item())
    assert result.objective == numerical_rank(result.weight) <= 3
    assert result.violation <= 1e-3


def test_a_constant_is_enough_where_the_radius_allows_it():
    inputs, targets = made_up_layer(60, 12, 9, seed=0)
    radius = 1.001 * (targets - targets.mean(dim=0)).norm().item()
    result = lowest_rank(inputs, targets, radius)
    assert result.objective == 0
    assert not result.weight.any()
    assert torch.allclose(result.bias, targets.mean(dim=0))
    assert lowest_rank(inputs, targets, 0.998 * radius).objective == 1


def test_what_no_rank_can_reach_is_an_error_with_the_best_there_is():
    inputs, targets = made_up_layer(200, 5, 12, seed=0)
    shuffled = targets[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    for activation in ("relu", "none"):
        with pytest.raises(ConvergenceError, match="no rank is within the radius") as raised:
            lowest_rank(inputs, shuffled, 1e-2 * shuffled.norm().item(), activation=activation)
        assert raised.value.result.objective == 5
        assert raised.value.result.violation > 1


def test_a_problem_that_is_none_is_refused():
    inputs, targets = made_up_layer(20, 5, 4)
    with pytest.raises(ValueError, match="inputs has 20 samples, targets has 19"):
        lowest_rank(inputs, targets[1:], 1.0)
    with pytest.raises(ValueError, match="radius is -1"):
        lowest_rank(inputs, targets, -1.0)
    with pytest.raises(ValueError, match=r"warm_start\.weight has shape"):
        lowest_rank(inputs, targets, 1.0, warm_start=WarmStart(torch.zeros(4, 4), torch.zeros(4)))


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
    centred, residual = inputs - inputs.mean(dim=0), targets - targets.mean(dim=0)
    least = (residual - centred @ torch.linalg.lstsq(centred, residual).solution).norm().item()
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
