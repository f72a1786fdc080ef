"""Norms with their proximal operators, and the radial shrinkage behind both output sets.

Every function keeps the dtype and device of its argument.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def soft_threshold(matrix: Tensor, threshold: float) -> Tensor:
    """Proximal operator of ``threshold * ||.||_1``: shrink each entry towards zero."""
    return torch.nn.functional.softshrink(matrix, threshold)


def singular_value_threshold(matrix: Tensor, threshold: float) -> Tensor:
    """Proximal operator of ``threshold * ||.||_*``: shrink each singular value towards zero.

    Computed from the eigenvectors of the smaller Gram matrix, formed and decomposed in float64, so
    it costs O(M N min(M, N)) with the constant of a matrix product. Singular values below about
    1e-8 of the largest are resolved as zero.

    References
    ----------
    Cai, Candes and Shen (2010), A singular value thresholding algorithm for matrix completion.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    rows = matrix if wide else matrix.T
    squared, vectors = torch.linalg.eigh(_gram(rows))
    values = squared.clamp_min(0).sqrt()
    kept = values > threshold
    basis = vectors[:, kept]
    shrunk = (basis * (1 - threshold / values[kept])).to(matrix.dtype)
    thresholded = shrunk @ (basis.to(matrix.dtype).T @ rows)
    return thresholded if wide else thresholded.T


def spectral_norm(matrix: Tensor) -> float:
    """Largest singular value."""
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(_gram(rows))[-1].clamp_min(0).sqrt().item()


def nuclear_norm(matrix: Tensor) -> float:
    """Sum of the singular values."""
    return torch.linalg.svdvals(matrix.double()).sum().item()


def _gram(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows @ rows.T


@dataclass(frozen=True)
class Norm:
    """A norm on weights, with what a solver and a certificate need of it.

    Attributes
    ----------
    value : callable
        Weight to norm.
    prox : callable
        (weight, threshold) to the proximal operator of ``threshold * norm``.
    dual_sizes : callable
        Matrix of the shape of a weight to one size a row, so that dividing each row by its size
        or more brings the matrix into the unit ball of the dual norm.
    terms : callable
        Weight to the number of terms that `value` sums.
    """

    name: str
    value: Callable[[Tensor], float]
    prox: Callable[[Tensor, float], Tensor]
    dual_sizes: Callable[[Tensor], Tensor]
    terms: Callable[[Tensor], int]


NUCLEAR = Norm(
    name="nuclear",
    value=nuclear_norm,
    prox=singular_value_threshold,
    dual_sizes=lambda adjoint: adjoint.new_full(adjoint.shape[:1], spectral_norm(adjoint)),
    terms=lambda weight: min(weight.shape),
)
# Its dual ball, max |entry| <= 1, is a product over rows: each row has a size of its own.
L1 = Norm(
    name="l1",
    value=lambda weight: weight.abs().sum(dtype=torch.float64).item(),
    prox=soft_threshold,
    dual_sizes=lambda adjoint: adjoint.abs().amax(dim=1),
    terms=torch.numel,
)
