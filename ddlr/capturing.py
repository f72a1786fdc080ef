"""Capture: one run of a network on its calibration data, for any number of compressions.

What is in doubt about the network is tried out on the way: whether a ReLU follows a layer, and
whether anything but the layer's calls depends on its weights.
"""

import dataclasses
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ddlr.arguments import as_whole_number, one_of
from ddlr.calls import Batch, Forward, Samples, as_batches, check_call
from ddlr.captured import CapturedLayer, CapturedLayers, LayerInputs
from ddlr.constraints import ACTIVATIONS
from ddlr.identity import check_model
from ddlr.linear_maps import kind_of
from ddlr.memory import Memory
from ddlr.passes import Passes, Recorded
from ddlr.problem import check_problem
from ddlr.selection import Layers, Selection, select_layers
from ddlr.skipped import skipped_weights
from ddlr.untouched import random_state_kept

_LIBRARIES = ("ddlr.", "nettrim.")


def capture_layers(
    model: nn.Module,
    calibration: Any,
    *,
    layers: Layers | None = None,
    exclude: Layers | None = None,
    forward: Forward | None = None,
    samples: Samples | None = None,
    activations: Mapping[str, str] | None = None,
    memory_limit: int | None = None,
    max_samples: int | None = None,
) -> CapturedLayers:
    """Run a network on calibration data once, for several compressions of it.

        captured = ddlr.capture_layers(model, calibration)
        for tolerance in (0.05, 0.1, 0.2):
            ddlr.compress(model, captured, relative_tolerance=tolerance)
            nettrim.prune(model, captured, relative_tolerance=tolerance)

    Activations and eigenvectors are computed here and shared by all of them; the results are those
    of separate calls. Holds the calibration data, each layer's inputs (once for layers with the
    same inputs) and its targets, in memory within a limit, and in temporary files beyond it.

    The network is run in evaluation mode, and is afterwards exactly as it was, see
    `ddlr.untouched.untouched`; hooks of its owner run with it. What is in doubt about it is tried
    out on all calibration samples: whether a ReLU follows a layer, see `ddlr.capture`, and whether
    anything but the layer's calls depends on its weights, which could not be replaced then. That
    costs a second pass without the products of the layers, and a third where layers have a ReLU.

    Layers that cannot be compressed stay as they are, and are listed with the reason in
    `CompressionResult.skipped`: those that no calibration sample reaches, whose weights are read by
    something else (tied to an embedding, or by attention), that are more than a linear map (a
    subclass with a forward pass of its own), or that the network holds where no copy of it can put
    another layer (a closure). A layer that was named by itself in `layers` is an error then.

    Parameters and errors that are not listed here are those of `ddlr.compress`.

    Parameters
    ----------
    memory_limit : int, optional
        Bytes of activations that are kept in memory; a quarter of what is free unless given. What
        a single layer needs while it is solved comes on top.
    max_samples : int, optional
        The most rows of inputs that are kept of one layer; a random choice of them where there are
        more. Unless given, all are kept of a fully connected layer, and of a convolution as many
        patches as `ddlr.convolutions` says.
    """
    captured = capture_lazily(
        model,
        calibration,
        layers=layers,
        exclude=exclude,
        forward=forward,
        samples=samples,
        activations=activations,
        memory_limit=memory_limit,
        max_samples=max_samples,
    )
    captured = dataclasses.replace(captured, reused=True)
    for layer in captured.layers:
        _ = layer.live_inputs.eigen
    return captured


def capture_lazily(
    model: nn.Module,
    calibration: Any,
    *,
    layers: Layers | None = None,
    exclude: Layers | None = None,
    forward: Forward | None = None,
    samples: Samples | None = None,
    activations: Mapping[str, str] | None = None,
    memory_limit: int | None = None,
    max_samples: int | None = None,
) -> CapturedLayers:
    """As `capture_layers`, for one compression: what solves share is not kept after a solve."""
    selection = select_layers(model, layers, exclude)
    given = dict(activations or {})
    _check_activations(given, selection.names)
    check_model(model, selection.names)
    _check_weights(model, selection.names)
    batches = read_batches(model, calibration, forward, samples, max_samples)
    if memory_limit is not None:
        memory_limit = as_whole_number(memory_limit, "memory_limit", lowest=0)
    passes = Passes(model, selection.names, given, Memory(memory_limit))
    passes.run(batches)
    passes.settle(batches)
    usable = _sorted_out(passes.layers, selection)
    captured = _captured_layers(usable, given, passes.memory)
    _warn_of_few_samples(captured)
    return CapturedLayers(
        captured,
        batches,
        traces=tuple(passes.traces),
        traced=tuple(passes.traced),
        activations_given=frozenset(given),
        reused=False,
        skipped=skipped_weights(
            model,
            {name: (one.status, one.refused) for name, one in passes.layers.items() if one.refused},
            [layer.name for layer in captured],
        ),
    )


