"""Two sparse matrices whose product is the best weight, for one quadratic.

The quadratic is tr(W G Wt) - 2 tr(W Bt), see `ddlr.quadratic.OutputQuadratic`: G, the Gram matrix
of a layer's inputs, stays the same where its targets, and with them B, change.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ddlr.eigen import symmetric_eigen
from nettrim.support import largest_entries, minimise_on_support

Factors = tuple[Tensor, Tensor]
"""A of shape (out_features, inner) and B of shape (inner, in_features), of the weight A B."""

# Of both factors in turn; the first anchor of a search that has a start is that of a later one.
_ITERATIONS, _BEGUN = 40, 15
_STEPS = 3  # of the ADMM of one factor, before it is the other's turn
_LEAST_ANCHOR = 1e-2


class FactorSearch:
    """Looks for the best product of two matrices that have so many nonzeros each.

        minimise tr(W G Wt) - 2 tr(W Bt)   over W = L R with at most k nonzeros in L and l in R

    by some steps of the alternating direction method of multipliers on one factor and then on the
    other, in turn, from the identity as the square factor: one has the smaller side of W on both
    sides. Each factor is scaled so that the quadratic has a diagonal of ones, and is held where it
    was the more the later.

    Parameters
    ----------
    gram : Tensor, shape (in_features, in_features), float64
        Positive definite.
    dtype : torch.dtype
        In which to iterate; the eigenvectors of G are computed in float64, once.

    References
    ----------
    Boza and Macko (2025), Two sparse matrices are better than one, ICLR, arXiv 2409.18850. They
    scale inputs to unit norm; here the whole Gram matrix of the inputs counts.
    """

    def __init__(self, gram: Tensor, dtype: torch.dtype = torch.float64):
        self._exact, self._gram = gram, gram.to(dtype)
        self._norms = self._gram.diagonal().sqrt()

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the Gram matrix of scaled inputs."""
        norms = self._exact.diagonal().sqrt()
        values, vectors = symmetric_eigen(self._exact / norms / norms[:, None])
        return values.to(self._gram), vectors.to(self._gram)

    def factors(
        self, cross: Tensor, nonzeros: tuple[int, int], start: Factors | None = None
    ) -> Factors:
        """The factors.

        Parameters
        ----------
        cross : Tensor, shape (out_features, in_features)
            B.
        nonzeros : (int, int)
            Of the left factor, and of the right one.
        start : Factors, optional
            Near which to begin. Rows of the right one whose column of the left one is zero, and the
            other way round, are filled with what is missing, so that they may be of use again.
        """
        cross, first = cross.to(self._gram), 0 if start is None else _BEGUN
        left, right = (
            self._first(cross, *nonzeros) if start is None else self._filled(cross, *start)
        )
        left_price, right_price = torch.zeros_like(left), torch.zeros_like(right)
        for iteration in range(first, _ITERATIONS):
            anchor = max(_LEAST_ANCHOR, min(1.0, iteration / (_ITERATIONS - 3)) ** 3)
            left, left_price = self._move_left(cross, left, left_price, right, nonzeros[0], anchor)
            right, right_price = self._move_right(
                cross, left, right, right_price, nonzeros[1], anchor
            )
        return left, right

    def improved(self, cross: Tensor, factors: Factors, sweeps: int = 1) -> Factors:
        """The factors fitted in turn on the supports they have; the quadratic never rises."""
        left, right = factors
        cross = cross.to(self._gram)
        for _ in range(sweeps):
            gram = right @ self._gram @ right.T
            left = minimise_on_support(
                lambda factor, gram=gram: factor @ gram,
                cross @ right.T,
                left,
                _norms(gram).square(),
            )
            gram = left.T @ left
            right = minimise_on_support(
                lambda factor, gram=gram: gram @ factor @ self._gram,
                left.T @ cross,
                right,
                _norms(gram).square()[:, None] * self._gram.diagonal(),
            )
        return left, right

    def _best(self, cross: Tensor) -> Tensor:
        """The best weight without zeros, for scaled inputs."""
        values, vectors = self._eigen
        return (cross / self._norms) @ (vectors / values) @ vectors.T

    def _filled(self, cross: Tensor, left: Tensor, right: Tensor) -> Factors:
        """The factors with another start for each inner index that has no part in the product.

        As in the identity that a search begins with, each gets one output for itself (or one input,
        where there are fewer of these): those of which the product misses most.
        """
        idle = ~((left != 0).any(dim=0) & (right != 0).any(dim=1))
        missing = self._best(cross) - (left @ right) * self._norms
        wide = len(left) <= right.shape[1]
        sizes = missing.square().sum(dim=1 if wide else 0)
        idle = idle.nonzero()[: len(sizes), 0]
        places = sizes.topk(len(idle)).indices
        left, right = left.clone(), right.clone()
        left[:, idle], right[idle] = 0, 0
        if wide:
            left[places, idle] = 1
            right[idle] = missing[places] / self._norms
        else:
            left[:, idle] = missing[:, places]
            right[idle, places] = 1 / self._norms[places]
        return left, right

    def _first(self, cross: Tensor, left_nonzeros: int, right_nonzeros: int) -> Factors:
        best = self._best(cross)
        identity = torch.eye(min(best.shape), dtype=best.dtype, device=best.device)
        if len(best) <= best.shape[1]:
            return identity, largest_entries(best, right_nonzeros) / self._norms
        return largest_entries(best, left_nonzeros), identity / self._norms

    def _move_left(
        self,
        cross: Tensor,
        left: Tensor,
        price: Tensor,
        right: Tensor,
        nonzeros: int,
        anchor: float,
    ) -> tuple[Tensor, Tensor]:
        gram = right @ self._gram @ right.T
        scale = _norms(gram)
        values, vectors = symmetric_eigen(gram / scale / scale[:, None])
        pulled = (cross @ right.T / scale) @ vectors

        def solve(towards: Tensor, penalty: float) -> Tensor:
            return (pulled + penalty * (towards @ vectors)) / (values + penalty) @ vectors.T

        copy, price = _admm(solve, left * scale, price * scale, nonzeros, anchor)
        return copy / scale, price / scale

    def _move_right(
        self,
        cross: Tensor,
        left: Tensor,
        right: Tensor,
        price: Tensor,
        nonzeros: int,
        anchor: float,
    ) -> tuple[Tensor, Tensor]:
        gram = left.T @ left
        scale = _norms(gram)
        row_values, row_vectors = symmetric_eigen(gram / scale / scale[:, None])
        values, vectors = self._eigen
        curvature = row_values.clamp_min(0)[:, None] * values
        scales = scale[:, None] * self._norms
        pulled = row_vectors.T @ (left.T @ cross / scales) @ vectors

        def solve(towards: Tensor, penalty: float) -> Tensor:
            free = pulled + penalty * (row_vectors.T @ towards @ vectors)
            return row_vectors @ (free / (curvature + penalty)) @ vectors.T

        copy, price = _admm(solve, right * scales, price * scales, nonzeros, anchor)
        return copy / scales, price / scales


