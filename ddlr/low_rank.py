"""DDLR's layer problem: the lowest nuclear norm that reproduces a layer within a bound."""

from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart, minimise_norm
from ddlr.proximal import NUCLEAR
from ddlr.result import SolverResult


def solve_low_rank(
    inputs: Tensor | CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str = "relu",
    constraint: str = "nettrim",
    tolerance: float = 1e-2,
    max_iterations: int = 5000,
    warm_start: WarmStart | SolverResult | None = None,
) -> SolverResult:
    """Find the lowest-nuclear-norm weight that reproduces a layer within a bound.

        minimise ||W||_*   subject to   X Wt + 1 bt in C(targets, radius),   b free

    The nuclear norm, the sum of the singular values, stands in for the rank. C is one of the two
    output sets of `ddlr.constraints`; both imply ``||relu(X Wt + 1 bt) - targets||_F <= radius``.
    An iteration costs 4 samples * in_features * out_features flops and an eigendecomposition of
    size min(in_features, out_features).

    Parameters
    ----------
    inputs : Tensor, shape (samples, in_features), or CentredInputs
        The solve follows their device and dtype. float32 serves tolerances down to about 1e-4. For
        several solves of one layer, ``CentredInputs(inputs)`` shares the eigendecomposition.
    targets : Tensor, shape (samples, out_features)
        Output of the original layer, after its activation.
    radius : float
        Frobenius bound on the output error, in units of `targets`. From the norm of the targets
        upwards the zero weight is returned. For radius 0 violations are relative to that norm.
    activation : {"relu", "none"}
        What follows the layer.
    constraint : {"nettrim", "hinge"}
        "nettrim" asks for A <= 0 where the target is 0; "hinge" counts what is above 0 there
        towards the radius: the same guarantee, more room, a lower norm.
    tolerance : float
        Bound on |relative_gap|. The violation is held to min(1e-3, tolerance).
    max_iterations : int
    warm_start : WarmStart or SolverResult, optional
        Weight and bias of the original layer, or a solve at a neighbouring radius.

    Returns
    -------
    SolverResult

    Raises
    ------
    ValueError
        If shapes disagree, a value is not finite, or an option is unknown.
    ConvergenceError
        If the tolerance is not met within `max_iterations`; carries the result.

    References
    ----------
    Papadimitriou and Jain (2021), arXiv 2107.05787. Aghasi et al. (2020), arXiv 1806.06457.
    """
    outputs = OutputSet(targets, radius, activation, constraint)
    return minimise_norm(
        NUCLEAR,
        outputs,
        inputs,
        tolerance=tolerance,
        max_iterations=max_iterations,
        warm_start=warm_start,
    )
