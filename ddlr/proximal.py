"""Norms with their proximal operators, and the radial shrinkage behind both output sets.

Every function keeps the dtype and device of its argument.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlr.eigen import symmetric_eigen


def soft_threshold(matrix: Tensor, threshold: float) -> Tensor:
    """Proximal operator of ``threshold * ||.||_1``: shrink each entry towards zero."""
    return torch.nn.functional.softshrink(matrix, threshold)


def singular_value_threshold(matrix: Tensor, threshold: float) -> Tensor:
    """Proximal operator of ``threshold * ||.||_*``: shrink each singular value towards zero.

    Computed from the eigenvectors of the smaller Gram matrix, so it costs O(M N min(M, N)) with
    the constant of a matrix product; on CUDA torch's eigendecomposition waits for the device, and
    nothing else in it does. Singular values are resolved to about sqrt(eps) of the largest; the
    threshold should lie above that.

    References
    ----------
    Cai, Candes and Shen (2010), A singular value thresholding algorithm for matrix completion.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    rows = matrix if wide else matrix.T
    squared, vectors = symmetric_eigen(rows @ rows.T)
    values = squared.clamp_min(threshold**2).sqrt_()
    shrink = (vectors * (1 - threshold / values)) @ vectors.T
    return shrink @ rows if wide else (shrink @ rows).T


def spectral_norm(matrix: Tensor) -> float:
    """Largest singular value."""
    return _singular_values(matrix)[-1].item()


def nuclear_norm(matrix: Tensor) -> float:
    """Sum of the singular values."""
    return _singular_values(matrix).sum().item()


def _singular_values(matrix: Tensor) -> Tensor:
    """Singular values, ascending, from the smaller Gram matrix in float64.

    This is several times faster than an SVD. What rounding makes of a singular value of 0, up to
    1e-7 of the largest, is set to 0. Above, the error is below 1e-8 of the largest.
    """
    rows = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    squared = torch.linalg.eigvalsh(rows @ rows.T)
    noise = 2 * len(rows) * torch.finfo(squared.dtype).eps * squared[-1]
    return torch.where(squared > noise, squared, 0).sqrt()


@dataclass(frozen=True)
class Norm:
    """A norm on weights, with the functions that a solver and a certificate need.

    Attributes
    ----------
    value : callable
        (weight) to its norm.
    prox : callable
        (weight, threshold) to the proximal operator of ``threshold * norm``.
    dual_norm_by_row : callable
        (matrix of the shape of a weight) to one value per row. Dividing each row by its value or
        more brings the matrix into the unit ball of the dual norm.
    terms : callable
        (weight) to the number of nonzero terms that `value` sums, each counted with the square of
        its factor.
    rotation_invariant : bool
        Whether norm(W Q) = norm(W) for every orthogonal Q.
    parts : int
        How many matrices, side by side, make the variable of `value`, `prox` and `terms`. The
        weight is their sum, and its norm the least value of all such variables.
    """

    name: str
    value: Callable[[Tensor], float]
    prox: Callable[[Tensor, float], Tensor]
    dual_norm_by_row: Callable[[Tensor], Tensor]
    terms: Callable[[Tensor], float]
    rotation_invariant: bool
    parts: int = 1

    def weight_of(self, variable: Tensor) -> Tensor:
        """The weight, shape (out_features, in_features), that a variable stands for."""
        if self.parts == 1:
            return variable
        return variable.unflatten(1, (self.parts, -1)).sum(dim=1)


NUCLEAR = Norm(
    name="nuclear",
    value=nuclear_norm,
    prox=singular_value_threshold,
    dual_norm_by_row=lambda adjoint: adjoint.new_full(adjoint.shape[:1], spectral_norm(adjoint)),
    terms=lambda weight: int((_singular_values(weight) > 0).sum()),
    rotation_invariant=True,
)
# Its dual ball, max |entry| <= 1, is a product over rows, so each row has a dual norm.
L1 = Norm(
    name="l1",
    value=lambda weight: weight.abs().sum(dtype=torch.float64).item(),
    prox=soft_threshold,
    dual_norm_by_row=lambda adjoint: adjoint.abs().amax(dim=1),
    terms=lambda weight: int((weight != 0).sum()),
    rotation_invariant=False,
)
