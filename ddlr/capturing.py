"""Capture: one run of a network on its calibration data, for any number of compressions.

What is in doubt about the network is tried out on the way: whether a ReLU follows a layer, and
whether anything but the layer's calls depends on its weights.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddlr.arguments import as_whole_number, one_of
from ddlr.calls import Batch, Forward, Samples, as_batches, check_call
from ddlr.captured import CapturedLayer, CapturedLayers, LayerInputs
from ddlr.constraints import ACTIVATIONS
from ddlr.hooks import try_relu
from ddlr.identity import adapter_of, check_model, shares_with
from ddlr.linear_maps import weight_and_bias, why_no_linear_map
from ddlr.memory import Memory
from ddlr.problem import check_problem
from ddlr.recording import LayerRecord, Recorder
from ddlr.result import SkippedStatus
from ddlr.routes import Route, noting_routes
from ddlr.selection import Layers, Selection, select_layers
from ddlr.skipped import skipped_weights
from ddlr.stand_ins import Twin, refuse_what_is_read_elsewhere
from ddlr.trials import Trace, trace, traced_modules
from ddlr.untouched import random_state_kept, random_states, untouched

_LIBRARIES = ("ddlr.", "nettrim.")
_NOT_CALLED = (
    "was not called by any calibration sample (if it should have been, then its weight is read in "
    "another way, as attention reads its out_proj, or torch.compile passes over it)"
)


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

    Parameters
    ----------
    memory_limit : int, optional
        Bytes of activations that are kept in memory; a quarter of what is free unless given. What
        a single layer needs while it is solved comes on top.
    max_samples : int, optional
        The most rows of inputs that are kept of one layer; a random choice of them where there are
        more. Unless given, all are kept of a fully connected layer, and of a convolution as many
        patches as `ddlr.convolutions` says.

    Other parameters and errors are those of `ddlr.compress`.
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
    passes = _Passes(model, selection.names, given, Memory(memory_limit))
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


@dataclass
class _Recorded:
    """A layer that was recorded: `refused` says why it can not be compressed."""

    layer: nn.Module
    record: LayerRecord
    weight: Tensor | None = None
    bias: Tensor | None = None
    route: Route = ()
    refused: str = ""
    status: SkippedStatus = SkippedStatus.NOT_REPLACEABLE


@dataclass
class _Passes:
    """The passes of a capture over a network's calibration batches.

    Each batch is run once to be recorded, with the weights that the layers have in the pass. Then
    it is run in a copy whose layers are stand-ins, which must give the same, and with ReLUs.
    """

    model: nn.Module
    names: Sequence[str]
    activations: Mapping[str, str]
    memory: Memory
    layers: dict[str, _Recorded] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)
    traced: list[str] = field(default_factory=list)
    # Layers of which every batch so far has shown that nothing else reads them.
    replaceable: list[str] | None = None

    def run(self, batches: Sequence[Batch]) -> None:
        recorder = Recorder(self.model, self.names, memory=self.memory, check=self._check)
        self.layers = {
            name: _Recorded(self.model.get_submodule(name), record)
            for name, record in recorder.records.items()
        }
        for name, one in self.layers.items():
            one.refused = adapter_of(self.model, name)
        self.traced = traced_modules(self.model, list(self.names))
        twin: Twin | None = None
        with (
            recorder.attached(),
            noting_routes(self.model, self.names) as routes,
            untouched(self.model) as device,
        ):
            for batch in batches:
                begin = random_states()
                with routes.batch():
                    seen = trace(
                        self.model, self.traced, lambda batch=batch: recorder.run(batch, device)
                    )
                end = random_states()
                self.traces.append(seen)
                recorder.paused = routes.paused = True
                twin, drew = self._try_stand_ins(twin, batch, recorder, seen, begin)
                begin()
                known = self.replaceable is not None and not drew
                self._try_relus(batch, device, seen if known else None)
                recorder.paused = routes.paused = False
                end()
        for name, one in self.layers.items():
            one.route = routes.to(name)

    def _check(self, name: str, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        one = self.layers[name]
        if one.refused:
            return
        if one.weight is None:
            # Cloned: the owner may train the layer further.
            weight, bias = weight_and_bias(layer)
            one.weight, one.bias = weight.clone(), bias.clone()
        one.refused = why_no_linear_map(layer, inputs, outputs)

    @property
    def usable(self) -> list[str]:
        """Those that were called and that nothing speaks against, by their first call."""
        usable = [
            name for name, one in self.layers.items() if one.record.called and not one.refused
        ]
        return sorted(usable, key=lambda name: self.layers[name].record.place)

    def _try_stand_ins(
        self,
        twin: Twin | None,
        batch: Batch,
        recorder: Recorder,
        seen: Trace,
        begin: Callable[[], None],
    ) -> tuple[Twin | None, bool]:
        """Whether a copy with stand-ins for layers does the same; `replaceable` has the answer.

        `begin` puts the random states back to where the pass began. Returns the copy as long as it
        does the same, and whether that takes the same random states.
        """
        usable = self.usable
        if not usable:
            return None, False
        if twin is None and len(self.traces) == 1:
            for name in usable:
                if other := shares_with(self.model, self.layers[name].layer):
                    self.layers[name].refused = f"shares its weight with {other!r}"
            usable = self.usable
            twin = Twin.of(self.model, usable) if usable else None
        same = drew = False
        if twin is not None and set(twin.layers) == set(usable):
            same = twin.trace(batch, recorder.whole_outputs, self.traced) == seen
            if not same:
                begin()
                same = drew = twin.trace(batch, recorder.whole_outputs, self.traced) == seen
        self.replaceable = usable if same else None
        return twin if same else None, drew

    def _try_relus(self, batch: Batch, device: torch.device, expected: Trace | None) -> None:
        records = {
            name: self.layers[name].record for name in self.usable if name not in self.activations
        }
        try_relu(self.model, records, batch, device, self.traced, expected)

    def settle(self, batches: Sequence[Batch]) -> None:
        """Refuse what can not be replaced, where the passes have not shown that all can."""
        for one in self.layers.values():
            if not one.record.called and not one.refused:
                one.refused, one.status = _NOT_CALLED, SkippedStatus.NOT_CALLED
            elif not one.refused and (other := shares_with(self.model, one.layer)):
                one.refused = f"shares its weight with {other!r}"
        if self.replaceable is None or set(self.replaceable) != set(self.usable):
            refused = refuse_what_is_read_elsewhere(self.model, self.usable, batches, self.traced)
            for name, why in refused.items():
                self.layers[name].refused = why


def _sorted_out(layers: Mapping[str, _Recorded], selection: Selection) -> dict[str, _Recorded]:
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
    recorded: dict[str, _Recorded], activations: Mapping[str, str], memory: Memory
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
            )
        )
    return tuple(layers)


def _shared_inputs(recorded: Mapping[str, _Recorded], memory: Memory) -> dict[str, LayerInputs]:
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
