"""Rival: weights that are the product of two sparse matrices, by alternating ADMM.

ddlr.compress_network(model, calibration, DOUBLE_SPARSE, relative_tolerance=0.1)
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.method import LayerProblem, Method
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.reduced_rank import RIDGE, check_ridge
from ddlr.result import SolverResult
from experiments.methods.fixed_structure import refit_parts
from nettrim.budgets import Fitted, smallest_of_several
from nettrim.factor_search import Factors, FactorSearch, split
from nettrim.factors import PARTS, store_product

# Of the nonzeros, how many go to the square factor; each is tried.
_SQUARE_SHARES = (0.67, 0.5, 0.25)
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
class FactorFits:
    """Products of two sparse matrices that are fitted to a layer's outputs.

        minimise ||Xc (A B)t - Tc||_F^2 + penalty * ||A B - W0||_F^2
        over A and B of so many nonzeros each

    by `nettrim.factor_search.FactorSearch`. Then both are fitted in turn on their supports.

    Attributes
    ----------
    quadratic : OutputQuadratic
    dtype : torch.dtype
        In which to compute.
    """

    quadratic: OutputQuadratic
    dtype: torch.dtype

    @cached_property
    def search(self) -> FactorSearch:
        return FactorSearch(self.quadratic.gram, self.dtype)

    def of_size(self, budget: int, square_share: float) -> Fitted:
        """The product of so many nonzeros, a share of them in the square factor."""
        return self.fit(split(budget, self.quadratic.cross.shape, square_share))

    def fit(self, nonzeros: tuple[int, int]) -> Fitted:
        """The product of factors of so many nonzeros each, the left one first."""
        return self.improve(self.search.factors(self.quadratic.cross, nonzeros))

    def improve(self, factors: Factors) -> Fitted:
        """Both factors fitted in turn, on the supports they have."""
        left, right = self.search.improved(self.quadratic.cross, factors, _SWEEPS)
        weight = left @ right
        parts = {"left": left, "right": right}
        return Fitted(weight, self.quadratic.bias_of(weight), parts=parts)


def improve_factors(quadratic: OutputQuadratic, fit: Fitted) -> Fitted:
    """A product of the same supports at which a quadratic is no larger."""
    fits = FactorFits(quadratic, fit.weight.dtype)
    return fits.improve((fit.parts["left"], fit.parts["right"]))


def refit_factors(problem: LayerProblem, solved: SolverResult, *, ridge: float) -> tuple:
    """The best product of the supports of a solved one, see `refit_parts`."""
    if solved.parts is None:
        return solved.weight, solved.bias
    return refit_parts(problem, solved, improve_factors, ridge=ridge)


DOUBLE_SPARSE = Method(
    name="double_sparse",
    solver=solve_double_sparse,
    store=store_product,
    options={"ridge": RIDGE},
    refit=refit_factors,
    refit_options={"ridge": RIDGE},
    parts=PARTS,
)
