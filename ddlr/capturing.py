"""Capture: one run of a network on its calibration data, for any number of compressions.

What is in doubt about the network is tried out on the way: whether a ReLU follows a layer, and
whether anything but the layer's calls depends on its weights.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr.arguments import one_of
from ddlr.captured import CapturedLayer, CapturedLayers, distinct_names
from ddlr.constraints import ACTIVATIONS
from ddlr.hooks import LayerRecord, capture, checked, given_to, try_relu
from ddlr.identity import StandIn, check_model, copied, is_linear_map, shares_with
from ddlr.layers import replace_layer
from ddlr.problem import check_problem
from ddlr.routes import Route, noting_routes
from ddlr.trials import Trace, hooked, trace, traced_modules
from ddlr.untouched import random_state_kept, untouched

_CALIBRATION_BATCH = 1000
_LIBRARIES = ("ddlr.", "nettrim.")
_NOT_REPLACED = (
    "can not be replaced: something else reads its weight, or the model holds the layer where a "
    "copy can not put another (in a function, for instance)"
)


def capture_layers(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor],
    *,
    layers: Sequence[str] | None = None,
    activations: Mapping[str, str] | None = None,
) -> CapturedLayers:
    """Run a network on calibration data once, for several compressions of it.

        captured = ddlr.capture_layers(model, calibration)
        for tolerance in (0.05, 0.1, 0.2):
            ddlr.compress(model, captured, relative_tolerance=tolerance)
            nettrim.prune(model, captured, relative_tolerance=tolerance)

    Activations and eigenvectors are computed here and shared by all of them; the results are those
    of separate calls. Holds the calibration data and each layer's inputs, twice, and its targets in
    memory.

    The network is run in evaluation mode, and is afterwards exactly as it was, see
    `ddlr.untouched.untouched`; hooks of its owner run with it. What is in doubt about it is tried
    out on all calibration samples: whether a ReLU follows a layer, see `ddlr.capture`, and whether
    anything but the layer's calls depends on its weights, which could not be replaced then. That
    costs about six passes, and one for each layer that may have a ReLU.

    By default every `nn.Linear` is captured that can be replaced. Those that can not stay as they
    are, with a warning that names them: layers that no calibration sample reaches, whose weights
    are read by something else (tied to an embedding, or by attention), that are more than a linear
    map (a subclass with a forward pass of its own), or that the network holds where no copy of it
    can put another layer (a closure). Named in `layers`, they are an error.

    Parameters and errors are those of `ddlr.compress`.
    """
    captured = capture_lazily(model, calibration, layers=layers, activations=activations)
    captured = dataclasses.replace(captured, reused=True)
    for layer in captured.layers:
        _ = layer.live_inputs.eigen
    return captured


def capture_lazily(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor],
    *,
    layers: Sequence[str] | None = None,
    activations: Mapping[str, str] | None = None,
) -> CapturedLayers:
    """As `capture_layers`, for one compression: what solves share is not kept after a solve."""
    batches = _batches(calibration)
    recorded, traces = _record(model, batches, layers, activations)
    given = dict(activations or {})
    captured = []
    for name in list(recorded):  # one at a time, so that each record can be let go of
        one = recorded.pop(name)
        captured.append(_captured_layer(name, one, given.get(name, one.record.activation)))
    return CapturedLayers(tuple(captured), batches, traces, frozenset(given), reused=False)


def _batches(calibration: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(calibration, Tensor):
        calibration = calibration.split(_CALIBRATION_BATCH)
    with random_state_kept():  # a loader that shuffles draws from it
        return tuple(calibration)


@dataclass
class _Recorded:
    """A layer that was recorded: `refused` says why it can not be compressed."""

    layer: nn.Linear
    record: LayerRecord
    weight: Tensor | None = None
    bias: Tensor | None = None
    route: Route = ()
    refused: str = ""


def _record(
    model: nn.Module,
    batches: Sequence[Tensor],
    layers: Sequence[str] | None,
    activations: Mapping[str, str] | None,
) -> tuple[dict[str, _Recorded], tuple[Trace, ...]]:
    """Run the network, and find out about its layers what `capture_layers` says.

    Returns the layers that can be compressed, in the order in which they are called first, and a
    trace of the network for each batch that has samples.
    """
    names = linear_layers(model, layers)
    activations = dict(activations or {})
    _check_activations(activations, names)
    check_model(model, names)
    _check_weights(model, names)
    samples = list(checked(batches))
    recorded = _run(model, names, samples)
    for one in recorded.values():
        if not one.record.called:
            one.refused = (
                "was not called by any calibration sample (if it should have been, then its weight "
                "is read in another way, or torch.compile passes over it)"
            )
        elif not one.refused and (other := shares_with(model, one.layer)):
            one.refused = f"shares its weight with {other!r}"
    traces = _try_out(model, _usable(recorded), samples, activations)
    kept = _usable(recorded)
    refused = {name: one.refused for name, one in recorded.items() if one.refused}
    if refused:
        told = "; ".join(
            f"layer {', '.join(repr(name) for name in refused if refused[name] == why)} {why}"
            for why in dict.fromkeys(refused.values())
        )
        if layers is not None or not kept:
            can = f"; those that can be compressed are {list(kept)}" if kept else ""
            raise ValueError(f"{told}; leave such out of layers{can}")
        warnings.warn(f"left as it is, and not compressed: {told}", stacklevel=_level_of_caller())
    return kept, traces


def _level_of_caller() -> int:
    """The level of the stack, seen from the caller of this, that is outside the libraries."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    return level


