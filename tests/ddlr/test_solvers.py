"""Both solvers agree with independent ones, and their certificates hold when computed anew."""

import cvxpy as cp
import numpy as np
import pytest
import torch

from ddlr import CentredInputs, ConvergenceError, SolverStatus, WarmStart, certify, solve_low_rank
from ddlr.proximal import L1, NUCLEAR
from experiments.methods.cone_solvers import solve_reference
from made_up import made_up_layer
from nettrim import solve_sparse

SOLVERS = {"nuclear": solve_low_rank, "l1": solve_sparse}
SETS = ["nettrim", "hinge"]


def deviation(inputs, targets, weight, bias, activation):
    """D, written out once more."""
    outputs = inputs @ weight.T + bias
    if activation == "none":
        return outputs - targets
    return torch.where(targets > 0, outputs - targets, outputs.clamp(min=0))


def lower_bound(inputs, targets, radius, dual, norm, constraint, activation):
    """The dual value, after checking that the dual variable is feasible."""
    active = targets > 0 if activation == "relu" else torch.ones_like(targets, dtype=torch.bool)
    assert (dual[~active] <= 0).all()
    assert dual.sum(dim=0).abs().max() <= 1e-9 * dual.abs().sum()
    adjoint = dual.T @ inputs
    size = torch.linalg.matrix_norm(adjoint, 2) if norm == "nuclear" else adjoint.abs().max()
    assert size <= 1 + 1e-8
    paid = dual if constraint == "hinge" else dual * active
    return ((dual * targets)[active].sum() - radius * paid.norm()).item()


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("constraint", SETS)
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("fraction", [0.05, 0.4])
def test_agrees_with_scs(norm, constraint, activation, fraction):
    inputs, targets = made_up_layer(40, 9, 7, activation=activation, seed=1)
    radius = fraction * targets.norm().item()
    options = {"activation": activation, "constraint": constraint}
    ours = SOLVERS[norm](inputs, targets, radius, tolerance=1e-5, max_iterations=20000, **options)
    reference = solve_reference(inputs, targets, radius, norm=norm, solver="SCS", **options)
    assert ours.objective == pytest.approx(reference.objective, rel=1e-4)
    miss = deviation(inputs, targets, ours.weight, ours.bias, activation)
    assert miss.norm() <= radius * (1 + 1e-5)
    if constraint == "nettrim" and activation == "relu":
        assert miss[targets == 0].norm() <= 0.01 * radius


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("constraint", SETS)
def test_agrees_with_clarabel_on_the_smallest(norm, constraint):
    inputs, targets = made_up_layer(20, 5, 4, seed=2)
    radius = 0.1 * targets.norm().item()
    ours = SOLVERS[norm](
        inputs, targets, radius, constraint=constraint, tolerance=1e-6, max_iterations=50000
    )
    reference = solve_reference(
        inputs, targets, radius, norm=norm, constraint=constraint, solver="CLARABEL"
    )
    assert ours.objective == pytest.approx(reference.objective, rel=1e-5)
    assert ours.lower_bound <= reference.objective * (1 + 1e-7)


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("constraint", SETS)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_certificate_can_be_recomputed_from_the_result(norm, constraint, activation):
    inputs, targets = made_up_layer(60, 12, 10, activation=activation, seed=3)
    radius = 0.1 * targets.norm().item()
    result = SOLVERS[norm](
        inputs, targets, radius, activation=activation, constraint=constraint, tolerance=1e-3
    )
    assert result.status is SolverStatus.CONVERGED
    bound = lower_bound(inputs, targets, radius, result.dual, norm, constraint, activation)
    assert result.lower_bound == pytest.approx(bound, rel=1e-8)
    order = "nuc" if norm == "nuclear" else 1
    flat = result.weight if norm == "nuclear" else result.weight.flatten()
    assert result.objective == pytest.approx(torch.linalg.norm(flat, order).item(), rel=1e-8)
    assert result.relative_gap == pytest.approx((result.objective - bound) / result.objective)
    assert abs(result.relative_gap) <= 1e-3
    miss = deviation(inputs, targets, result.weight, result.bias, activation).norm().item()
    assert result.violation == pytest.approx(max(0, miss / radius - 1), abs=1e-9)
    assert result.violation <= 1e-3


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("constraint", SETS)
def test_any_dual_whatsoever_gives_a_lower_bound(norm, constraint):
    inputs, targets = made_up_layer(20, 5, 4, seed=4)
    radius = 0.2 * targets.norm().item()
    best = solve_reference(
        inputs, targets, radius, norm=norm, constraint=constraint, solver="CLARABEL"
    )
    for seed in range(20):
        dual = torch.randn(targets.shape, generator=torch.Generator().manual_seed(seed)).double()
        dual += 0.5 * targets
        proof = certify(
            best.weight,
            best.bias,
            dual,
            inputs,
            targets,
            radius,
            norm={"nuclear": NUCLEAR, "l1": L1}[norm],
            constraint=constraint,
        )
        assert 0 <= proof.lower_bound <= best.objective * (1 + 1e-6)


