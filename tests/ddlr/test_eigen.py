"""Eigenvectors of matrices on which LAPACK fails."""

import numpy as np
import pytest
import torch

from ddlr.eigen import symmetric_eigen


def gram_with_rows_of_zeros(seed: int) -> torch.Tensor:
    """At several seeds below 5 `torch.linalg.eigh` fails on it in float32, or returns nan."""
    generator = torch.Generator().manual_seed(seed)
    used = torch.randperm(300, generator=generator)[: 40 + seed]
    rows = torch.randn(len(used), 600, generator=generator)
    weight = torch.zeros(300, 600)
    weight[used] = rows * (torch.rand(rows.shape, generator=generator) < 0.01)
    return weight @ weight.T


def check(matrix: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> None:
    """What defines them: orthonormal, in ascending order, and they make up the matrix."""
    assert values.dtype == vectors.dtype == matrix.dtype
    assert (values.diff() >= 0).all()
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    torch.testing.assert_close(vectors.T @ vectors, identity, atol=1e-4, rtol=0)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_matrices_of_many_equal_eigenvalues_are_decomposed(seed):
    matrix = gram_with_rows_of_zeros(seed)
    check(matrix, *symmetric_eigen(matrix))


def fails(_):
    raise torch.linalg.LinAlgError("did not converge")


def returns_nan(matrix):
    return torch.zeros(len(matrix)), torch.full_like(matrix, torch.nan)


@pytest.mark.parametrize("first", [fails, returns_nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_torch_does_not_find_numpy_does(first, dtype, monkeypatch):
    matrix = gram_with_rows_of_zeros(0).to(dtype)
    monkeypatch.setattr(torch.linalg, "eigh", first)
    check(matrix, *symmetric_eigen(matrix))


def test_a_matrix_that_is_not_finite_has_none():
    with pytest.raises(np.linalg.LinAlgError):
        symmetric_eigen(torch.full((3, 3), torch.nan))