def _usable(recorded: dict[str, _Recorded]) -> dict[str, _Recorded]:
    """Those that nothing speaks against, by their first call."""
    usable = [(name, one) for name, one in recorded.items() if not one.refused]
    return dict(sorted(usable, key=lambda item: item[1].record.place))


def _run(model: nn.Module, names: Sequence[str], samples: Sequence[Tensor]) -> dict[str, _Recorded]:
    """Run all batches, and record the layers, with the weights that they had in the passes."""
    with capture(model, names, decide=False) as records:
        recorded = {
            name: _Recorded(model.get_submodule(name), record) for name, record in records.items()
        }

        def check(one: _Recorded) -> Callable:
            def hook(layer, arguments, keywords, output):
                if one.refused:
                    return
                if one.weight is None:
                    # Cloned: the owner may train the layer further.
                    weight, bias = weight_and_bias(layer)
                    one.weight, one.bias = weight.clone(), bias.clone()
                if "forward" in vars(layer) or not is_linear_map(
                    layer, given_to(arguments, keywords), output
                ):
                    one.refused = (
                        f"is a {type(layer).__name__} whose forward pass is not just "
                        "inputs @ weight.T + bias"
                    )

            return hook

        hooks = [
            (one.layer.register_forward_hook, check(one), {"with_kwargs": True, "prepend": True})
            for one in recorded.values()
        ]
        with hooked(*hooks), noting_routes(model, names) as routes, untouched(model) as device:
            for batch in samples:
                with routes.batch():
                    model(batch.to(device, copy=True))
    for name, one in recorded.items():
        one.route = routes.to(name)
    return recorded


def _try_out(
    model: nn.Module,
    recorded: dict[str, _Recorded],
    samples: Sequence[Tensor],
    activations: Mapping[str, str],
) -> tuple[Trace, ...]:
    """Try each layer's ReLU, and whether what takes its place is all that reads its weights."""
    names = traced_modules(model, list(recorded))
    relus = {name: one.record for name, one in recorded.items() if name not in activations}
    with untouched(model) as device:
        traces = tuple(try_relu(model, relus, (batch.to(device),), {}, names) for batch in samples)
    together = _why_not_replaced(model, list(recorded), samples, names)
    if together:
        # Beside a plain copy, since it may be the copying that fails for one of them.
        for name, one in recorded.items():
            one.refused = _why_not_replaced(copied(model), [name], samples, names)
        if not any(one.refused for one in recorded.values()):
            for one in recorded.values():
                one.refused = together
    return traces


def _why_not_replaced(
    model: nn.Module, layers: Sequence[str], samples: Sequence[Tensor], names: Sequence[str]
) -> str:
    """Why layers can not be replaced, if stand-ins for them do not act as they do; or ""."""
    if not layers:
        return ""
    with random_state_kept():
        twin = copied(model)
        standing = {}
        for layer in layers:
            standing[layer] = StandIn(twin.get_submodule(layer))
            twin = replace_layer(twin, layer, standing[layer])

    with untouched(model) as device, untouched(twin):
        for batch in (batch.to(device) for batch in samples):

            def run(model: nn.Module, batch: Tensor = batch) -> Trace:
                with random_state_kept():
                    return trace(model, names, (batch,), {})

            with capture(model, layers, decide=False) as records:
                before = run(model)
            if not all(record.called for record in records.values()):
                return _NOT_REPLACED  # by a copy, while the model does call them
            for layer, stand_in in standing.items():
                stand_in.outputs = list(map(records[layer].output, range(records[layer].calls)))
            try:
                same = run(twin) == before
            except Exception as error:
                return f"can not be replaced in a copy of the model: {error}"
            if not same or any(stand_in.outputs for stand_in in standing.values()):
                if run(model) != before:
                    return ""  # no two passes are equal, so nothing can be found out
                return _NOT_REPLACED
    return ""


def _captured_layer(name: str, recorded: _Recorded, activation: str) -> CapturedLayer:
    record = recorded.record
    # Half precision is for inference; the solve needs more.
    dtype = torch.promote_types(record.inputs.dtype, torch.float32)
    inputs, targets = record.inputs.to(dtype), record.outputs.to(dtype)
    if activation == "relu":
        targets = targets.relu()
    try:
        check_problem(inputs, targets, tolerance=1.0, max_iterations=1)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    weight, bias = recorded.weight.to(dtype), recorded.bias.to(dtype)
    route = recorded.route
    return CapturedLayer(name, inputs, targets, activation, weight, bias, route=route)


def weight_and_bias(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()


def linear_layers(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """Names of the model's linear layers, or those that are given, each module under one name."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if layers is None:
        if not linear:
            raise ValueError("the model has no nn.Linear layer to compress")
        return linear
    layers = distinct_names(layers)
    if not layers:
        raise ValueError("layers is empty; name at least one layer, or leave it out for all")
    first_names = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    names = []
    for name in layers:
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"layer {name!r} is not an nn.Linear of the model: {linear}")
        names.append(first_names[modules[name]])
        if names.index(names[-1]) < len(names) - 1:
            raise ValueError(
                f"layers has {layers[names.index(names[-1])]!r} and {name!r}, which are one layer "
                "under two names; give one of them"
            )
    return names


def _check_activations(activations: Mapping[str, str], names: Sequence[str]) -> None:
    for name, activation in activations.items():
        if name not in names:
            raise ValueError(f"activations names layer {name!r}, which is not among {names}")
        one_of(activation, f"activations[{name!r}]", ACTIVATIONS)


@torch.no_grad()
def _check_weights(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        for kind, values in model.get_submodule(name).named_parameters():
            bad = int((~values.isfinite()).sum())
            if bad:
                raise ValueError(f"layer {name!r}: its {kind} has {bad} values that are not finite")
