"""From what each layer costs at each tolerance to tolerances for all layers together."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ddlr.captured import CapturedLayers
from ddlr.goals import TOLERANCES, Option, as_tolerances
from ddlr.method import Method
from ddlr.outputs import Output, OutputError, check_outputs, divergence, network_outputs
from ddlr.walk import Solved, WalkSettings, compress_layers

log = logging.getLogger(__name__)

_FRONTIER_AT_MOST = 4096


@dataclass(frozen=True)
class Allocation:
    """A tolerance for each layer, with the sums of the weights and of the divergences."""

    parameters: int
    divergence: float
    tolerances: Mapping[str, float]


def frontier(options: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """Allocations that no other beats in both size and divergence, the smallest first.

    As if the divergences of layers added up. Layers are joined one by one, and what is beaten by
    others with the same option of the layer joined last is left out at once, so this is exact;
    beyond 4096 allocations it is thinned out. The network as it is, each tolerance being 0, comes
    last, also where a smaller one equals it on the calibration inputs.
    """
    last = [Option(0.0, 0, 0.0)]
    joined = [[Allocation(0, 0.0, {})]]
    for name, choices in options.items():
        joined = [
            _unbeaten(
                [
                    _joined(each, name, option, before)
                    for before, allocations in zip(last, joined, strict=True)
                    for each in allocations
                ]
            )
            for option in choices
        ]
        last = choices
    unbeaten = _unbeaten([each for allocations in joined for each in allocations])
    untouched = [choices[0] for choices in options.values()]
    if any(unbeaten[-1].tolerances.values()) and not any(
        option.tolerance or option.divergence for option in untouched
    ):
        # Equalled by a smaller one, or beaten by rounding.
        size = sum(option.parameters for option in untouched)
        unbeaten = unbeaten[: _FRONTIER_AT_MOST - 1]
        unbeaten.append(Allocation(size, 0.0, dict.fromkeys(options, 0.0)))
    return unbeaten


def _joined(allocation: Allocation, name: str, option: Option, before: Option) -> Allocation:
    """An allocation and one more layer, whose dropped inputs are outputs of the one before it."""
    saved = before.parameters_per_output * option.inputs_dropped
    return Allocation(
        allocation.parameters + option.parameters - saved,
        allocation.divergence + option.divergence,
        {**allocation.tolerances, name: option.tolerance},
    )


def _unbeaten(allocations: list[Allocation]) -> list[Allocation]:
    kept: list[Allocation] = []
    for each in sorted(allocations, key=lambda one: (one.parameters, one.divergence)):
        if not kept or each.divergence < kept[-1].divergence:
            kept.append(each)
    if len(kept) <= _FRONTIER_AT_MOST:
        return kept
    step = (len(kept) - 1) / (_FRONTIER_AT_MOST - 1)
    return [kept[round(step * index)] for index in range(_FRONTIER_AT_MOST)]


@torch.no_grad()
def layer_options(
    model: nn.Module,
    captured: CapturedLayers,
    method: Method,
    settings: WalkSettings,
    tolerances: Sequence[float] = TOLERANCES,
    *,
    output: Output = "values",
    solved: Solved | None = None,
) -> dict[str, list[Option]]:
    """Compress each layer by itself at each tolerance, and measure what the network's outputs lose.

    Parameters
    ----------
    model : nn.Module
    captured : CapturedLayers
    method : Method
    settings : WalkSettings
        Each layer alone is solved in parallel order, whatever theirs is.
    tolerances : sequence of float
        One at which the outputs are not finite is left out.
    output : {"classes", "binary", "values"} or callable
        What the network's outputs are; it decides how far they are from the original ones on the
        calibration inputs, see `ddlr.outputs.divergence`.
    solved : dict, optional
        As for `ddlr.walk.compress_layers`.
    """
    settings, tolerances = settings.in_parallel(), sorted(as_tolerances(tolerances))
    original = network_outputs(model, captured.batches)
    check_outputs(original, output)
    options = {}
    layers = captured.layers
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        alone = captured.only([layer.name])
        inputs, outputs = int(layer.live_in.sum()), int(layer.live_out.sum())
        tried = [Option(0.0, layer.weight.numel(), 0.0, parameters_per_output=inputs)]
        for tolerance in tolerances:
            result = compress_layers(model, alone, method, tolerance, settings, solved=solved)
            [report] = result.layers
            if report.parameters_kept >= tried[-1].parameters:
                continue
            try:
                moved = network_outputs(result.model, captured.batches)
                lost = divergence(original, moved, output)
            except OutputError as error:
                log.warning("layer %r at a tolerance of %g: %s", layer.name, tolerance, error)
                continue
            low_rank = report.form == "low_rank"
            per_output = report.rank if low_rank else report.parameters_kept // outputs
            tried.append(
                Option(tolerance, report.parameters_kept, lost, report.inputs_dropped, per_output)
            )
        if not (
            method.drops_unread
            and following is not None
            and captured.is_sole_consumer(model, following, layer)
        ):
            tried = [dataclasses.replace(option, parameters_per_output=0) for option in tried]
        options[layer.name] = tried
    return options
