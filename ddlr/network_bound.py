"""What the bounds of the layers prove for the outputs of the whole network."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddlr.capture import OutputError, outputs_of
from ddlr.layerwise import CapturedLayers
from ddlr.proximal import spectral_norm
from ddlr.result import CompressionResult, LayerReport, SolverStatus

# Of activations of one network that differ by rounding alone.
_SAME = 1e-4


@torch.no_grad()
def output_bound(model: nn.Module, result: CompressionResult, captured: CapturedLayers) -> float:
    """A bound on the error of a compressed network's outputs, relative to the original's.

        ||output error||_F  <=  sum over layers l of  ||D_l||_F * product over k > l of ||V_k||_2

    on the calibration inputs, D_l being the deviation that layer l was found within and V_k the
    weights of the compressed layers. ReLU does not lengthen differences, so an error in the inputs
    of a layer grows by its spectral norm at most, and the layer's own is added. In cascade order
    the last layer's deviation is from the compressed inputs already, and is the bound.

    That takes layers that follow each other with nothing but their ReLU (and dropout, which
    evaluation leaves out) between them, up to the network's outputs. It is checked on the captured
    activations; where it is not so, and nothing is proven, the bound is nan.

    Parameters
    ----------
    model : nn.Module
        The original network.
    result : CompressionResult
        Of all captured layers, in their order.
    captured : CapturedLayers

    Returns
    -------
    float
        Relative to the norm of the original outputs.
    """
    if not _is_chain(model, result, captured):
        return math.nan
    total = 0.0
    for report, layer in zip(result.layers, captured.layers, strict=True):
        norm = torch.linalg.vector_norm(layer.targets).item()
        own = _deviation(report) * norm
        if result.order == "cascade" and report.status is not SolverStatus.UNCHANGED:
            total = own
            continue
        weight = result.model.get_submodule(report.name).weight
        total = total * spectral_norm(weight.detach()) + own
    return total / norm if norm else math.nan


def _deviation(report: LayerReport) -> float:
    """What the layer's deviation is known not to exceed, relative to its targets."""
    bound = report.relative_tolerance
    return bound + report.violation * (bound or 1.0)


def _is_chain(model: nn.Module, result: CompressionResult, captured: CapturedLayers) -> bool:
    layers = captured.layers
    if [report.name for report in result.layers] != [layer.name for layer in layers]:
        return False
    if not all(_same(before.targets, after.inputs) for before, after in pairwise(layers)):
        return False
    try:
        outputs = outputs_of(model, captured.batches)
    except OutputError:  # such as a tuple
        return False
    return _same(layers[-1].targets, outputs)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(
        torch.linalg.vector_norm(one - other) <= _SAME * torch.linalg.vector_norm(one)
    )
