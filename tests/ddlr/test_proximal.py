"""Proximal operators satisfy their optimality condition, which pins the threshold exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddlr.proximal import (
    L1,
    NUCLEAR,
    nuclear_norm,
    singular_value_threshold,
    soft_threshold,
    spectral_norm,
)

sides = st.integers(1, 12)
seeds = st.integers(0, 10**6)
thresholds = st.floats(0.01, 5.0)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@given(sides, sides, seeds, thresholds)
def test_singular_value_threshold_is_the_prox_of_the_nuclear_norm(rows, columns, seed, threshold):
    point = matrix(rows, columns, seed)
    prox = singular_value_threshold(point, threshold)
    subgradient = (point - prox) / threshold
    assert torch.linalg.matrix_norm(subgradient, 2) <= 1 + 1e-6
    assert (subgradient * prox).sum() == pytest.approx(nuclear_norm(prox), abs=1e-6)


@given(sides, sides, seeds, thresholds)
def test_soft_threshold_is_the_prox_of_the_l1_norm(rows, columns, seed, threshold):
    point = matrix(rows, columns, seed)
    prox = soft_threshold(point, threshold)
    subgradient = (point - prox) / threshold
    assert subgradient.abs().max() <= 1 + 1e-12
    assert (subgradient * prox).sum() == pytest.approx(prox.abs().sum().item(), abs=1e-9)


@given(sides, sides, seeds)
def test_dual_norm_by_row_bring_a_matrix_into_the_dual_ball(rows, columns, seed):
    point = matrix(rows, columns, seed)
    inside = point / NUCLEAR.dual_norm_by_row(point)[:, None]
    assert torch.linalg.matrix_norm(inside, 2) == pytest.approx(1)
    inside = point / L1.dual_norm_by_row(point)[:, None]
    assert torch.allclose(inside.abs().amax(dim=1), torch.ones(rows, dtype=inside.dtype))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 6), (6, 6)], ids=str)
def test_norms_agree_with_torch(shape):
    point = matrix(*shape, 0)
    assert spectral_norm(point) == pytest.approx(torch.linalg.matrix_norm(point, 2).item())
    assert nuclear_norm(point) == pytest.approx(torch.linalg.matrix_norm(point, "nuc").item())
    assert NUCLEAR.value(point) == nuclear_norm(point)
    assert L1.value(point) == pytest.approx(point.abs().sum().item())


def with_singular_values(values: list[float], rows: int, columns: int) -> torch.Tensor:
    left = torch.linalg.qr(matrix(rows, len(values), 1)).Q
    right = torch.linalg.qr(matrix(columns, len(values), 2)).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(6, 30), (30, 6), (12, 12), (300, 200)], ids=str)
def test_singular_values_count_down_to_a_millionth_of_the_largest_and_no_further(shape, scale):
    """What is 0 but for rounding is left out: the terms are the rank."""
    values = [1.0, 1e-1, 1e-3, 1e-5, 1e-6]
    point = scale * with_singular_values(values, *shape)
    assert NUCLEAR.terms(point) == 5
    for rank in range(5):
        small = scale * with_singular_values(values[rank:], *shape)
        assert NUCLEAR.terms(small) == 5 - rank
        # Each of them is off by less than 1e-8 of the largest.
        miss = abs(nuclear_norm(small) - scale * sum(values[rank:]))
        assert miss <= 5e-8 * scale * values[rank]
    assert NUCLEAR.terms(torch.zeros(*shape)) == nuclear_norm(torch.zeros(*shape)) == 0


def test_norms_of_single_precision_weights_are_exact_to_more_digits_than_they_have():
    point = with_singular_values([1.0, 1e-1, 1e-2, 1e-3, 1e-4], 30, 20).float()
    exact = torch.linalg.svdvals(point.double())
    assert nuclear_norm(point) == pytest.approx(exact.sum().item(), rel=1e-7)
    assert spectral_norm(point) == pytest.approx(exact[0].item(), rel=1e-12)
    many = torch.full((1000, 1000), 0.1)
    assert L1.value(many) == pytest.approx(1e6 * many[0, 0].item(), rel=1e-12)


def test_terms_of_the_l1_norm_are_its_nonzeros():
    point = matrix(5, 4, 0)
    point[1] = point[3, 2] = 0
    assert L1.terms(point) == 15


def test_only_the_nuclear_norm_sees_no_rotation():
    point, rotation = matrix(5, 4, 0), torch.linalg.qr(matrix(4, 4, 1)).Q
    for norm in (NUCLEAR, L1):
        same = norm.value(point @ rotation) == pytest.approx(norm.value(point))
        assert same == norm.rotation_invariant


def test_dtype_is_kept_and_a_large_threshold_gives_exact_zero():
    point = matrix(4, 6, 1).float()
    assert singular_value_threshold(point, 0.5).dtype == torch.float32
    assert not singular_value_threshold(point, 1e3).any()


@pytest.mark.parametrize("seed", range(5))
def test_sparse_weights_with_rows_of_zeros_are_thresholded(seed):
    """At several of these seeds LAPACK does not find the eigenvectors in float32."""
    generator = torch.Generator().manual_seed(seed)
    used = torch.randperm(300, generator=generator)[: 40 + seed]
    sparse = torch.randn(len(used), 600, generator=generator)
    weight = torch.zeros(300, 600)
    weight[used] = sparse * (torch.rand(sparse.shape, generator=generator) < 0.01)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (left * (values - 0.1).clamp_min(0)) @ right
    torch.testing.assert_close(
        singular_value_threshold(weight, 0.1), expected.float(), atol=1e-5, rtol=0
    )
