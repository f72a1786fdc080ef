"""The optimum lies where a certificate says, on both sides: tight solves and cone solvers agree."""

import math

import pytest
import torch
from torch import nn

from ddlr import SolverStatus, certify, solve_low_rank
from ddlr.proximal import L1, NUCLEAR
from experiments.methods.cone_solvers import solve_reference
from made_up import made_up_layer
from nettrim import solve_sparse

SOLVERS = {"nuclear": solve_low_rank, "l1": solve_sparse}
NORMS = {"nuclear": NUCLEAR, "l1": L1}
SETS = ["nettrim", "hinge"]


@pytest.fixture(scope="module")
def trained_layer(digits):
    """Inputs and outputs of the second layer of a network trained on digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 50), nn.ReLU(), nn.Linear(50, 10)
    )
    images, labels = digits.train.images.flatten(1), digits.train.labels
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        chosen = torch.randint(0, len(images), (128,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimiser.step()
    with torch.no_grad():
        inputs = model[:2](images)
        return inputs, model[2:4](inputs)


@pytest.mark.slow
@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("constraint", ["nettrim", "hinge"])
@pytest.mark.parametrize("fraction", [0.12, 0.4])
def test_the_objective_is_within_the_tolerance_of_a_tight_solve(
    norm, constraint, fraction, trained_layer
):
    inputs, targets = trained_layer
    radius = fraction * targets.norm().item()
    usual = SOLVERS[norm](inputs, targets, radius, constraint=constraint)
    tight = SOLVERS[norm](
        inputs.double(),
        targets.double(),
        radius,
        constraint=constraint,
        tolerance=3e-4,
        max_iterations=20000,
    )
    away = (usual.objective - tight.objective) / usual.objective
    assert away <= usual.relative_gap + 3e-4 <= 1e-2 + 3e-4
    assert away >= -usual.shortfall - 3e-4 >= -1e-2 - 3e-4
    assert usual.violation == 0
    if constraint == "hinge":
        assert usual.shortfall == 0


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_converged_weight_keeps_the_radius_to_the_last_bit(norm, activation):
    inputs, targets = made_up_layer(80, 15, 12, activation=activation, seed=3)
    for fraction in (0.03, 0.1, 0.5, 0.9):
        radius = fraction * targets.norm().item()
        result = SOLVERS[norm](inputs, targets, radius, activation=activation)
        outputs = inputs @ result.weight.T + result.bias
        outputs = outputs.relu() if activation == "relu" else outputs
        assert result.status is SolverStatus.CONVERGED
        assert (outputs - targets).norm() <= radius * (1 + 1e-12)


@pytest.mark.parametrize("norm", SOLVERS)
@pytest.mark.parametrize("constraint", ["nettrim", "hinge"])
def test_what_violations_buy_is_not_above_their_price(norm, constraint):
    inputs, targets = made_up_layer(24, 6, 5, seed=4)
    radius = 0.15 * targets.norm().item()
    best = solve_reference(
        inputs, targets, radius, norm=norm, constraint=constraint, solver="CLARABEL"
    )
    for factor in (1.001, 1.02, 1.2):  # the optima of larger sets, which miss this one
        wider = solve_reference(
            inputs, targets, factor * radius, norm=norm, constraint="hinge", solver="CLARABEL"
        )
        proof = certify(
            wider.weight,
            wider.bias,
            best.dual,
            inputs,
            targets,
            radius,
            norm=NORMS[norm],
            constraint=constraint,
        )
        assert wider.objective < best.objective
        assert best.objective <= proof.objective * (1 + proof.shortfall) * (1 + 1e-6)
        # A first-order price, so near the truth for small violations.
        if constraint == "hinge" and factor == 1.001:
            bought = best.objective / proof.objective - 1
            assert bought == pytest.approx(proof.shortfall, rel=0.05)


def test_sign_violations_are_measured_by_themselves_and_not_in_quadrature():
    inputs, targets = made_up_layer(60, 8, 6, seed=5)
    radius = 0.2 * targets.norm().item()
    solved = solve_low_rank(inputs, targets, radius, tolerance=1e-4, max_iterations=20000)
    options = {"norm": NUCLEAR, "constraint": "nettrim"}
    outputs = inputs @ solved.weight.T + solved.bias
    off = outputs.clamp(min=0)[targets == 0].norm().item()
    given = (solved.weight, solved.bias, solved.dual, inputs, targets, radius)
    proof = certify(*given, **options)
    assert proof.sign_violation == pytest.approx(off / radius, rel=1e-9)
    assert proof.within(1e-4)

    lifted = solved.bias + 0.01 * radius / math.sqrt(len(targets))
    proof = certify(solved.weight, lifted, *given[2:], **options)
    outputs = inputs @ solved.weight.T + lifted
    off = outputs.clamp(min=0)[targets == 0].norm().item()
    assert proof.sign_violation == pytest.approx(off / radius, rel=1e-9)
    assert 1e-3 < proof.sign_violation < 0.04  # which in quadrature would be below 0.001
    assert proof.violation < 1e-2
    assert not proof.within(1e-3)
    paid = -(proof.dual * outputs.clamp(min=0))[targets == 0].sum().item()
    on = (outputs - targets)[targets > 0].norm().item()
    paid += proof.dual[targets > 0].norm().item() * max(0.0, on - radius)
    assert proof.shortfall == pytest.approx(paid / proof.objective, rel=1e-6)


def test_the_sensitivity_is_the_slope_of_the_optimum():
    inputs, targets = made_up_layer(30, 6, 5, seed=6)
    radius = 0.2 * targets.norm().item()
    values = [
        solve_reference(
            inputs, targets, factor * radius, norm="l1", constraint="hinge", solver="CLARABEL"
        )
        for factor in (0.999, 1, 1.001)
    ]
    proof = certify(
        values[1].weight,
        values[1].bias,
        values[1].dual,
        inputs,
        targets,
        radius,
        norm=L1,
        constraint="hinge",
    )
    slope = (values[0].objective - values[2].objective) / 0.002 / values[1].objective
    assert proof.sensitivity == pytest.approx(slope, rel=1e-2)


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
            norm=NORMS[norm],
            constraint=constraint,
        )
        assert 0 <= proof.lower_bound <= best.objective * (1 + 1e-6)
