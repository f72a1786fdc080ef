"""Whether a capture is of a network as it is now; a capture of another one is refused."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ddlr.captured import CapturedLayer, CapturedLayers
from ddlr.capturing import linear_layers, weight_and_bias
from ddlr.hooks import LayerRecord, checked, given_to, try_relu
from ddlr.identity import check_model
from ddlr.trials import hooked, trace, traced_modules
from ddlr.untouched import untouched

# How far the inputs of a layer may differ in two passes of one network, by rounding.
_SAME_INPUTS, _SAME_INPUTS_HALF = 1e-5, 1e-2


def select_captured(
    model: nn.Module, captured: CapturedLayers, layers: Sequence[str] | None
) -> CapturedLayers:
    """The captured layers of the given names, after a check that they are this model's."""
    names = [layer.name for layer in captured.layers] if layers is None else layers
    selected = captured.only(linear_layers(model, names))
    _check_fit(model, selected)
    return selected


def _check_fit(model: nn.Module, captured: CapturedLayers) -> None:
    """Refuse a capture that is not of this network as it is now, by one pass over its batches.

    Raises
    ------
    ValueError
        If a layer has other weights or shapes, is given other inputs, or is read in another way.
    """
    names = [layer.name for layer in captured.layers]
    check_model(model, names)
    samples = list(checked(captured.batches))
    off = {name: torch.zeros(2, dtype=torch.float64) for name in names}
    places = dict.fromkeys(names, 0)
    wrong: dict[str, str] = {}

    def compare(layer: CapturedLayer) -> Callable:
        def hook(module, arguments, keywords, _output):
            inputs = given_to(arguments, keywords).detach().flatten(0, -2)
            place = places[layer.name]
            places[layer.name] += len(inputs)
            kept = layer.inputs[place : place + len(inputs)]
            weight, bias = weight_and_bias(module)
            if not (_equal(layer.weight, weight) and _equal(layer.bias, bias)):
                wrong.setdefault(layer.name, "was captured with other weights")
            elif kept.shape != inputs.shape:
                wrong.setdefault(layer.name, "was captured on other inputs")
            elif layer.name not in wrong:
                moved = torch.linalg.vector_norm(kept - inputs.to(kept)).double()
                size = torch.linalg.vector_norm(kept).double()
                off[layer.name] += torch.stack([moved, size]).cpu() ** 2

        return hook

    modules = traced_modules(model, [layer.name for layer in captured.layers])
    traces = []
    with untouched(model) as device:
        options = {"with_kwargs": True, "prepend": True}
        hooks = [
            (model.get_submodule(layer.name).register_forward_hook, compare(layer), options)
            for layer in captured.layers
        ]
        with hooked(*hooks):
            for batch in samples:
                try:
                    traces.append(trace(model, modules, (batch.to(device),), {}))
                except Exception as error:
                    raise ValueError(
                        f"the network can not run on the batches of its capture: {error}"
                    ) from error
    for layer in captured.layers:
        moved, size = off[layer.name].sqrt().tolist()
        within = (
            _SAME_INPUTS if torch.finfo(_dtype(model, layer.name)).bits >= 32 else _SAME_INPUTS_HALF
        )
        if places[layer.name] != len(layer.inputs) or not moved <= within * size:
            wrong.setdefault(layer.name, "was captured on other inputs")
        if layer.name in wrong:
            raise ValueError(f"layer {layer.name!r} {wrong[layer.name]}; capture anew")
    if captured.traces is not None and captured.traces != tuple(traces):
        _check_relus(model, captured, samples)


def _dtype(model: nn.Module, name: str) -> torch.dtype:
    return next(model.get_submodule(name).parameters()).dtype


def _equal(kept: Tensor, now: Tensor) -> bool:
    return kept.shape == now.shape and torch.equal(kept, now.to(kept))


def _check_relus(model: nn.Module, captured: CapturedLayers, samples: Sequence[Tensor]) -> None:
    """After a change that a layer is not reached by: whether it is still read as it was."""
    decided = [
        layer
        for layer in captured.layers
        if layer.activation == "relu" and layer.name not in captured.activations_given
    ]
    if not decided:
        return
    with untouched(model) as device:
        records = {layer.name: LayerRecord() for layer in decided}
        for batch in samples:
            try_relu(model, records, (batch.to(device),), {})
    for name, record in records.items():
        if record.refuted:
            raise ValueError(
                f"layer {name!r} was captured with a ReLU behind it, which is not so now; "
                "capture anew"
            )