@pytest.mark.parametrize("norm", SOLVERS)
def test_hinge_is_never_above_nettrim(norm):
    inputs, targets = made_up_layer(60, 12, 10, seed=5)
    radius = 0.2 * targets.norm().item()
    optima = {
        constraint: SOLVERS[norm](
            inputs, targets, radius, constraint=constraint, tolerance=1e-4, max_iterations=20000
        ).objective
        for constraint in SETS
    }
    assert optima["hinge"] < optima["nettrim"]


@pytest.mark.parametrize("norm", SOLVERS)
def test_weight_is_exactly_low_rank_or_sparse(norm):
    inputs, targets = made_up_layer(80, 20, 15, seed=6)
    result = SOLVERS[norm](inputs, targets, 0.3 * targets.norm().item())
    if norm == "nuclear":
        values = torch.linalg.svdvals(result.weight)
        assert (values > 1e-12 * values[0]).sum() < 15
    else:
        assert (result.weight == 0).sum() > 0.2 * result.weight.numel()


@pytest.mark.parametrize("norm", SOLVERS)
def test_iteration_limit_is_an_error_that_carries_the_result(norm):
    inputs, targets = made_up_layer(60, 12, 10)
    with pytest.raises(ConvergenceError, match="after 1 iterations") as caught:
        SOLVERS[norm](inputs, targets, 0.1 * targets.norm().item(), max_iterations=1)
    result = caught.value.result
    assert result.status is SolverStatus.ITERATION_LIMIT
    assert result.iterations == 1
    assert result.weight.shape == (10, 12)


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_radius_of_the_targets_norm_gives_the_zero_weight(norm, activation):
    inputs, targets = made_up_layer(30, 6, 5, activation=activation)
    for factor in (1.0, 7.0):
        result = SOLVERS[norm](
            inputs, targets, factor * targets.norm().item(), activation=activation
        )
        assert not result.weight.any()
        assert (result.objective, result.relative_gap, result.violation) == (0, 0, 0)


@pytest.mark.parametrize("norm", SOLVERS)
def test_radius_zero_reproduces_the_targets(norm):
    inputs, targets = made_up_layer(60, 6, 5)
    result = SOLVERS[norm](inputs, targets, 0.0)
    outputs = (inputs @ result.weight.T + result.bias).relu()
    assert (outputs - targets).norm() <= 1e-3 * targets.norm()


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("samples", [8, 50])
def test_scale_and_few_or_dependent_samples_do_not_matter(norm, scale, samples):
    plain = made_up_layer(samples, 12, 6, rank=5)
    inputs, targets = made_up_layer(samples, 12, 6, rank=5, scale=scale)
    inputs = torch.cat([inputs, torch.zeros(samples, 1).to(inputs)], dim=1)
    targets = torch.cat([targets, torch.zeros(samples, 1).to(targets)], dim=1)
    result = SOLVERS[norm](inputs, targets, 0.1 * targets.norm().item(), tolerance=1e-3)
    same = SOLVERS[norm](*plain, 0.1 * plain[1].norm().item(), tolerance=1e-3)
    assert result.objective == pytest.approx(same.objective, rel=2e-3)


@pytest.mark.parametrize("norm", SOLVERS)
def test_float32_is_followed_and_certified(norm):
    inputs, targets = (tensor.float() for tensor in made_up_layer(200, 30, 20))
    result = SOLVERS[norm](inputs, targets, 0.1 * targets.norm().item(), tolerance=1e-3)
    assert result.weight.dtype == result.bias.dtype == result.dual.dtype == torch.float32
    assert result.status is SolverStatus.CONVERGED


