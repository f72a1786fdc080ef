"""Weights that are the product of two sparse matrices: the smallest one within a radius."""

import dataclasses
import math
import time
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from ddlr.compression import store_low_rank
from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.layers import SparseFactors
from ddlr.method import LayerProblem
from ddlr.problem import WarmStart
from ddlr.reduced_rank import RIDGE, MajorisedFit
from ddlr.result import SolverResult
from ddlr.storing import embedded
from nettrim.budgets import Fitted
from nettrim.factor_search import Factors, FactorSearch, split
from nettrim.sparse_fit import SparseFit, SparseProblem, fewest_within

PARTS = {"left": (True, False), "right": (False, True)}
"""The names of the factors, and which has the layer's outputs and its inputs, see `ddlr.Method`."""

_SUPPORTS_OF_REFIT = 10
_SQUARE_SHARES = (0.33, 0.5, 0.67)  # of the nonzeros, that may go to the square factor
_FIRST = 0.35  # of the nonzeros of the sparse weight: where the search begins


@torch.no_grad()
def smallest_product(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    sparse: SolverResult,
    warm_start: WarmStart | SolverResult,
    activation: str = "relu",
    ridge: float = RIDGE,
) -> SolverResult:
    """Find a product of two sparse matrices that has fewer nonzeros than a sparse one alone.

        minimise nonzeros(A) + nonzeros(B)   subject to ||D||_F <= radius,   over W = A B and b

    with D as in `nettrim.fewest_nonzeros`, on the inputs that the sparse weight uses. One factor is
    square, of the smaller side of W. Each number of nonzeros that is tried is fitted as in
    `fewest_nonzeros`: for the targets of the majoriser, factors are looked for by
    `nettrim.factor_search.FactorSearch`, and then moved on their supports, by conjugate gradients
    for one and the other in turn, with targets that are extrapolated. So the supports follow the
    ReLU, too. How many of the nonzeros go to the square factor is chosen once, of a third, a half
    and two thirds, by the loss of the first fit. The number is sought as there. Nothing proves that
    fewer weights would not do.

    Parameters are those of `nettrim.fewest_nonzeros`. Beside them:

    Parameters
    ----------
    sparse : SolverResult
        What `nettrim.fewest_nonzeros` found for the same problem.
    warm_start : WarmStart or SolverResult
        As there, but needed.

    Returns
    -------
    SolverResult
        `objective` is the number of nonzeros, `parts` are "left", A, of shape (out_features,
        inner), and "right", B, of shape (inner, in_features). `sparse` itself, which has no parts,
        where no product is smaller than it. `iterations` and `seconds` are those of the fits of
        products.

    References
    ----------
    Boza and Macko (2025), Two sparse matrices are better than one, ICLR, arXiv 2409.18850, for the
    form and its search. The bound, the ReLU and the search for the number are ours.
    """
    began = time.perf_counter()
    used = sparse.weight.any(dim=0)
    if not (radius and used.any()):
        return sparse
    outputs = OutputSet(targets, radius, activation, "hinge")
    problem = FactorProblem.on_used(used, CentredInputs.of(inputs), outputs, warm_start, ridge)
    largest = int(sparse.objective)
    size = max(round(_FIRST * largest), 1)
    firsts = [FactorFit.of_size(problem, size, share) for share in _SQUARE_SHARES]
    best, iterations = fewest_within(min(firsts, key=lambda fit: fit.loss), largest)
    spent = {"iterations": iterations, "seconds": time.perf_counter() - began}
    if best is None:
        return dataclasses.replace(sparse, **spent)
    weight, parts = _on_all_inputs(best.weight, best.parts, used)
    return dataclasses.replace(
        sparse,
        weight=weight,
        bias=best.bias,
        parts=parts,
        objective=float(_nonzeros(best.parts)),
        violation=outputs.violation(torch.addmm(best.bias, problem.inputs.inputs, best.weight.T)),
        **spent,
    )


