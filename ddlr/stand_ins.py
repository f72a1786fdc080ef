"""Whether anything but a layer's calls depends on its weights, found out by stand-ins for it.

In a copy of the network each layer is replaced by one that gives in turn what the layer gave, and
has weights that are not the layer's. If the copy then does what the network did, a compressed layer
can take the place.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ddlr.calls import Batch
from ddlr.identity import copied
from ddlr.layers import replace_layer
from ddlr.linear_maps import kind_of
from ddlr.recording import Recorder, record
from ddlr.trials import Trace, trace
from ddlr.untouched import random_state_kept, random_states, set_values, untouched

NOT_REPLACED = (
    "can not be replaced: something else reads its weight, or the model holds the layer where a "
    "copy can not put another (in a function, for instance)"
)


class StandIn(nn.Module):
    """Gives in turn what a layer gave, and has weights that are not the layer's."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.in_features, self.out_features = kind_of(layer).features(layer)
        self.outputs: list[Tensor] = []
        for tensor in {id(each): each for each in layer.parameters()}.values():
            set_values(tensor, _other(tensor.detach()))
        self.weight = _changed(layer, "weight")
        self.bias = _changed(layer, "bias")

    def forward(self, input: Tensor) -> Tensor:
        return self.outputs.pop(0).clone()


def _other(values: Tensor) -> Tensor:
    return -values - 1 if values.is_floating_point() else values


def _changed(layer: nn.Module, name: str) -> Tensor | None:
    """The layer's parameter, which was changed, or what it computes in its place, changed."""
    value = getattr(layer, name)
    return value if value is None or isinstance(value, nn.Parameter) else _other(value.detach())


@dataclass
class Twin:
    """A copy of a network with stand-ins for some of its layers."""

    model: nn.Module
    layers: dict[str, StandIn]

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[str]) -> "Twin":
        with random_state_kept():
            twin, standing = copied(model), {}
            for layer in layers:
                standing[layer] = StandIn(twin.get_submodule(layer))
                twin = replace_layer(twin, layer, standing[layer])
        return cls(twin, standing)

    def trace(
        self, batch: Batch, outputs: Mapping[str, Sequence[Tensor]], names: Sequence[str]
    ) -> Trace | None:
        """What the copy does on a batch, given what the layers gave on it; None where it fails.

        Also where the stand-ins were not called as often as the layers.
        """
        begin = random_states()
        with untouched(self.model) as device:
            begin()
            # Inside, so that they are gone afterwards.
            for name, layer in self.layers.items():
                layer.outputs = list(outputs[name])
            try:
                seen = trace(self.model, names, lambda: batch.run(self.model, device))
            except Exception:
                return None
            # Asked inside, since what the layers hold is put back afterwards.
            return None if any(layer.outputs for layer in self.layers.values()) else seen


def refuse_what_is_read_elsewhere(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Batch], names: Sequence[str]
) -> dict[str, str]:
    """Of layers that can not all be replaced: those that can not, with the reason.

    They are sought one by one on the first batch where replacing all together fails.
    """
    refused: dict[str, str] = {}
    beside = model
    while usable := [name for name in layers if name not in refused]:
        for batch in batches:
            together = _why_not(beside, usable, batch, names)
            if together:
                break
        else:
            return refused
        called = _called(model, usable, batch)
        # Beside a plain copy, since it may be the copying that fails for one of them.
        beside = copied(model)
        alone = {name: _why_not(beside, [name], batch, names, called=called) for name in usable}
        found = {name: why for name, why in alone.items() if why}
        refused |= found or dict.fromkeys(usable, together)
    return refused


def _called(model: nn.Module, layers: Sequence[str], batch: Batch) -> set[str]:
    records = record(model, layers, [batch], with_inputs=False, with_outputs=False)
    return {name for name in layers if records[name].called}


def _why_not(
    model: nn.Module,
    layers: Sequence[str],
    batch: Batch,
    names: Sequence[str],
    called: Collection[str] = (),
) -> str:
    """Why layers can not be replaced, if stand-ins for them do not act as they do; or "".

    `called` are those that the original of a copied model calls.
    """
    twin = Twin.of(model, layers)
    recorder = Recorder(model, layers)
    with untouched(model) as device:
        begin = random_states()
        with recorder.attached():
            before = trace(model, names, lambda: recorder.run(batch, device))
        if any(name in called and not recorder.records[name].called for name in layers):
            return NOT_REPLACED  # the copy calls the layer of its original
        begin()
        if twin.trace(batch, recorder.whole_outputs, names) == before:
            return ""
        begin()
        if trace(model, names, lambda: batch.run(model, device)) != before:
            return ""  # no two passes are equal, so nothing can be found out
    return NOT_REPLACED
