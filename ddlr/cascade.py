"""Cascade order: a layer on the inputs that the compressed layers before it give."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import nn

from ddlr.calls import Batch
from ddlr.captured import CapturedLayer, CapturedLayers
from ddlr.hooks import reaches
from ddlr.input_selection import regress_outputs
from ddlr.problem import WarmStart
from ddlr.recording import record
from ddlr.result import SolverResult
from ddlr.routes import called_several_times, noting_routes
from ddlr.untouched import untouched

CASCADE_BOUNDS = ("tolerance", "inherited")

# Factor on the error that the original weights make on compressed inputs, as in Net-Trim's cascade.
_CASCADE_SLACK = math.sqrt(1.1)


def check_cascade(
    model: nn.Module,
    captured: CapturedLayers,
    layers: Sequence[CapturedLayer],
    tolerances: Mapping[str, float],
) -> None:
    """Refuse a layer that is called several times, on what depends on how it is compressed.

    Raises
    ------
    ValueError
        Names the layer.
    """
    for index, layer in enumerate(layers):
        later = [each.name for each in layers[index:] if tolerances[each.name]]
        if (
            layer.name in later
            and called_several_times(layer.route)
            and reaches(model, later, layer.name, captured.batches)
        ):
            raise ValueError(
                f"layer {layer.name!r} is called several times in a pass, and what it is given "
                "then depends on how it, or a layer after it, is compressed; use order='parallel'"
            )


def with_routes(
    model: nn.Module, layers: Sequence[CapturedLayer], batches: Sequence[Batch]
) -> list[CapturedLayer]:
    """The layers with their routes in the original network, by a pass where they are not known."""
    if all(layer.route is not None for layer in layers):
        return list(layers)
    names = [layer.name for layer in layers]
    with noting_routes(model, names) as routes, untouched(model) as device:
        for batch in batches:
            with routes.batch():
                batch.run(model, device)
    return [dataclasses.replace(layer, route=routes.to(layer.name)) for layer in layers]


def with_inputs_of(
    model: nn.Module, layer: CapturedLayer, batches: Sequence[Batch]
) -> CapturedLayer:
    """The layer with the inputs that another network gives it.

    Raises
    ------
    ValueError
        If they are not of the same samples, row by row.
    """
    names = [layer.name]
    with noting_routes(model, names) as routes:
        records = record(model, names, batches, around=routes.batch, with_outputs=False)
    seen = records[layer.name]
    inputs = seen.inputs.to(layer.inputs.dtype) if seen.called else layer.inputs[:0]
    route = routes.to(layer.name)
    if len(inputs) != len(layer.inputs) or layer.route not in (None, route):
        raise ValueError(
            f"layer {layer.name!r} is given other samples, or in another order, once layers before "
            "it are compressed (as in a mixture of experts); use order='parallel'"
        )
    return dataclasses.replace(layer, inputs=inputs)


def bound_behind(layer: CapturedLayer, relative_tolerance: float, cascade_bound: str) -> float:
    """The bound of a layer behind compressed ones, relative to the norm of its targets.

    The original weights may miss the tolerance there. So it is raised to sqrt(1.1) times the error
    that they make; by Net-Trim's own rule, "inherited", that is the bound in any case.
    """
    inherited = _CASCADE_SLACK * layer.error_of_original()
    return inherited if cascade_bound == "inherited" else max(relative_tolerance, inherited)


def on_used_inputs(layer: CapturedLayer, result: SolverResult, ridge: float) -> CapturedLayer:
    """The layer with the weight of its live outputs regressed on the inputs that a solve uses."""
    used = (result.weight != 0).any(dim=0).nonzero()[:, 0]
    start = WarmStart(layer.weight[:, layer.live_in], layer.bias)
    regressed = regress_outputs(layer.live_inputs, used, start, ridge)
    weight = layer.weight.new_zeros(layer.weight.shape)
    weight[:, layer.live_in.nonzero()[:, 0][used]] = regressed.weight
    weight *= layer.live_out[:, None]
    return dataclasses.replace(layer, weight=weight, bias=regressed.bias * layer.live_out)
