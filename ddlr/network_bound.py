"""The bound on the outputs of a whole network that follows from the bounds of its layers."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddlr.captured import CapturedLayer, CapturedLayers
from ddlr.linear_maps import as_layer
from ddlr.proximal import spectral_norm
from ddlr.recording import record
from ddlr.result import CompressionResult, LayerReport, SolverStatus

# Relative differences that pass for rounding: of activations of one network in two passes, and of
# a layer's error measured anew.
_SAME_ACTIVATIONS = 1e-4
_SAME_ERROR = 1e-5


@torch.no_grad()
def output_bound(model: nn.Module, result: CompressionResult, captured: CapturedLayers) -> float:
    """A bound on the error of a compressed network's outputs, relative to the original's.

        ||output error||_F  <=  sum over layers l of  ||D_l||_F * product over k > l of ||V_k||_2

    on the calibration inputs, where D_l is the deviation of layer l by its report and V_k are the
    weights of the compressed layers. ReLU does not lengthen differences, so an error in the inputs
    of a layer grows by its spectral norm at most, and the layer's deviation is added. In cascade
    order the last layer's deviation is that on compressed inputs already, and is the bound.

    The bound is nan, and nothing is proven, in two cases:

    - The layers do not follow each other up to the network's outputs with nothing but their ReLU
      (and dropout, which evaluation leaves out) between them. This is checked to the last bit in a
      pass of the original network and in one of the compressed network, since a path beside the
      layers may be silent in one of them only.
    - In cascade order after `refit="network"`, where no layer has a bound any more and the sum
      would only repeat what was measured.

    Parameters
    ----------
    model : nn.Module
        The original network.
    result : CompressionResult
        With a report of every captured layer, in their order.
    captured : CapturedLayers
        The captured layers of the original network.

    Returns
    -------
    float
        The bound, relative to the norm of the original outputs.
    """
    names = [layer.name for layer in captured.layers]
    if [report.name for report in result.layers] != names:
        return math.nan
    in_cascade = result.order == "cascade"
    if in_cascade and any(report.status is SolverStatus.REFITTED for report in result.layers):
        return math.nan
    if not _may_be_chain(captured.layers):  # no pass, which would hold all activations at once
        return math.nan
    original = _chain(model, captured)
    compressed = _chain(result.model, captured)
    if original is None or compressed is None or not _start_alike(original, compressed, captured):
        return math.nan
    total = 0.0
    for index, (report, layer) in enumerate(zip(result.layers, captured.layers, strict=True)):
        norm = torch.linalg.vector_norm(layer.targets).item()
        solved_on_compressed = in_cascade and report.status is not SolverStatus.UNCHANGED
        stored = as_layer(result.model.get_submodule(report.name))
        if solved_on_compressed:
            produced = compressed[index][1]
        else:
            inputs = layer.inputs.to(stored.weight)
            produced = _activated(stored.forward(inputs), layer)
        moved = (produced.to(layer.targets) - layer.targets) * _read(result, names, index)
        measured = torch.linalg.vector_norm(moved).item()
        deviation = _relative_deviation(report) * norm
        if measured > deviation + _SAME_ERROR * norm:  # not the layer of the report any more
            deviation = measured
        if solved_on_compressed:
            total = deviation
        else:
            total = total * spectral_norm(stored.weight.detach()) + deviation
    return total / norm if norm else math.nan


def _relative_deviation(report: LayerReport) -> float:
    """The bound that the layer's deviation is known to keep, relative to its targets."""
    bound = report.relative_bound
    return bound + report.violation * (bound or 1.0)


def _read(result: CompressionResult, names: list[str], index: int) -> Tensor | float:
    """Which outputs of a layer the next one has weights for."""
    if index + 1 == len(names):
        return 1.0
    return (as_layer(result.model.get_submodule(names[index + 1])).weight != 0).any(dim=0)


def _may_be_chain(layers: Sequence[CapturedLayer]) -> bool:
    """Whether each captured layer was given what the one before it gave."""
    return all(
        layer.targets.shape == following.inputs.shape
        and torch.equal(layer.targets, following.inputs)
        for layer, following in pairwise(layers)
    )


def _chain(network: nn.Module, captured: CapturedLayers) -> list[tuple[Tensor, Tensor]] | None:
    """Inputs and activated outputs of a network's layers, if each reads just the one before it.

    None where they are not such a chain up to the network's outputs.
    """
    layers = captured.layers
    outputs: list = []
    names = [layer.name for layer in layers]
    records = record(network, names, captured.batches, each=outputs.append)
    if not all(isinstance(each, Tensor) and not each.is_complex() for each in outputs):
        return None
    if not all(record.called for record in records.values()):
        return None
    passed = [
        (records[layer.name].inputs, _activated(records[layer.name].outputs, layer))
        for layer in layers
    ]
    for (_, before), (after, _) in pairwise(passed):
        if not (before.shape == after.shape and torch.equal(before, after)):
            return None
    last = passed[-1][1]
    if any(each.shape[-1:] != last.shape[-1:] for each in outputs):
        return None
    final = torch.cat([each.flatten(0, -2) for each in outputs])
    return passed if final.shape == last.shape and torch.equal(final, last) else None


def _activated(outputs: Tensor, layer: CapturedLayer) -> Tensor:
    return outputs.relu() if layer.activation == "relu" else outputs


def _start_alike(
    original: list[tuple[Tensor, Tensor]],
    compressed: list[tuple[Tensor, Tensor]],
    captured: CapturedLayers,
) -> bool:
    """Whether both begin with the same inputs, and the original does what was captured."""
    return _same(original[0][0], compressed[0][0]) and all(
        _same(layer.inputs, inputs.to(layer.inputs))
        and _same(layer.targets, outputs.to(layer.targets))
        for layer, (inputs, outputs) in zip(captured.layers, original, strict=True)
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(
        torch.linalg.vector_norm(one - other) <= _SAME_ACTIVATIONS * torch.linalg.vector_norm(one)
    )
