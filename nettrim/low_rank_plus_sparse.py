"""The layer problem for both structures at once: a low-rank and a sparse matrix, added."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ddlr.arguments import as_number
from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart, check_problem, check_warm_start, minimise_norm
from ddlr.proximal import L1, NUCLEAR, Norm
from ddlr.result import ConvergenceError, SolverResult

PARTS = ("low_rank", "sparse")


def solve_low_rank_plus_sparse(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    sparsity_weight: float | None = None,
    activation: str = "relu",
    constraint: str = "nettrim",
    tolerance: float = 1e-2,
    max_iterations: int = 5000,
    warm_start: WarmStart | SolverResult | None = None,
) -> SolverResult:
    """Find a low-rank and a sparse matrix whose sum reproduces a layer within a bound.

        minimise ||L||_* + t sum |S|   subject to   X (L + S)t + 1 bt in C(targets, radius),  b free

    The optimum is at most the lowest nuclear norm, and at most t times the lowest l1 norm. An
    iteration costs what one of `ddlr.solve_low_rank` does, and a ridge regression in the inputs'
    own coordinates.

    Parameters, return value and errors are those of `ddlr.solve_low_rank`. Beside them:

    Parameters
    ----------
    sparsity_weight : float, optional
        The positive t. For large ones the sparse part is zero, for small ones the low-rank part:
        always from 1 upwards, and up to 1 / sqrt(in_features * out_features). The default,
        1 / sqrt(max(in_features, out_features)), is that of robust principal component analysis.
    warm_start : WarmStart or SolverResult, optional
        A result of this function is taken with its parts, any other weight as the low-rank part.

    Returns
    -------
    SolverResult
        Its `parts` are "low_rank" and "sparse", its weight their sum, and its objective the value
        of both at once. `ddlr.certificate.certify` proves the same of the two side by side, with
        `low_rank_plus_sparse_norm`.

    References
    ----------
    Chandrasekaran, Sanghavi, Parrilo and Willsky (2011), Rank-sparsity incoherence for matrix
    decomposition, SIAM Journal on Optimization 21(2), and Candes, Li, Ma and Wright (2011), Robust
    principal component analysis?, Journal of the ACM 58(3), for the sum of both norms and for t;
    their sum is given, ours has to reproduce outputs. See `ddlr.solve_low_rank` for the bound.
    """
    outputs = OutputSet(targets, radius, activation, constraint)
    inputs = CentredInputs.of(inputs)
    check_problem(inputs.inputs, targets, tolerance, max_iterations)
    if sparsity_weight is None:
        sparsity_weight = 1 / math.sqrt(max(inputs.inputs.shape[1], targets.shape[1]))
    norm = low_rank_plus_sparse_norm(sparsity_weight)
    if warm_start is not None:
        check_warm_start(warm_start, inputs.inputs, targets)
        warm_start = WarmStart(_side_by_side(warm_start), warm_start.bias, warm_start.dual)
    try:
        solved = minimise_norm(
            norm,
            outputs,
            inputs,
            tolerance=tolerance,
            max_iterations=max_iterations,
            warm_start=warm_start,
        )
    except ConvergenceError as error:
        raise ConvergenceError(str(error), _summed(norm, error.result)) from error
    return _summed(norm, solved)


def low_rank_plus_sparse_norm(sparsity_weight: float) -> Norm:
    """The least of ||L||_* + t sum |S| over all L + S = W, a norm of W: an infimal convolution.

    Its variable has L and S side by side, where the proximal operator is that of each norm by
    itself. The dual norm is max(||Z||_2, max |Z| / t).

    Raises
    ------
    ValueError
        If the sparsity weight t is not a positive number.
    """
    t = as_number(sparsity_weight, "sparsity_weight", positive=True)

    def value(variable: Tensor) -> float:
        low_rank, sparse = variable.chunk(2, dim=1)
        return NUCLEAR.value(low_rank) + t * L1.value(sparse)

    def prox(variable: Tensor, threshold: float) -> Tensor:
        low_rank, sparse = variable.chunk(2, dim=1)
        shrunk = NUCLEAR.prox(low_rank, threshold), L1.prox(sparse, t * threshold)
        return torch.cat(shrunk, dim=1)

    def dual_norm_by_row(adjoint: Tensor) -> Tensor:
        return torch.maximum(NUCLEAR.dual_norm_by_row(adjoint), L1.dual_norm_by_row(adjoint) / t)

    def terms(variable: Tensor) -> float:
        low_rank, sparse = variable.chunk(2, dim=1)
        return NUCLEAR.terms(low_rank) + t**2 * L1.terms(sparse)

    return Norm(
        name="low rank plus sparse",
        value=value,
        prox=prox,
        dual_norm_by_row=dual_norm_by_row,
        terms=terms,
        rotation_invariant=False,
        parts=len(PARTS),
    )


def _side_by_side(start: WarmStart | SolverResult) -> Tensor:
    """The parts of a start as one variable; its weight is the low-rank part if it has none."""
    parts = start.parts if isinstance(start, SolverResult) else None
    if parts is not None:
        return torch.cat([parts[name] for name in PARTS], dim=1)
    return torch.cat([start.weight, torch.zeros_like(start.weight)], dim=1)


def _summed(norm: Norm, solved: SolverResult) -> SolverResult:
    """The result with the sum of the two parts as its weight."""
    parts = dict(zip(PARTS, solved.weight.chunk(2, dim=1), strict=True))
    return replace(solved, weight=norm.weight_of(solved.weight), parts=parts)
