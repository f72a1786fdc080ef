"""Rival: weights that are the sum of a sparse and a low-rank matrix, by three-block ADMM.

ddlr.compress_network(model, calibration, SPARSE_LOW_RANK, relative_tolerance=0.1)
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.eigen import symmetric_eigen
from ddlr.inputs import CentredInputs
from ddlr.layers import numerical_rank
from ddlr.method import LayerProblem, Method
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.rank_search import lowest_truncation
from ddlr.reduced_rank import RIDGE, check_ridge
from ddlr.result import SolverResult
from ddlr.sizes import fewest_stored
from experiments.methods.fixed_structure import refit_parts
from nettrim.budgets import Fitted, smallest_of_several
from nettrim.sums import PARTS, store_sum
from nettrim.support import largest_entries, minimise_on_support

# Of the lowest rank that is within the radius by itself; what is left of a budget is nonzeros.
_RANK_SHARES = (0.125, 0.25, 0.5, 1.0, 0.0)  # the one that is the best most often comes first
_ITERATIONS = 40
# The penalty of the ADMM, for inputs of unit norm, grows from the first by a factor.
_FIRST_PENALTY, _GROWTH = 0.03, 1.1
_SWEEPS = 2


@torch.no_grad()
def solve_sparse_low_rank(
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    warm_start: WarmStart,
    ridge: float = RIDGE,
) -> SolverResult:
    """Find a sum of a sparse and a low-rank matrix that stores few weights within a bound.

        minimise nonzeros(S) + rank(L) (in_features + out_features - rank(L))
        subject to ||D||_F <= radius,   over W = S + L and b

    For some ranks the fewest nonzeros are sought. Of each number of nonzeros the sum is fitted to
    the original outputs, see `SumFits`. Nothing proves that fewer weights would not do.

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
        `objective` is the number of weights, `parts` are "sparse" and "low_rank". The
        `warm_start` itself, without parts, where nothing smaller is within the radius.

    References
    ----------
    Makni, Meng and Mazumder (2025), 3BASiL, NeurIPS, arXiv 2603.01376: the three-block ADMM. Makni
    et al. (2025), HASSLE-free, CPAL: the exact error of the layer's outputs as objective. Both have
    a given rank and number of nonzeros; the search for them within a bound is ours.
    """
    started = time.perf_counter()
    outputs = OutputSet(targets, radius, activation, "hinge")
    quadratic = OutputQuadratic.of(inputs, outputs, warm_start, check_ridge(ridge))
    fits = SumFits(quadratic, warm_start.weight.dtype)
    rank = _lowest_rank(fits, inputs, outputs)
    ranks = dict.fromkeys(round(share * rank) for share in _RANK_SHARES)
    solved = smallest_of_several(
        [partial(fits.of_size, most_ranks=most) for most in ranks],
        warm_start.weight.numel(),
        inputs,
        outputs,
        warm_start,
    )
    return replace(solved, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class SumFits:
    """Sums of a sparse and a low-rank matrix that are fitted to a layer's outputs.

        minimise ||Xc (S + L)t - Tc||_F^2 + penalty * ||S + L - W0||_F^2
        over S of so many nonzeros and L of a rank

    by ADMM in three blocks: S, a copy of it that has only the largest entries, and L. Inputs are
    scaled to unit norm for the first two. The penalty on the difference of S and its copy grows.
    Then S, on the support of the copy, and L are fitted in turn.

    Attributes
    ----------
    quadratic : OutputQuadratic
    dtype : torch.dtype
        In which to compute.
    """

    quadratic: OutputQuadratic
    dtype: torch.dtype

    @cached_property
    def gram(self) -> Tensor:
        return self.quadratic.gram.to(self.dtype)

    @cached_property
    def norms(self) -> Tensor:
        """Those of the inputs, ridge included, shape (in_features,)."""
        return self.gram.diagonal().sqrt()

    @cached_property
    def scaled_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the Gram matrix of scaled inputs."""
        norms = self.quadratic.gram.diagonal().sqrt()
        values, vectors = symmetric_eigen(self.quadratic.gram / norms / norms[:, None])
        return values.to(self.dtype), vectors.to(self.dtype)

    @cached_property
    def target(self) -> Tensor:
        """The weight that would be fitted best, shape (out_features, in_features)."""
        return self.quadratic.minimiser.to(self.dtype)

    def truncate(self, weight: Tensor, rank: int) -> Tensor:
        """The nearest weight of a rank, in the metric of the inputs."""
        return _on_directions(weight, (weight @ self.gram) @ weight.T, rank)

    def of_size(self, budget: int, most_ranks: int) -> Fitted:
        """The sum that stores so many weights, with a rank that leaves no budget below zero."""
        rank = most_ranks
        while _stored(rank, self.target) > budget:
            rank -= 1
        return self.fit(rank, budget - _stored(rank, self.target))

    def fit(self, rank: int, nonzeros: int) -> Fitted:
        """The sum of so many nonzeros and a matrix of a rank."""
        sparse = torch.zeros_like(self.target)
        low_rank = self.truncate(self.target, rank)
        if nonzeros:
            sparse, low_rank = self._admm(rank, nonzeros)
            sparse, low_rank = self.improve(sparse, low_rank, rank, self.target @ self.gram)
        return self._fitted(sparse, low_rank)

    def _admm(self, rank: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        """Both parts, sparse as the copy; the rest is in coordinates of the eigenvectors."""
        values, vectors = self.scaled_eigen
        penalty = _FIRST_PENALTY
        target = (self.target * self.norms) @ vectors
        rest = target - _truncated(target, values, rank)
        copy = largest_entries(rest @ vectors.T, nonzeros)
        price = torch.zeros_like(copy)
        for _ in range(_ITERATIONS):
            pulled = (penalty * copy - price) @ vectors
            free = (values * rest + pulled) / (values + penalty)
            sparse = free @ vectors.T
            copy = largest_entries(sparse + price / penalty, nonzeros)
            price = price + penalty * (sparse - copy)
            if rank:
                rest = target - _truncated(target - free, values, rank)
            penalty *= _GROWTH
        low_rank = (target - rest) @ vectors.T
        return copy / self.norms, low_rank / self.norms

    def improve(
        self, sparse: Tensor, low_rank: Tensor, rank: int, cross: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The parts fitted in turn to a cross product, on the support and at the rank they have."""
        for _ in range(_SWEEPS if rank else 1):
            sparse = minimise_on_support(
                lambda weight: weight @ self.gram,
                cross - low_rank @ self.gram,
                sparse,
                self.gram.diagonal(),
                iterations=10 if rank else 30,
            )
            if rank:
                low_rank = self.truncate(self.target - sparse, rank)
        return sparse, low_rank

    def _fitted(self, sparse: Tensor, low_rank: Tensor) -> Fitted:
        weight = sparse + low_rank
        parts = {"sparse": sparse, "low_rank": low_rank}
        return Fitted(weight, self.quadratic.bias_of(weight), parts=parts)


def _truncated(weight: Tensor, values: Tensor, rank: int) -> Tensor:
    """The nearest weight of a rank, in coordinates in which inputs have a diagonal Gram matrix."""
    return _on_directions(weight, (weight * values) @ weight.T, rank)


def _on_directions(weight: Tensor, outputs_gram: Tensor, rank: int) -> Tensor:
    """A weight projected on the directions in which its outputs vary most."""
    left = symmetric_eigen(outputs_gram)[1][:, len(weight) - rank :]
    return left @ (left.T @ weight)


def _stored(rank: int, weight: Tensor) -> int:
    return fewest_stored(rank, weight.shape[1], weight.shape[0])


def _lowest_rank(fits: SumFits, inputs: CentredInputs, outputs: OutputSet) -> int:
    """The rank at which the low-rank part alone is within the radius, or where it is of no use."""
    target = fits.target
    left = symmetric_eigen((target @ fits.gram) @ target.T)[1].flip(-1)
    mean = fits.quadratic.mean_targets
    scores = inputs.centred @ (target.T @ left)
    rank = lowest_truncation(outputs, mean, scores, left.T)
    return min(rank, min(target.shape) - 1)


def improve_sum(quadratic: OutputQuadratic, fit: Fitted) -> Fitted:
    """A sum of the same support and rank at which a quadratic is no larger."""
    fits, parts = SumFits(quadratic, fit.weight.dtype), fit.parts
    rank = numerical_rank(parts["low_rank"])
    cross = quadratic.cross.to(fits.dtype)
    return fits._fitted(*fits.improve(parts["sparse"], parts["low_rank"], rank, cross))


def refit_sum(problem: LayerProblem, solved: SolverResult, *, ridge: float) -> tuple:
    """The best sum of the support and the rank of a solved one, see `refit_parts`."""
    if solved.parts is None:
        return solved.weight, solved.bias
    return refit_parts(problem, solved, improve_sum, ridge=ridge)


SPARSE_LOW_RANK = Method(
    name="sparse_low_rank",
    solver=solve_sparse_low_rank,
    store=store_sum,
    options={"ridge": RIDGE},
    refit=refit_sum,
    refit_options={"ridge": RIDGE},
    parts=PARTS,
)
