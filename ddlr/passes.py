"""The passes of a capture: each batch is recorded, and what is in doubt is tried out on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ddlr.calls import Batch
from ddlr.hooks import try_relu
from ddlr.identity import adapter_of, shares_with
from ddlr.linear_maps import kind_of, weight_and_bias, why_no_linear_map
from ddlr.memory import Memory
from ddlr.recording import LayerRecord, Recorder
from ddlr.result import SkippedStatus
from ddlr.routes import Route, noting_routes
from ddlr.stand_ins import Twin, refuse_what_is_read_elsewhere
from ddlr.trials import Trace, trace, traced_modules
from ddlr.untouched import random_states, untouched

_NOT_CALLED = (
    "was not called by any calibration sample (if it should have been, then its weight is read in "
    "another way, as attention reads its out_proj, or torch.compile passes over it)"
)


@dataclass
class Recorded:
    """A layer that was recorded: `refused` says why it can not be compressed."""

    layer: nn.Module
    record: LayerRecord
    weight: Tensor | None = None
    bias: Tensor | None = None
    route: Route = ()
    refused: str = ""
    status: SkippedStatus = SkippedStatus.NOT_REPLACEABLE


@dataclass
class Passes:
    """The passes of a capture over a network's calibration batches.

    Each batch is run once to be recorded, with the weights that the layers have in the pass. Then
    it is run in a copy whose layers are stand-ins, which must give the same, and with ReLUs.
    """

    model: nn.Module
    names: Sequence[str]
    activations: Mapping[str, str]
    memory: Memory
    layers: dict[str, Recorded] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)
    traced: list[str] = field(default_factory=list)
    # Layers of which every batch so far has shown that nothing else reads them.
    replaceable: list[str] | None = None

    def run(self, batches: Sequence[Batch]) -> None:
        for name in self.names:
            layer = self.model.get_submodule(name)
            why = kind_of(layer).unsupported(layer) or adapter_of(self.model, name)
            self.layers[name] = Recorded(layer, LayerRecord(), refused=why)
        names = [name for name, one in self.layers.items() if not one.refused]
        recorder = Recorder(self.model, names, memory=self.memory, check=self._check)
        for name, record in recorder.records.items():
            self.layers[name].record = record
        self.traced = traced_modules(self.model, list(self.names))
        twin: Twin | None = None
        with (
            recorder.attached(),
            noting_routes(self.model, names) as routes,
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
        for name in names:
            self.layers[name].route = routes.to(name)

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
