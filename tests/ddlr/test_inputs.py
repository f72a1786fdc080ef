"""Inputs as solvers use them: eigenvectors, coordinates and ridge regressions are what they say."""

import pytest
import torch

from ddlr import CentredInputs, solve_low_rank
from ddlr.inputs import BLOCK_ROWS, UncentredInputs, row_blocks
from made_up import made_up_layer
from nettrim import solve_sparse

SOLVERS = {"nuclear": solve_low_rank, "l1": solve_sparse}
# Tall, wide, of lower rank, and more than a block on either side.
SHAPES = [(60, 20, None), (15, 40, None), (200, 20, 6), (1300, 30, None), (20, 600, 9)]


@pytest.mark.parametrize("norm", SOLVERS)
def test_shared_inputs_change_nothing(norm):
    inputs, targets = made_up_layer(100, 15, 10, seed=9)
    radius = 0.1 * targets.norm().item()
    alone = SOLVERS[norm](inputs, targets, radius)
    shared = SOLVERS[norm](CentredInputs(inputs), targets, radius)
    assert torch.equal(alone.weight, shared.weight)


def test_what_is_centred_stays_the_same_object():
    inputs, _ = made_up_layer(10, 4, 3)
    for kind in (CentredInputs, UncentredInputs):
        once = kind(inputs)
        assert CentredInputs.of(once) is once
    assert CentredInputs.of(inputs).inputs is inputs


@pytest.mark.parametrize("samples", [1, BLOCK_ROWS, BLOCK_ROWS + 1, 3 * BLOCK_ROWS])
def test_blocks_cover_all_rows_once(samples):
    rows = torch.arange(samples)
    blocks = [rows[block] for block in row_blocks(samples)]
    assert torch.equal(torch.cat(blocks), rows)
    assert 0 < min(map(len, blocks)) <= max(map(len, blocks)) <= BLOCK_ROWS


@pytest.mark.parametrize("kind", [CentredInputs, UncentredInputs])
@pytest.mark.parametrize(("samples", "features", "rank"), SHAPES, ids=str)
def test_eigenvectors_are_those_of_the_gram_matrix(samples, features, rank, kind):
    plain, _ = made_up_layer(samples, features, 3, rank=rank, seed=1)
    inputs = kind(plain)
    mean = plain.mean(dim=0) if kind is CentredInputs else torch.zeros(features).to(plain)
    assert torch.equal(inputs.mean, mean) and torch.equal(inputs.centred, plain - mean)
    values, vectors = inputs.eigen
    gram = inputs.centred.T @ inputs.centred
    assert torch.allclose((vectors * values) @ vectors.T, gram, atol=1e-9 * gram.abs().max())
    assert torch.allclose(vectors.T @ vectors, torch.eye(len(values)).to(plain), atol=1e-9)
    assert (values.diff() >= 0).all()
    most = min(samples - (kind is CentredInputs), features)
    assert len(values) == (rank or most)  # what does not vary is left out


@pytest.mark.parametrize(("samples", "features", "rank"), SHAPES, ids=str)
def test_principal_coordinates_leave_the_outputs_alone(samples, features, rank):
    plain, _ = made_up_layer(samples, features, 3, rank=rank, seed=2)
    inputs = CentredInputs(plain)
    principal = inputs.principal
    weight = torch.randn(3, features, generator=torch.Generator().manual_seed(0)).to(plain)
    rotated = principal.to_coordinates(weight)
    assert rotated.shape[1] == principal.centred.shape[1] == len(principal.mean)
    outputs = inputs.centred @ weight.T
    assert torch.allclose(principal.centred @ rotated.T, outputs, atol=1e-8)
    assert torch.allclose(principal.to_coordinates(principal.from_coordinates(rotated)), rotated)
    assert torch.equal(inputs.from_coordinates(inputs.to_coordinates(weight)), weight)


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize(("samples", "features", "rank"), SHAPES, ids=str)
def test_a_ridge_regression_has_a_zero_gradient_in_either_coordinates(
    samples, features, rank, penalty
):
    plain, right = made_up_layer(samples, features, 3, rank=rank, seed=3)
    original = CentredInputs(plain)
    weight = torch.randn(3, features, generator=torch.Generator().manual_seed(0)).to(plain)
    for inputs in (original, original.principal):
        start = inputs.to_coordinates(weight)
        fit = inputs.solve_ridge(start, right.T @ inputs.centred, penalty)
        residual = inputs.centred @ fit.T - right
        gradient = (fit - start) / penalty + residual.T @ inputs.centred
        assert gradient.norm() <= 1e-9 * (right.T @ inputs.centred).norm()
