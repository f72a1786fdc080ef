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
def test_dual_sizes_bring_a_matrix_into_the_dual_ball(rows, columns, seed):
    point = matrix(rows, columns, seed)
    inside = point / NUCLEAR.dual_sizes(point)[:, None]
    assert torch.linalg.matrix_norm(inside, 2) == pytest.approx(1)
    inside = point / L1.dual_sizes(point)[:, None]
    assert torch.allclose(inside.abs().amax(dim=1), torch.ones(rows, dtype=inside.dtype))


def test_norms_agree_with_torch():
    point = matrix(7, 5, 0)
    assert spectral_norm(point) == pytest.approx(torch.linalg.matrix_norm(point, 2).item())
    assert nuclear_norm(point) == pytest.approx(torch.linalg.matrix_norm(point, "nuc").item())


def test_dtype_is_kept_and_a_large_threshold_gives_exact_zero():
    point = matrix(4, 6, 1).float()
    assert singular_value_threshold(point, 0.5).dtype == torch.float32
    assert not singular_value_threshold(point, 1e3).any()
