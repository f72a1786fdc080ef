"""Projections are the nearest points of their sets, and the sets imply the guarantee."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddlr.constraints import OutputSet
from ddlr.inputs import row_blocks

cases = st.tuples(
    st.sampled_from(["nettrim", "hinge"]),
    st.sampled_from(["relu", "none"]),
    st.integers(0, 10**6),
    st.floats(0.01, 3.0),
)


def make(constraint: str, activation: str, seed: int, radius: float):
    generator = torch.Generator().manual_seed(seed)
    point, targets = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64) * 2
    targets = targets.relu() if activation == "relu" else targets
    return OutputSet(targets, radius, activation, constraint), point


def in_set(outputs: OutputSet, point: torch.Tensor) -> bool:
    deviation = outputs.deviation(point)
    inside = deviation.norm() <= outputs.radius * (1 + 1e-9)
    if outputs.constraint == "nettrim" and outputs.activation == "relu":
        inside &= bool((deviation[outputs.targets == 0] <= 1e-12).all())
    return bool(inside)


@given(cases, st.integers(0, 10**6))
def test_projection_satisfies_the_variational_inequality(case, other_seed):
    """<x - Px, z - Px> <= 0 for every z of the set, which only the nearest point satisfies."""
    outputs, point = make(*case)
    projected = outputs.project(point)
    assert in_set(outputs, projected)
    _, other = make(*case[:2], other_seed, case[3])
    other = outputs.project(other)
    assert ((point - projected) * (other - projected)).sum() <= 1e-9
    # The boundary point on the way to the target is the closest rival of a wrong radius.
    exact = point - outputs.deviation(point)
    assert ((point - projected) * (exact - projected)).sum() <= 1e-9
    assert torch.allclose(outputs.project(projected), projected)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cases)
def test_projection_agrees_with_cvxpy(case):
    outputs, point = make(*case)
    variable, slack = cp.Variable(point.shape), cp.Variable(point.shape)
    targets = outputs.targets.numpy()
    active = targets > 0 if outputs.activation == "relu" else np.ones_like(targets, dtype=bool)
    allowed = 0 if outputs.constraint == "nettrim" else slack
    constraints = [
        cp.multiply(active, variable - targets) <= slack,
        cp.multiply(active, targets - variable) <= slack,
        cp.multiply(~active, variable) <= allowed,
        cp.norm(slack, "fro") <= outputs.radius,
    ]
    distance = cp.sum_squares(variable - point.numpy())
    cp.Problem(cp.Minimize(distance), constraints).solve(solver="CLARABEL")
    assert np.allclose(outputs.project(point).numpy(), variable.value, atol=1e-4)


@given(cases)
def test_both_sets_imply_the_guarantee(case):
    outputs, point = make(*case)
    projected = outputs.project(point)
    final = projected.relu() if outputs.activation == "relu" else projected
    assert (final - outputs.targets).norm() <= outputs.radius * (1 + 1e-9)


@given(cases)
def test_nettrim_lies_inside_hinge(case):
    outputs, point = make(*case)
    narrow = OutputSet(outputs.targets, outputs.radius, outputs.activation, "nettrim")
    wide = OutputSet(outputs.targets, outputs.radius, outputs.activation, "hinge")
    assert in_set(wide, narrow.project(point))


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("constraint", ["nettrim", "hinge"])
def test_best_constant_output_is_the_best_of_those_allowed(constraint, activation):
    """Of outputs that are on for every sample, for some and for none."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    if activation == "relu":
        targets = targets.relu()
        targets[:, 0] += 0.5
        targets[:, 3] = 0
    best = OutputSet(targets, 99.0, activation, constraint).best_constant_output()
    for column, value in enumerate(best):
        column_set = OutputSet(targets[:, [column]], 99.0, activation, constraint)
        constants = torch.linspace(-2, 3, 1001, dtype=torch.float64)
        allowed = [
            each for each in constants if in_set(column_set, each.expand_as(column_set.targets))
        ]
        least = min(
            column_set.deviation(each.expand_as(column_set.targets)).norm() for each in allowed
        )
        assert in_set(column_set, value.expand_as(column_set.targets))
        assert column_set.deviation(value.expand_as(column_set.targets)).norm() <= least + 1e-12


@given(cases, st.integers(1, 8))
def test_blocks_of_rows_add_up_to_the_whole(case, block_rows):
    outputs, point = make(*case)
    blocks = row_blocks(len(point), block_rows)
    assert max(len(point[rows]) for rows in blocks) <= block_rows
    assert torch.equal(torch.cat([point[rows] for rows in blocks]), point)
    square = sum(outputs.bounded_square(point[rows], rows) for rows in blocks)
    assert square.item() == pytest.approx(outputs.bounded_square(point).item())
    shrink_factor = outputs.shrink_factor(square)
    moved = torch.cat([outputs.displacement(point[rows], shrink_factor, rows) for rows in blocks])
    assert torch.allclose(point - moved, outputs.project(point))
    nearest = torch.cat([outputs.nearest(point[rows], rows) for rows in blocks])
    assert torch.allclose(nearest, point - outputs.deviation(point))


@given(cases)
def test_violation_is_relative_to_the_radius_and_never_negative(case):
    outputs, point = make(*case)
    miss = outputs.deviation(point).norm().item()
    assert outputs.violation(point) == pytest.approx(max(0, miss / outputs.radius - 1))
    assert outputs.violation(point - outputs.deviation(point)) == 0
    exact = OutputSet(outputs.targets, 0.0, outputs.activation, outputs.constraint)
    assert exact.violation(point) == pytest.approx(miss / outputs.targets.norm().item())
    assert torch.allclose(exact.project(point), point - exact.deviation(point))
    assert exact.shrink_factor(exact.bounded_square(exact.targets)) == 1  # 0 of 0 is whole
    nothing = OutputSet(torch.zeros_like(point), 0.0, outputs.activation, outputs.constraint)
    assert nothing.violation(point) == pytest.approx(nothing.deviation(point).norm().item())


def test_a_single_negative_target_is_none_of_a_relu_layer():
    targets = torch.ones(3, 2)
    targets[1, 1] = -1e-3
    with pytest.raises(ValueError, match="must not be negative"):
        OutputSet(targets, 1.0, "relu", "hinge")
    OutputSet(targets, 1.0, "none", "hinge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 2), -1.0, "relu", "hinge"), "radius is -1.0"),
        ((torch.ones(2, 2), float("nan"), "relu", "hinge"), "radius is nan"),
        ((torch.ones(2, 2), float("inf"), "relu", "hinge"), "radius is inf"),
        ((torch.ones(2, 2), 1.0, "gelu", "hinge"), "activation is 'gelu'"),
        ((torch.ones(2, 2), 1.0, "relu", "ball"), "constraint is 'ball'"),
        ((-torch.ones(2, 2), 1.0, "relu", "hinge"), "must not be negative"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        OutputSet(*arguments)