def read_batches(
    model: nn.Module,
    calibration: Any,
    forward: Forward | None,
    samples: Samples | None,
    max_samples: int | None,
) -> tuple[Batch, ...]:
    """Calibration data as batches, of which each gives its share of the rows that are kept."""
    with random_state_kept():  # a loader that shuffles draws from it
        batches = as_batches(calibration, forward=forward, samples=samples)
    check_call(model, batches)
    if max_samples is not None:
        max_samples = as_whole_number(max_samples, "max_samples", lowest=1)
    return tuple(
        dataclasses.replace(each, of=len(batches), most_rows=max_samples) for each in batches
    )


def _sorted_out(layers: Mapping[str, Recorded], selection: Selection) -> dict[str, Recorded]:
    """The layers that can be compressed, by their first call; the others are told of.

    Raises
    ------
    ValueError
        If one of the others was named explicitly, or all are.
    """
    kept = {name: one for name, one in layers.items() if not one.refused}
    kept = dict(sorted(kept.items(), key=lambda item: item[1].record.place))
    refused = {name: one.refused for name, one in layers.items() if one.refused}
    if refused:
        told = "; ".join(
            f"layer {', '.join(repr(name) for name in refused if refused[name] == why)} {why}"
            for why in dict.fromkeys(refused.values())
        )
        if selection.explicit & set(refused) or not kept:
            can = f"; those that can be compressed are {list(kept)}" if kept else ""
            raise ValueError(f"{told}; leave such out of layers{can}")
        warnings.warn(f"left as it is, and not compressed: {told}", stacklevel=_level_of_caller())
    return kept


def _warn_of_few_samples(layers: Sequence[CapturedLayer]) -> None:
    few = [layer for layer in layers if len(layer.inputs) <= int(layer.live_in.sum())]
    if few:
        worst = min(few, key=lambda layer: len(layer.inputs) / layer.inputs.shape[1])
        warnings.warn(
            f"too few calibration samples: layer {worst.name!r} has {len(worst.inputs)} samples "
            f"for {int(worst.live_in.sum())} inputs"
            + (f", and {len(few) - 1} other layers have too few" if len(few) > 1 else "")
            + "; on these samples nearly any weight can be made up for, so errors on others will "
            "be larger; give more than there are inputs",
            stacklevel=_level_of_caller(),
        )


def _level_of_caller() -> int:
    """The level of the stack, seen from the caller of this, that is outside the libraries."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    return level


def _captured_layers(
    recorded: dict[str, Recorded], activations: Mapping[str, str], memory: Memory
) -> tuple[CapturedLayer, ...]:
    """What was recorded, as layers to be solved."""
    shared = _shared_inputs(recorded, memory)
    layers = []
    for name in list(recorded):  # one at a time, so that each record can be let go of
        one = recorded.pop(name)
        record, inputs = one.record, shared[name].whole
        activation = activations.get(name, record.activation)
        targets = memory.joined(record.output_parts).to(inputs.dtype)
        if activation == "relu":
            targets.relu_()
        try:
            check_problem(inputs, targets, tolerance=1.0, max_iterations=1)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        layers.append(
            CapturedLayer(
                name,
                inputs,
                targets,
                activation,
                one.weight.to(inputs.dtype),
                one.bias.to(inputs.dtype),
                route=one.route,
                shared=shared[name],
                on_patches=kind_of(one.layer).on_patches,
                kernel_shape=kind_of(one.layer).kernel(one.layer),
            )
        )
    return tuple(layers)


def _shared_inputs(recorded: Mapping[str, Recorded], memory: Memory) -> dict[str, LayerInputs]:
    """The inputs of each layer; those that were given the same tensors have them once."""
    groups: dict[tuple, list[str]] = {}
    for name, one in recorded.items():
        groups.setdefault(tuple(map(id, one.record.input_parts)), []).append(name)
    shared = {}
    for names in groups.values():
        for name in names[1:]:
            recorded[name].record.input_parts.clear()
        whole = memory.joined(recorded[names[0]].record.input_parts)
        # Half precision is for inference; the solve needs more.
        whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
        shared |= dict.fromkeys(names, LayerInputs(whole))
    return shared


def _check_activations(activations: Mapping[str, str], names: Sequence[str]) -> None:
    for name, activation in activations.items():
        if name not in names:
            raise ValueError(f"activations names layer {name!r}, which is not among {list(names)}")
        one_of(activation, f"activations[{name!r}]", ACTIVATIONS)


@torch.no_grad()
def _check_weights(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        for kind, values in model.get_submodule(name).named_parameters():
            bad = int((~values.isfinite()).sum()) if values.is_floating_point() else 0
            if bad:
                raise ValueError(f"layer {name!r}: its {kind} has {bad} values that are not finite")
