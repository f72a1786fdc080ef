"""Net-Trim's layer problem: the lowest l1 norm that reproduces a layer within a bound."""

from torch import Tensor

from ddlr.admm import CentredInputs, WarmStart, minimise_norm
from ddlr.constraints import OutputSet
from ddlr.proximal import L1
from ddlr.result import SolverResult


def solve_sparse(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str = "relu",
    constraint: str = "net_trim",
    tolerance: float = 1e-2,
    max_iterations: int = 5000,
    warm_start: WarmStart | SolverResult | None = None,
) -> SolverResult:
    """Find the sparsest-in-l1 weight that reproduces a layer within a bound.

        minimise sum |W|   subject to   X Wt + 1 bt in C(targets, radius),   b free

    The sum of magnitudes stands in for the number of nonzeros. An iteration costs
    4 samples * in_features * out_features flops.

    Parameters, return value and errors are those of `ddlr.solve_low_rank`.

    References
    ----------
    Aghasi, Abdi, Nguyen and Romberg (2017), Net-Trim, NIPS; Aghasi, Abdi and Romberg (2020),
    arXiv 1806.06457. Their bias is penalised with the weights; here it is free.
    """
    outputs = OutputSet(targets, radius, activation, constraint)
    return minimise_norm(
        L1,
        outputs,
        inputs,
        tolerance=tolerance,
        max_iterations=max_iterations,
        warm_start=warm_start,
    )
