"""Cascade order: a layer on the inputs that the compressed layers before it give."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress

import torch
from torch import Tensor, nn

from ddlr.calls import Batch
from ddlr.captured import CapturedLayer, CapturedLayers, LayerInputs
from ddlr.hooks import reaches
from ddlr.input_elimination import regress_outputs
from ddlr.problem import WarmStart
from ddlr.recording import LayerRecord, Recorder
from ddlr.result import SolverResult
from ddlr.routes import Routes, called_several_times, noting_routes
from ddlr.skip_connections import Addends, layers_in_sums
from ddlr.trials import hooked, is_compiled
from ddlr.untouched import untouched

CASCADE_BOUNDS = ("tolerance", "inherited", "reached")

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


class Behind:
    """Layers behind compressed ones, each on the inputs that these give it.

    Layers that were given the same tensor in the original network are looked at in one pass, and a
    pass ends where all has been seen that it is for.

    Parameters
    ----------
    model : nn.Module
        The original network.
    layers : sequence of CapturedLayer
        Those that will be asked for, in their order, with their routes where they are known.
    batches : sequence of Batch
    made_up : bool
        Whether targets make up for what compressed layers change in skip connections: where a
        network adds something to a layer's outputs, and nothing else reads them, it is the sum that
        is to be reproduced (He, Zhang and Sun 2017, ICCV, arXiv 1707.06168, on residual branches).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[CapturedLayer],
        batches: Sequence[Batch],
        *,
        made_up: bool = False,
    ):
        self._model, self._waiting, self._batches = model, list(layers), batches
        self._known: dict[str, CapturedLayer] = {}
        names = [layer.name for layer in layers if layer.activation == "none"]
        self._in_sums = layers_in_sums(model, names, batches) if made_up and names else frozenset()

    def layer(self, compressed: nn.Module, name: str) -> CapturedLayer:
        """A layer with the inputs that the network, compressed so far, gives it.

        Raises
        ------
        ValueError
            If they are not of the same samples, row by row.
        """
        while self._waiting[0].name != name:
            self._waiting.pop(0)
        if name not in self._known:
            first, *others = self._waiting
            alike = [each for each in others if each.inputs is first.inputs]
            alike = [each for each in alike if each.name not in self._in_sums]
            self._known = self._seen(compressed, [first, *alike])
        return self._known.pop(name)

    def _seen(self, compressed: nn.Module, layers: Sequence[CapturedLayer]) -> dict:
        """The first of some layers, and those of the others that are given the same inputs."""
        names, first = [layer.name for layer in layers], layers[0]
        in_sum = first.name if first.name in self._in_sums else None
        whole = any(layer.route is None or called_several_times(layer.route) for layer in layers)
        records, routes, addends = _see(compressed, names, self._batches, in_sum, whole=whole)
        parts = records[first.name].input_parts
        inputs = torch.cat(parts).to(first.inputs.dtype) if parts else first.inputs[:0]
        shared = LayerInputs(inputs)
        seen = {}
        for layer in layers:
            same = list(map(id, records[layer.name].input_parts)) == list(map(id, parts))
            if layer is not first and not same:
                continue
            route = routes.to(layer.name)
            if len(inputs) != len(layer.inputs) or layer.route not in (None, route):
                raise _other_samples(layer.name)
            seen[layer.name] = dataclasses.replace(layer, inputs=inputs, shared=shared)
        if in_sum is not None:
            _, _, before = _see(self._model, [], self._batches, in_sum)
            if addends is None or addends.shape != before.shape:
                raise _other_samples(in_sum)
            seen[in_sum] = _with_targets_moved(seen[in_sum], before - addends)
        return seen


def _other_samples(name: str) -> ValueError:
    return ValueError(
        f"layer {name!r} is given other samples, or in another order, once layers before it are "
        "compressed (as in a mixture of experts); use order='parallel'"
    )


def _with_targets_moved(layer: CapturedLayer, change: Tensor) -> CapturedLayer:
    if layer.read is not None:
        change = change * layer.read
    return dataclasses.replace(layer, targets=layer.targets + change.to(layer.targets.dtype))


class _Enough(BaseException):
    """All that a pass is for has been seen. No failure, so that networks do not catch it."""


def _see(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    in_sum: str | None,
    *,
    whole: bool = False,
) -> tuple[Mapping[str, LayerRecord], Routes, Tensor | None]:
    """What layers are given, how it reaches them, and what is added to the outputs of one.

    Passes end with the last of this unless they have to be whole.
    """
    whole = whole or any(is_compiled(module) for module in model.modules())
    awaited: set[str | None] = set()

    def seen(name: str | None) -> None:
        awaited.discard(name)
        if not awaited and not whole:
            raise _Enough

    recorder = Recorder(model, names, with_outputs=False)
    addends = None if in_sum is None else Addends(model, in_sum, lambda: seen(None))
    with ExitStack() as stack:
        stack.enter_context(recorder.attached())
        routes = stack.enter_context(noting_routes(model, names))
        if addends is not None:
            stack.enter_context(addends.attached())
        # After all that notes something.
        ends = [
            (model.get_submodule(name).register_forward_hook, lambda *_, name=name: seen(name))
            for name in names
        ]
        stack.enter_context(hooked(*ends))
        device = stack.enter_context(untouched(model))
        for batch in batches:
            awaited = {*names} if addends is None else {*names, None}
            adding = nullcontext() if addends is None else addends.batch(batch)
            with routes.batch(), adding, suppress(_Enough):
                recorder.run(batch, device)
    return recorder.records, routes, None if addends is None else addends.rows


def bound_behind(
    layer: CapturedLayer, relative_tolerance: float, rule: str, solved: SolverResult | None = None
) -> float:
    """The bound of a layer behind compressed ones, relative to the norm of its targets.

    The original weights may miss the tolerance there. So it is raised to sqrt(1.1) times the error
    that they make; by Net-Trim's own rule, "inherited", that is the bound in any case. By the rule
    "reached" it is raised to the error of a layer that is solved already.
    """
    if rule == "reached":
        return max(relative_tolerance, layer.error_of_solved(solved.weight, solved.bias))
    inherited = _CASCADE_SLACK * layer.error_of_original()
    return inherited if rule == "inherited" else max(relative_tolerance, inherited)


def on_used_inputs(layer: CapturedLayer, result: SolverResult, ridge: float) -> CapturedLayer:
    """The layer with the weight of its live outputs regressed on the inputs that a solve uses."""
    used = (result.weight != 0).any(dim=0).nonzero()[:, 0]
    start = WarmStart(layer.weight[:, layer.live_in], layer.bias)
    regressed = regress_outputs(layer.live_inputs, used, start, ridge)
    weight = layer.weight.new_zeros(layer.weight.shape)
    weight[:, layer.live_in.nonzero()[:, 0][used]] = regressed.weight
    weight *= layer.live_out[:, None]
    return dataclasses.replace(layer, weight=weight, bias=regressed.bias * layer.live_out)