def refit_product(
    problem: LayerProblem, solved: SolverResult, *, ridge: float
) -> tuple[Tensor, Tensor, Mapping[str, Tensor] | None]:
    """Move a product to a smaller output error, with as many nonzeros in each factor.

        minimise ||D||_F^2 + ridge * ||W - W0||_F^2   over W of the form, and b

    The supports move, too, as in `nettrim.refit_nonzeros`; inputs that are not used stay unused.
    The loss never ends above that at the solved weight W0.
    """
    used = solved.weight.any(dim=0)
    if not used.any():
        return solved.weight, solved.bias, solved.parts
    outputs = OutputSet(problem.targets, 0.0, problem.activation, "hinge")
    products = FactorProblem.on_used(used, problem.inputs, outputs, solved, ridge)
    factors = solved.parts["left"], solved.parts["right"][:, used]
    share = _square_share(factors)
    fit = FactorFit(products, factors, products.targets_of_start, share)
    fit.alternate(fit.nonzeros, _SUPPORTS_OF_REFIT)
    refitted = fit.answer()
    weight, parts = _on_all_inputs(refitted.weight, refitted.parts, used)
    return weight, refitted.bias, parts


def store_product(
    weight: Tensor, bias: Tensor, left: Tensor | None = None, right: Tensor | None = None
) -> nn.Module | None:
    """A layer of both factors, or of a bias alone; None without parts."""
    if left is None or right is None:
        return None if weight.any() else store_low_rank(weight, bias)
    return SparseFactors.from_factors(left, right, bias)


class FactorProblem(SparseProblem):
    """What all products that are fitted to one layer share."""

    @cached_property
    def search(self) -> FactorSearch:
        return FactorSearch(self.quadratic.gram, self.start.weight.dtype)


class FactorFit(SparseFit):
    """A product of two matrices on their supports, on its way to a smaller loss.

    Parameters
    ----------
    problem : FactorProblem
    factors : Factors
        Where it begins.
    targets : Tensor, shape (samples, out_features)
        Those to fit first.
    square_share : float
        Of the nonzeros of further fits, see `nettrim.factor_search.split`.
    """

    problem: FactorProblem

    def __init__(
        self, problem: FactorProblem, factors: Factors, targets: Tensor, square_share: float
    ):
        MajorisedFit.__init__(self, problem.outputs)
        self.problem, self.square_share = problem, square_share
        self.parts = _named(factors)
        self.square = self.loss = math.inf
        self._sweep(targets)

    @classmethod
    def of_size(cls, problem: FactorProblem, nonzeros: int, square_share: float) -> "FactorFit":
        """The first fit of so many nonzeros."""
        cross = problem.quadratic.cross
        sizes = split(nonzeros, cross.shape, square_share)
        factors = problem.search.factors(cross, sizes)
        return cls(problem, factors, problem.targets_of_start, square_share)

    @property
    def nonzeros(self) -> int:
        return _nonzeros(self.parts)

    def with_support(self, nonzeros: int) -> "FactorFit":
        """As of `SparseFit`."""
        factors = self._support_from_here(nonzeros)
        return FactorFit(self.problem, factors, self.nearest, self.square_share)

    def answer(self) -> Fitted:
        weight = self.parts["left"] @ self.parts["right"]
        return Fitted(weight, self.shift - weight @ self.problem.inputs.mean, parts=self.parts)

    def _support_from_here(self, nonzeros: int) -> Factors:
        """Factors whose supports are the next ones."""
        cross = self.problem.cross(self.nearest)
        sizes = split(nonzeros, cross.shape, self.square_share)
        return self.problem.search.factors(cross, sizes, tuple(self.parts.values()))

    def _change_support(self, support: Factors) -> bool:
        before, self.parts = self.parts, _named(support)
        self.begin_anew()
        if self._sweep(self.nearest):
            return True
        self.parts = before
        return False

    def _least_squares(self, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        factors = tuple(self.parts.values())
        left, right = self.problem.search.improved(self.problem.cross(targets), factors)
        return (left @ right).double(), _named((left, right))


def _on_all_inputs(
    weight: Tensor, parts: Mapping[str, Tensor], used: Tensor
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A weight and its factors with zeros for the inputs that are not used."""
    rows, inner = (used.new_ones(len(matrix)) for matrix in (weight, parts["right"]))
    right = embedded(parts["right"], inner, used)
    return embedded(weight, rows, used), {"left": parts["left"], "right": right}


def _named(factors: Factors) -> Mapping[str, Tensor]:
    return dict(zip(PARTS, factors, strict=True))


def _nonzeros(parts: Mapping[str, Tensor]) -> int:
    return sum(int((part != 0).sum()) for part in parts.values())


def _square_share(factors: Factors) -> float:
    """The share of the nonzeros that is in the square factor."""
    left, right = (int((factor != 0).sum()) for factor in factors)
    rows, columns = len(factors[0]), factors[1].shape[1]
    return (left if rows <= columns else right) / (left + right)
