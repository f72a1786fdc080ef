"""The program for both structures agrees with CVXPY and has either norm's program as its limit."""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from ddlr import ConvergenceError, SolverStatus, WarmStart, solve_low_rank
from ddlr.certificate import certify
from made_up import made_up_layer
from nettrim import solve_low_rank_plus_sparse, solve_sparse
from nettrim.low_rank_plus_sparse import low_rank_plus_sparse_norm

SETS = ["nettrim", "hinge"]
ACTIVATIONS = ["relu", "none"]


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def objective(low_rank: Tensor, sparse: Tensor, sparsity_weight: float) -> float:
    """||L||_* + t sum |S|, written out once more."""
    return (torch.linalg.svdvals(low_rank).sum() + sparsity_weight * sparse.abs().sum()).item()


def deviation(inputs, targets, weight, bias, activation) -> Tensor:
    outputs = inputs @ weight.T + bias
    if activation == "none":
        return outputs - targets
    return torch.where(targets > 0, outputs - targets, outputs.clamp(min=0))


def cvxpy_optimum(inputs, targets, radius, sparsity_weight, activation, constraint) -> float:
    """The optimum by Clarabel, from the program as it is stated."""
    x, y = inputs.numpy(), targets.numpy()
    low_rank, sparse = (cp.Variable((y.shape[1], x.shape[1])) for _ in range(2))
    bias = cp.Variable((1, y.shape[1]))
    outputs = x @ (low_rank + sparse).T + np.ones((len(x), 1)) @ bias
    on = (y > 0) | (activation == "none")
    miss = cp.multiply(on, outputs - y)
    rules = []
    if not on.all() and constraint == "hinge":
        miss += cp.multiply(~on, cp.pos(outputs))
    elif not on.all():
        rules = [cp.multiply(~on, outputs) <= 0]
    # The hinge's pos() is convex, so only its epigraph may stand under the norm.
    slack = cp.Variable(y.shape)
    above = [miss <= slack, cp.multiply(on, y - outputs) <= slack]
    size = cp.normNuc(low_rank) + sparsity_weight * cp.sum(cp.abs(sparse))
    problem = cp.Problem(cp.Minimize(size), [*rules, *above, cp.norm(slack, "fro") <= radius])
    return problem.solve(solver="CLARABEL")