def split(budget: int, shape: Sequence[int], square_share: float) -> tuple[int, int]:
    """How many nonzeros the left factor has, and the right one, of a budget for both.

    Parameters
    ----------
    budget : int
    shape : (int, int)
        That of the product.
    square_share : float
        The share of the budget that goes to the square factor, which is of the smaller side.
    """
    rows, columns = shape
    square = min(round(square_share * budget), min(rows, columns) ** 2)
    other = min(budget - square, rows * columns)
    return (square, other) if rows <= columns else (other, square)


def _norms(gram: Tensor) -> Tensor:
    """The norms of what has a Gram matrix; those that are zero are not divided by."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    return torch.where(norms > torch.finfo(gram.dtype).eps * norms.max(), norms, 1.0)


def _admm(
    solve: Callable[[Tensor, float], Tensor],
    copy: Tensor,
    price: Tensor,
    nonzeros: int,
    anchor: float,
) -> tuple[Tensor, Tensor]:
    """Some steps towards the minimum of a quadratic over matrices of so many nonzeros.

    Parameters
    ----------
    solve : callable
        A matrix and a penalty on the distance from it to the minimum without zeros.
    copy, price : Tensor
        The sparse matrix and the scaled dual variable to begin with; both are returned anew.
    anchor : float
        The first penalty; the others are 1.
    """
    penalty = anchor
    for _ in range(_STEPS):
        free = solve(copy - price, penalty)
        copy = largest_entries(free + price, nonzeros)
        price, penalty = price + free - copy, 1.0
    return copy, price
