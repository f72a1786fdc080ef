"""The plain alternating direction method, as a baseline for the benchmark.

What Net-Trim's papers use (Aghasi et al. 2017, 2020): one fixed penalty for both splittings, no
over-relaxation, started at the dense weight, in the coordinates of the data.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.proximal import Norm


@torch.no_grad()
def plain_admm(
    norm: Norm, outputs: OutputSet, inputs: Tensor, weight: Tensor, bias: Tensor, penalty: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Iterate without end on the program of `ddlr.problem.minimise_norm`.

    Yields the norm-side weight, its bias and the dual variable after each iteration; the first
    time comes after the eigendecomposition that all iterations share.
    """
    geometry = CentredInputs(inputs)
    fitted = torch.addmm(bias, inputs, weight.T)
    weight_dual, output_dual = torch.zeros_like(weight), torch.zeros_like(fitted)
    while True:
        sparse = norm.prox(weight + weight_dual, 1 / penalty)
        wanted = outputs.project(fitted + output_dual) - output_dual
        bias = wanted.mean(dim=0)
        cross = wanted.T @ geometry.centred
        weight = geometry.solve_ridge(sparse - weight_dual, cross, 1.0)
        fitted = torch.addmm(bias, geometry.centred, weight.T)
        weight_dual = weight_dual + weight - sparse
        output_dual = fitted - wanted
        yield sparse, bias - sparse @ geometry.mean, -penalty * output_dual
