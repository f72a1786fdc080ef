"""Rival: weights that are the product of two sparse matrices, by alternating ADMM.

ddlr.compress_network(model, calibration, DOUBLE_SPARSE, relative_tolerance=0.1)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ddlr.compression import store_low_rank
from ddlr.constraints import OutputSet
from ddlr.eigen import symmetric_eigen
from ddlr.inputs import CentredInputs
from ddlr.layers import SparseFactors
from ddlr.method import LayerProblem, Method
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.reduced_rank import RIDGE, check_ridge
from ddlr.result import SolverResult
from experiments.methods.fixed_structure import (
    QuadraticFits,
    largest_entries,
    minimise_on_support,
    refit_parts,
)
from nettrim.budgets import Fitted, smallest_of_several

# Of the nonzeros, how many go to the square factor. The one that is the best most often first.
_SQUARE_SHARES = (0.25, 0.4, 0.1)
_ITERATIONS = 20
_STEPS = 3  # of the ADMM of one factor, before it is the other's turn
_LEAST_ANCHOR = 1e-2
_SWEEPS = 3


@torch.no_grad()
def solve_double_sparse(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    warm_start: WarmStart,
    ridge: float = RIDGE,
) -> SolverResult:
    """Find a product of two sparse matrices that stores few weights within a bound.

        minimise nonzeros(A) + nonzeros(B)   subject to ||D||_F <= radius,   over W = A B and b

    One factor is square, of the smaller side of W. For some splits of the nonzeros between the
    factors the fewest are sought. Of each number the product is fitted to the original outputs, see
    `FactorFits`. Nothing proves that fewer weights would not do.

    Parameters
    ----------
    inputs : CentredInputs
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    radius : float
        Frobenius bound on the output error, in units of `targets`.
    activation : {"relu", "none"}
    warm_start : WarmStart
        Weight and bias of the original layer.
    ridge : float
        Relative to the mean eigenvalue of the centred inputs' Gram matrix.

    Returns
    -------
    SolverResult
        `objective` is the number of weights; `parts` are "left", A, of shape (out_features, inner),
        and "right", B, of shape (inner, in_features). The `warm_start` itself, without parts, where
        nothing smaller is within the radius.

    References
    ----------
    Boza and Macko (2025), Two sparse matrices are better than one, ICLR, arXiv 2409.18850. They
    have a given number of nonzeros, and scale inputs to unit norm; here the whole Gram matrix of
    the inputs counts, and the number is sought within a bound.
    """
    started = time.perf_counter()
    outputs = OutputSet(targets, radius, activation, "hinge")
    quadratic = OutputQuadratic.of(inputs, outputs, warm_start, check_ridge(ridge))
    fits = FactorFits(quadratic, warm_start.weight.dtype)
    solved = smallest_of_several(
        [partial(fits.of_size, square_share=share) for share in _SQUARE_SHARES],
        warm_start.weight.numel(),
        inputs,
        outputs,
        warm_start,
    )
    return replace(solved, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class FactorFits(QuadraticFits):
    """Products of two sparse matrices that are fitted to a layer's outputs.

        minimise ||Xc (A B)t - Tc||_F^2 + penalty * ||A B - W0||_F^2
        over A and B of so many nonzeros each

    by some steps of ADMM on one factor and then the other, in turn, from the identity as the square
    factor. Each factor is scaled so that the quadratic has a diagonal of ones, and is held where it
    was the more the later. Then both are fitted in turn on their supports.
    """

    @cached_property
    def cross(self) -> Tensor:
        return self.quadratic.cross.to(self.dtype)

    def of_size(self, budget: int, square_share: float) -> Fitted:
        """The product of so many nonzeros, a share of them in the square factor."""
        rows, columns = self.cross.shape
        square = min(round(square_share * budget), min(rows, columns) ** 2)
        other = min(budget - square, rows * columns)
        return self.fit(square, other) if rows <= columns else self.fit(other, square)

    def fit(self, left_nonzeros: int, right_nonzeros: int) -> Fitted:
        """The product of factors of so many nonzeros each."""
        left, right = self._start(left_nonzeros, right_nonzeros)
        left_price, right_price = torch.zeros_like(left), torch.zeros_like(right)
        for iteration in range(_ITERATIONS):
            anchor = max(_LEAST_ANCHOR, min(1.0, iteration / (_ITERATIONS - 3)) ** 3)
            left, left_price = self._move_left(left, left_price, right, left_nonzeros, anchor)
            right, right_price = self._move_right(left, right, right_price, right_nonzeros, anchor)
        return self.improve(left, right)

    def _start(self, left_nonzeros: int, right_nonzeros: int) -> tuple[Tensor, Tensor]:
        best = self.quadratic.minimiser.to(self.dtype)
        identity = torch.eye(min(best.shape), dtype=self.dtype, device=best.device)
        if len(best) <= best.shape[1]:
            return identity, largest_entries(best * self.norms, right_nonzeros) / self.norms
        return largest_entries(best * self.norms, left_nonzeros), identity / self.norms

    def _move_left(
        self, left: Tensor, price: Tensor, right: Tensor, nonzeros: int, anchor: float
    ) -> tuple[Tensor, Tensor]:
        gram = right @ self.gram @ right.T
        scale = _norms(gram)
        values, vectors = symmetric_eigen(gram / scale / scale[:, None])
        pulled = (self.cross @ right.T / scale) @ vectors

        def solve(towards: Tensor, penalty: float) -> Tensor:
            return (pulled + penalty * (towards @ vectors)) / (values + penalty) @ vectors.T

        copy, price = _admm(solve, left * scale, price * scale, nonzeros, anchor)
        return copy / scale, price / scale

    def _move_right(
        self, left: Tensor, right: Tensor, price: Tensor, nonzeros: int, anchor: float
    ) -> tuple[Tensor, Tensor]:
        gram = left.T @ left
        scale = _norms(gram)
        row_values, row_vectors = symmetric_eigen(gram / scale / scale[:, None])
        values, vectors = self.scaled_eigen
        curvature = row_values.clamp_min(0)[:, None] * values
        scales = scale[:, None] * self.norms
        pulled = row_vectors.T @ (left.T @ self.cross / scales) @ vectors

        def solve(towards: Tensor, penalty: float) -> Tensor:
            free = pulled + penalty * (row_vectors.T @ towards @ vectors)
            return row_vectors @ (free / (curvature + penalty)) @ vectors.T

        copy, price = _admm(solve, right * scales, price * scales, nonzeros, anchor)
        return copy / scales, price / scales

    def improve(self, left: Tensor, right: Tensor) -> Fitted:
        """Both factors fitted in turn, on the supports they have."""
        for _ in range(_SWEEPS):
            gram = right @ self.gram @ right.T
            left = minimise_on_support(
                lambda factor, gram=gram: factor @ gram,
                self.cross @ right.T,
                left,
                _norms(gram).square(),
            )
            gram = left.T @ left
            right = minimise_on_support(
                lambda factor, gram=gram: gram @ factor @ self.gram,
                left.T @ self.cross,
                right,
                _norms(gram).square()[:, None] * self.gram.diagonal(),
            )
        weight = left @ right
        parts = {"left": left, "right": right}
        return Fitted(weight, self.quadratic.bias_of(weight), parts=parts)


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
    free = solve(copy - price, anchor)
    for _ in range(_STEPS):
        copy = largest_entries(free + price, nonzeros)
        price = price + free - copy
        free = solve(copy - price, 1.0)
    return copy, price


def improve_factors(quadratic: OutputQuadratic, fit: Fitted) -> Fitted:
    """A product of the same supports at which a quadratic is no larger."""
    fits = FactorFits(quadratic, fit.weight.dtype)
    return fits.improve(fit.parts["left"], fit.parts["right"])


def refit_factors(problem: LayerProblem, solved: SolverResult, *, ridge: float) -> tuple:
    """The best product of the supports of a solved one, see `refit_parts`."""
    if solved.parts is None:
        return solved.weight, solved.bias
    return refit_parts(problem, solved, improve_factors, ridge=ridge)


def store_factors(
    weight: Tensor, bias: Tensor, left: Tensor | None = None, right: Tensor | None = None
) -> nn.Module | None:
    """A layer of both factors, or of a bias alone; None without parts."""
    if left is None or right is None:
        return None if weight.any() else store_low_rank(weight, bias)
    return SparseFactors.from_factors(left, right, bias)


DOUBLE_SPARSE = Method(
    name="double_sparse",
    solver=solve_double_sparse,
    store=store_factors,
    options={"ridge": RIDGE},
    refit=refit_factors,
    refit_options={"ridge": RIDGE},
    parts={"left": (True, False), "right": (False, True)},
)