@pytest.mark.parametrize("norm", SOLVERS)
def test_a_neighbouring_solve_is_a_better_start(norm):
    inputs, targets = made_up_layer(200, 30, 20, seed=8)
    size = targets.norm().item()
    neighbour = SOLVERS[norm](inputs, targets, 0.11 * size, tolerance=1e-3)
    cold = SOLVERS[norm](inputs, targets, 0.1 * size, tolerance=1e-3)
    warm = SOLVERS[norm](inputs, targets, 0.1 * size, tolerance=1e-3, warm_start=neighbour)
    assert warm.iterations < cold.iterations
    assert warm.objective == pytest.approx(cold.objective, rel=3e-3)


@pytest.mark.parametrize("norm", SOLVERS)
def test_a_zero_solution_is_a_usable_start(norm):
    inputs, targets = made_up_layer(200, 30, 20, seed=8)
    size = targets.norm().item()
    zero = SOLVERS[norm](inputs, targets, size)
    assert not zero.weight.any()
    warm = SOLVERS[norm](inputs, targets, 0.1 * size, warm_start=zero)
    assert warm.status is SolverStatus.CONVERGED


@pytest.mark.parametrize("norm", SOLVERS)
def test_tensors_that_require_a_gradient_can_be_given(norm):
    layer = torch.nn.Linear(6, 5)
    inputs = torch.randn(40, 6)
    targets = layer(inputs).relu()
    start = WarmStart(layer.weight, layer.bias)
    result = SOLVERS[norm](inputs, targets, 0.1 * targets.norm().item(), warm_start=start)
    assert not any(value.requires_grad for value in (result.weight, result.bias, result.dual))


@pytest.mark.parametrize("norm", SOLVERS)
def test_shared_geometry_changes_nothing(norm):
    inputs, targets = made_up_layer(100, 15, 10, seed=9)
    radius = 0.1 * targets.norm().item()
    alone = SOLVERS[norm](inputs, targets, radius)
    shared = SOLVERS[norm](CentredInputs(inputs), targets, radius)
    assert torch.equal(alone.weight, shared.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.ones(3, 2)}, "inputs has 3 samples, targets has 4"),
        ({"inputs": torch.ones(0, 2), "targets": torch.ones(0, 2)}, "inputs has shape"),
        ({"inputs": torch.full((4, 2), float("nan"))}, "inputs has 8 values that are not finite"),
        ({"targets": torch.full((4, 2), float("inf"))}, "targets has 8 values that are not finite"),
        ({"targets": torch.ones(4)}, "targets has shape"),
        ({"inputs": torch.ones(4, 2, dtype=torch.int64)}, "floating-point"),
        ({"radius": -0.1}, "radius is -0.1"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"warm_start": WarmStart(torch.ones(3, 2), torch.ones(2))}, "warm_start.weight has shape"),
    ],
)
@pytest.mark.parametrize("norm", SOLVERS)
def test_bad_arguments_are_named(norm, change, message):
    arguments = {"inputs": torch.rand(4, 2), "targets": torch.rand(4, 2), "radius": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        SOLVERS[norm](**arguments)


@pytest.mark.parametrize("constraint", SETS)
def test_with_the_bias_penalised_it_is_a_weight_like_the_others(constraint):
    inputs, targets = made_up_layer(40, 9, 7, seed=11)
    radius = 0.2 * targets.norm().item()
    options = {"constraint": constraint, "penalise_bias": True}
    ours = solve_sparse(inputs, targets, radius, tolerance=1e-5, max_iterations=50000, **options)

    x, y = inputs.numpy(), targets.numpy()
    weight, bias = cp.Variable((7, 9)), cp.Variable((7, 1))
    outputs = x @ weight.T + np.ones((40, 1)) @ bias.T
    slack, on = cp.Variable(y.shape, nonneg=True), y > 0
    rules = [
        cp.multiply(on, cp.abs(outputs - y)) <= slack,
        cp.multiply(~on, outputs) <= (slack if constraint == "hinge" else 0),
        cp.norm(slack, "fro") <= radius,
    ]
    best = cp.Problem(cp.Minimize(cp.sum(cp.abs(weight)) + cp.sum(cp.abs(bias))), rules)
    best.solve(solver="CLARABEL")
    assert ours.objective == pytest.approx(best.value, rel=1e-4)
    own = ours.weight.abs().sum() + ours.bias.abs().sum()
    assert own.item() == pytest.approx(ours.objective, rel=1e-9)
    assert deviation(inputs, targets, ours.weight, ours.bias, "relu").norm() <= radius * (1 + 1e-5)
    free = solve_sparse(inputs, targets, radius, constraint=constraint, tolerance=1e-5)
    assert free.objective < ours.objective
