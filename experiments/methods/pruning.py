"""The fewest nonzeros within a layer's bound, of rivals that prune to a given number."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.reduced_rank import check_ridge
from ddlr.result import SolverResult
from nettrim.budgets import smallest_within


@torch.no_grad()
def fewest_nonzeros(
    pruning_of: Callable[[OutputQuadratic], Callable[[int], Tensor]],
    inputs: CentredInputs,
    targets: Tensor,
    radius: float,
    *,
    activation: str,
    ridge: float,
    warm_start: WarmStart,
) -> SolverResult:
    """The sparse layer of the fewest nonzeros, up to one per cent, within the radius.

    Parameters
    ----------
    pruning_of : callable
        A quadratic to a function of a number of nonzeros, that gives a weight of so many for which
        the quadratic is small, shape (out_features, in_features).
    ridge : float
        That of the quadratic, towards the start.

    Other parameters and the return value are those of `smallest_within` and of
    `ddlr.lowest_rank`.
    """
    began = time.perf_counter()
    outputs = OutputSet(targets, radius, activation, "hinge")
    quadratic = OutputQuadratic.of(inputs, outputs, warm_start, check_ridge(ridge))
    varying = quadratic.penalty > 0  # else a weight says no more than the bias
    prune = pruning_of(quadratic) if varying else lambda _: torch.zeros_like(quadratic.cross)

    def fit(nonzeros: int) -> WarmStart:
        weight = prune(nonzeros).to(warm_start.weight)
        return WarmStart(weight, quadratic.bias_of(weight))

    found = smallest_within(fit, warm_start.weight.numel(), inputs, outputs, warm_start)
    return replace(found, seconds=time.perf_counter() - began)