@pytest.mark.parametrize("constraint", SETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sparsity_weight", [0.3, 0.5])
def test_agrees_with_clarabel_and_the_bound_is_below_it(constraint, activation, sparsity_weight):
    inputs, targets = made_up_layer(25, 7, 6, activation=activation, seed=2)
    radius = 0.2 * targets.norm().item()
    program = {"activation": activation, "constraint": constraint}
    ours = solve_low_rank_plus_sparse(
        inputs,
        targets,
        radius,
        sparsity_weight=sparsity_weight,
        tolerance=1e-5,
        max_iterations=50_000,
        **program,
    )
    best = cvxpy_optimum(inputs, targets, radius, sparsity_weight, **program)
    assert ours.objective == pytest.approx(best, rel=3e-5)
    assert best * (1 - 2e-5) <= ours.lower_bound <= best * (1 + 1e-7)
    low_rank, sparse = ours.parts["low_rank"], ours.parts["sparse"]
    assert torch.equal(ours.weight, low_rank + sparse)
    assert ours.objective == pytest.approx(objective(low_rank, sparse, sparsity_weight), rel=1e-7)
    assert low_rank.any() and sparse.any() and not sparse.all()
    miss = deviation(inputs, targets, ours.weight, ours.bias, activation)
    assert miss.norm() <= radius * (1 + 1e-7)


@pytest.mark.parametrize("constraint", SETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_dual_variable_gives_a_bound_below_the_optimum(constraint, activation):
    """Early ones, too: the bound of an unfinished solve, and one for a variable made up."""
    inputs, targets = made_up_layer(25, 7, 6, activation=activation, seed=3)
    radius = 0.2 * targets.norm().item()
    program = {"activation": activation, "constraint": constraint}
    best = cvxpy_optimum(inputs, targets, radius, 0.4, **program)
    bounds = []
    for iterations in (1, 10, 30):
        with pytest.raises(ConvergenceError) as caught:
            solve_low_rank_plus_sparse(
                inputs,
                targets,
                radius,
                sparsity_weight=0.4,
                tolerance=1e-9,
                max_iterations=iterations,
                **program,
            )
        bounds.append(caught.value.result.lower_bound)
    residual = targets - targets.mean(dim=0)
    proof = certify(
        torch.zeros(6, 14, dtype=torch.float64),
        targets.mean(dim=0),
        residual,
        inputs,
        targets,
        radius,
        norm=low_rank_plus_sparse_norm(0.4),
        **program,
    )
    bounds.append(proof.lower_bound)
    assert max(bounds) <= best * (1 + 1e-7)
    assert bounds[2] > 0.8 * best and bounds[3] > 0


@pytest.mark.parametrize("constraint", SETS)
@pytest.mark.parametrize("sparsity_weight", [None, 0.2, 0.5])
def test_the_dual_variable_proves_the_bound(constraint, sparsity_weight):
    """All that Lagrangian duality asks of it, written out: weak duality then needs no solver."""
    inputs, targets = made_up_layer(80, 12, 9, seed=4)
    radius = 0.1 * targets.norm().item()
    result = solve_low_rank_plus_sparse(
        inputs, targets, radius, sparsity_weight=sparsity_weight, constraint=constraint
    )
    assert result.status is SolverStatus.CONVERGED and abs(result.relative_gap) <= 1e-2
    dual, adjoint = result.dual, result.dual.T @ inputs
    assert (dual[targets == 0] <= 0).all()
    assert dual.sum(dim=0).abs().max() <= 1e-12 * dual.abs().sum()
    assert torch.linalg.matrix_norm(adjoint, 2) <= 1 + 1e-9
    assert adjoint.abs().max() <= (sparsity_weight or 1 / math.sqrt(12)) * (1 + 1e-9)
    bounded = dual * (targets > 0) if constraint == "nettrim" else dual
    bound = (dual * targets).sum() - radius * bounded.norm()
    assert result.lower_bound == pytest.approx(bound.item(), rel=1e-9)


@pytest.mark.parametrize("constraint", SETS)
def test_the_parts_side_by_side_can_be_certified_anew(constraint):
    inputs, targets = made_up_layer(80, 12, 9, seed=4)
    radius = 0.1 * targets.norm().item()
    result = solve_low_rank_plus_sparse(inputs, targets, radius, constraint=constraint)
    proof = certify(
        torch.cat([result.parts["low_rank"], result.parts["sparse"]], dim=1),
        result.bias,
        result.dual,
        inputs,
        targets,
        radius,
        norm=low_rank_plus_sparse_norm(1 / math.sqrt(12)),
        constraint=constraint,
    )
    assert proof.within(1e-2)
    assert proof.objective == pytest.approx(result.objective, rel=1e-9)
    # The dual variable has been repaired already; a second time can only make the bound better.
    assert proof.lower_bound >= result.lower_bound * (1 - 1e-9)


@pytest.mark.parametrize("constraint", SETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_weights_give_the_nuclear_norm_and_small_ones_the_l1_norm(constraint, activation):
    """Beyond the equivalence constants of both norms the other part is 0."""
    inputs, targets = made_up_layer(60, 9, 7, activation=activation, seed=5)
    radius = 0.15 * targets.norm().item()
    options = {"activation": activation, "constraint": constraint, "tolerance": 1e-5}
    options["max_iterations"] = 50_000
    nuclear = solve_low_rank(inputs, targets, radius, **options)
    l1 = solve_sparse(inputs, targets, radius, **options)
    large = solve_low_rank_plus_sparse(inputs, targets, radius, sparsity_weight=1.1, **options)
    assert large.objective == pytest.approx(nuclear.objective, rel=3e-5)
    assert not large.parts["sparse"].any()
    t = 0.9 / math.sqrt(9 * 7)
    small = solve_low_rank_plus_sparse(inputs, targets, radius, sparsity_weight=t, **options)
    assert small.objective == pytest.approx(t * l1.objective, rel=3e-5)
    assert not small.parts["low_rank"].any()


@pytest.mark.parametrize("sparsity_weight", [0.15, 0.3, 0.6])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_the_prox_is_that_of_both_norms(shape, sparsity_weight):
    point, threshold = matrix(shape[0], 2 * shape[1], 6), 0.7
    low_rank, sparse = (cp.Variable(shape) for _ in range(2))
    size = cp.normNuc(low_rank) + sparsity_weight * cp.sum(cp.abs(sparse))
    # The least threshold * norm + half the squared distance, over both parts at once.
    distance = cp.sum_squares(cp.hstack([low_rank, sparse]) - point.numpy())
    problem = cp.Problem(cp.Minimize(threshold * size + distance / 2))
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    expected = torch.as_tensor(np.hstack([low_rank.value, sparse.value]))
    prox = low_rank_plus_sparse_norm(sparsity_weight).prox(point, threshold)
    assert torch.allclose(prox, expected, atol=1e-4)


@pytest.mark.parametrize("sparsity_weight", [0.2, 0.4, 0.8])
def test_the_dual_norm_is_the_largest_product_with_a_weight_of_norm_one(sparsity_weight):
    point = matrix(5, 8, 7)
    low_rank, sparse = (cp.Variable((5, 8)) for _ in range(2))
    size = cp.normNuc(low_rank) + sparsity_weight * cp.sum(cp.abs(sparse))
    product = cp.sum(cp.multiply(point.numpy(), low_rank + sparse))
    largest = cp.Problem(cp.Maximize(product), [size <= 1]).solve(solver="CLARABEL")
    by_row = low_rank_plus_sparse_norm(sparsity_weight).dual_norm_by_row(point)
    assert by_row.max().item() == pytest.approx(largest, rel=1e-6)
    inside = point / by_row[:, None]
    assert torch.linalg.matrix_norm(inside, 2) <= 1 + 1e-9
    assert inside.abs().max() <= sparsity_weight * (1 + 1e-9)


@pytest.mark.parametrize("sparsity_weight", [0.1, 0.5])
def test_one_penalty_suits_both_parts(sparsity_weight):
    """Either part alone has the penalty of its own norm: one over a multiple of its mean term."""
    norm, zero = low_rank_plus_sparse_norm(sparsity_weight), torch.zeros(6, 8, dtype=torch.float64)
    low_rank = matrix(6, 2, 14) @ matrix(2, 8, 15)
    sparse = matrix(6, 8, 16) * (matrix(6, 8, 17) > 1)
    for part, alone, factor in (
        (torch.cat([low_rank, zero], dim=1), torch.linalg.svdvals(low_rank)[:2], 1.0),
        (torch.cat([zero, sparse], dim=1), sparse[sparse != 0].abs(), sparsity_weight),
    ):
        # The threshold is this factor over the penalty.
        threshold = factor * norm.value(part) / norm.terms(part)
        assert threshold == pytest.approx(alone.mean().item(), rel=1e-6)


def test_a_planted_sum_is_recovered():
    """With ample samples and a small radius the weight is given, and so its parts are."""
    low_rank = matrix(30, 1, 8) @ matrix(1, 30, 9)
    where = torch.rand(30, 30, generator=torch.Generator().manual_seed(10)) < 0.05
    sparse = 5 * matrix(30, 30, 11).sign() * where
    inputs = matrix(200, 30, 12)
    targets = inputs @ (low_rank + sparse).T + matrix(1, 30, 13)
    result = solve_low_rank_plus_sparse(
        inputs,
        targets,
        1e-3 * targets.norm().item(),
        activation="none",
        tolerance=1e-3,
        max_iterations=20_000,
    )
    found = result.parts
    assert (found["low_rank"] - low_rank).norm() <= 0.02 * low_rank.norm()
    assert (found["sparse"] - sparse).norm() <= 0.02 * sparse.norm()
    assert torch.linalg.svdvals(found["low_rank"])[1] <= 0.02 * torch.linalg.svdvals(low_rank)[0]
    assert (found["sparse"][where].sign() == sparse[where].sign()).all()


def test_a_solution_is_a_start_that_needs_no_iteration_and_a_neighbour_a_better_one():
    inputs, targets = made_up_layer(150, 25, 18, seed=8)
    size = targets.norm().item()
    neighbour = solve_low_rank_plus_sparse(inputs, targets, 0.11 * size, tolerance=1e-3)
    again = solve_low_rank_plus_sparse(
        inputs, targets, 0.11 * size, tolerance=1e-3, warm_start=neighbour
    )
    assert again.iterations == 0 and torch.equal(again.weight, neighbour.weight)
    cold = solve_low_rank_plus_sparse(inputs, targets, 0.1 * size, tolerance=1e-3)
    warm = solve_low_rank_plus_sparse(
        inputs, targets, 0.1 * size, tolerance=1e-3, warm_start=neighbour
    )
    assert warm.iterations < cold.iterations
    assert warm.objective == pytest.approx(cold.objective, rel=3e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_weight_without_parts_is_a_start(activation):
    inputs, targets = made_up_layer(60, 12, 10, activation=activation, seed=9)
    radius = 0.1 * targets.norm().item()
    sparse = solve_sparse(inputs, targets, radius, activation=activation)
    result = solve_low_rank_plus_sparse(
        inputs, targets, radius, activation=activation, warm_start=sparse
    )
    assert result.status is SolverStatus.CONVERGED and result.weight.shape == (10, 12)


def test_a_radius_of_the_targets_norm_gives_zero_parts():
    inputs, targets = made_up_layer(30, 6, 5)
    result = solve_low_rank_plus_sparse(inputs, targets, targets.norm().item())
    assert result.weight.shape == (5, 6) and not result.weight.any()
    assert not result.parts["low_rank"].any() and not result.parts["sparse"].any()


def test_an_unfinished_solve_carries_its_parts():
    inputs, targets = made_up_layer(60, 12, 10)
    with pytest.raises(ConvergenceError, match="after 1 iterations") as caught:
        solve_low_rank_plus_sparse(inputs, targets, 0.1 * targets.norm().item(), max_iterations=1)
    result = caught.value.result
    assert result.status is SolverStatus.ITERATION_LIMIT and result.weight.shape == (10, 12)
    assert torch.equal(result.weight, result.parts["low_rank"] + result.parts["sparse"])


def test_single_precision_is_followed_and_few_or_dependent_samples_are_no_trouble():
    for samples, rank in ((200, None), (8, 5), (50, 5)):
        plain = made_up_layer(samples, 12, 6, rank=rank)
        inputs, targets = (tensor.float() for tensor in plain)
        radius = 0.1 * targets.norm().item()
        result = solve_low_rank_plus_sparse(inputs, targets, radius, tolerance=1e-3)
        assert result.weight.dtype == result.parts["sparse"].dtype == torch.float32
        same = solve_low_rank_plus_sparse(*plain, radius, tolerance=1e-3)
        assert result.objective == pytest.approx(same.objective, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity_weight": 0.0}, "sparsity_weight is 0.0; it must be a positive number"),
        ({"sparsity_weight": -1}, "sparsity_weight is -1; it must be a positive number"),
        ({"sparsity_weight": math.nan}, "sparsity_weight is nan"),
        ({"inputs": torch.ones(3, 2)}, "inputs has 3 samples, targets has 4"),
        ({"targets": torch.ones(4)}, "targets has shape"),
        ({"radius": -0.1}, "radius is -0.1"),
        ({"constraint": "ball"}, "constraint is 'ball'"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        (
            {"warm_start": WarmStart(torch.ones(3, 2), torch.ones(2))},
            r"warm_start.weight has shape \(3, 2\); it must be \(2, 2\)",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"inputs": torch.rand(4, 2), "targets": torch.rand(4, 2), "radius": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        solve_low_rank_plus_sparse(**arguments)
