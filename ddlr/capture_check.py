"""Whether a capture is of a network as it is now; a capture of another one is refused."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddlr.calls import Batch
from ddlr.captured import CapturedLayers
from ddlr.hooks import try_relu
from ddlr.identity import check_model
from ddlr.linear_maps import weight_and_bias
from ddlr.recording import LayerRecord, Recorder
from ddlr.selection import Layers, select_layers
from ddlr.trials import trace, traced_modules
from ddlr.untouched import untouched

# How far the inputs of a layer may differ in two passes of one network, by rounding.
_SAME_INPUTS, _SAME_INPUTS_HALF = 1e-5, 1e-2


def select_captured(
    model: nn.Module,
    captured: CapturedLayers,
    layers: Layers | None = None,
    exclude: Layers | None = None,
) -> CapturedLayers:
    """The captured layers that are chosen, after a check that they are this model's."""
    known = [layer.name for layer in captured.layers]
    chosen = select_layers(model, known if layers is None else layers, exclude)
    # What a capture left out is in its report.
    names = [name for name in chosen.names if name in known or name in chosen.explicit]
    selected = captured.only(names)
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
    off = {name: torch.zeros(2, dtype=torch.float64) for name in names}
    places = dict.fromkeys(names, 0)
    wrong: dict[str, str] = {}
    kept = {layer.name: layer for layer in captured.layers}

    def compare(name: str, module: nn.Module, inputs: Tensor, _outputs: Tensor) -> None:
        layer, place = kept[name], places[name]
        places[name] += len(inputs)
        before = layer.inputs[place : place + len(inputs)]
        weight, bias = weight_and_bias(module)
        if not (_equal(layer.weight, weight) and _equal(layer.bias, bias)):
            wrong.setdefault(name, "was captured with other weights")
        elif before.shape != inputs.shape:
            wrong.setdefault(name, "was captured on other inputs")
        elif name not in wrong:
            moved = torch.linalg.vector_norm(before - inputs.to(before)).double()
            size = torch.linalg.vector_norm(before).double()
            off[name] += torch.stack([moved, size]).cpu() ** 2

    modules = captured.traced or traced_modules(model, names)
    recorder = Recorder(model, names, with_inputs=False, with_outputs=False, check=compare)
    traces = []
    with recorder.attached(), untouched(model) as device:
        for batch in captured.batches:
            try:
                traces.append(
                    trace(model, modules, lambda batch=batch: recorder.run(batch, device))
                )
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
        _check_relus(model, captured, captured.batches)


def _dtype(model: nn.Module, name: str) -> torch.dtype:
    return next(model.get_submodule(name).parameters()).dtype


def _equal(kept: Tensor, now: Tensor) -> bool:
    return kept.shape == now.shape and torch.equal(kept, now.to(kept))


def _check_relus(model: nn.Module, captured: CapturedLayers, batches: Sequence[Batch]) -> None:
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
        for batch in batches:
            try_relu(model, records, batch, device)
    for name, record in records.items():
        if record.refuted:
            raise ValueError(
                f"layer {name!r} was captured with a ReLU behind it, which is not so now; "
                "capture anew"
            )
