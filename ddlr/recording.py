"""What the layers of a network are given and give, noted while it runs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ddlr.calls import Batch
from ddlr.linear_maps import LinearMap, given_to, rows_kind, rows_that_count
from ddlr.memory import Memory
from ddlr.trials import hooked
from ddlr.untouched import untouched


@dataclass
class LayerRecord:
    """What one layer saw and gave while it was captured.

    `inputs` and `outputs` are of shape (samples, features), leading dimensions flattened, outputs
    before any activation and before hooks that change them. `activation` is "relu" or "none", as
    decided by `ddlr.capture`. `shapes` are those of the outputs, one for each call; `place` is the
    layer's among those that were called, by their first call.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    place: int = -1
    refuted: bool = False
    noticed: bool = False
    negative: bool = False
    input_parts: list[Tensor] = field(default_factory=list)
    output_parts: list[Tensor] = field(default_factory=list)

    @property
    def called(self) -> bool:
        return bool(self.shapes)

    @property
    def inputs(self) -> Tensor:
        return torch.cat(self.input_parts)

    @property
    def outputs(self) -> Tensor:
        return torch.cat(self.output_parts)

    @property
    def activation(self) -> str:
        return "relu" if self.noticed and self.negative and not self.refuted else "none"


class Recorder:
    """Notes what layers see and give in each pass, as long as it is not paused.

    Layers that are given the same tensor share one copy of it.

    Parameters
    ----------
    model : nn.Module
    names : sequence of str
        Of the layers.
    memory : Memory, optional
        Where rows are kept; in memory unless given.
    batches : sequence of Batch
        Those that are to come, for which room is taken at once.
    with_inputs, with_outputs : bool
        Whether inputs and outputs are kept.
    check : callable, optional
        ``(name, layer, inputs, outputs)`` is called for each call, with rows of matrices.

    Attributes
    ----------
    records : dict of str to LayerRecord
    whole_outputs : dict of str to list of Tensor
        What each layer gave in the last pass of `run`, call by call, in the shape that it had.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        memory: Memory | None = None,
        batches: Sequence[Batch] = (),
        with_inputs: bool = True,
        with_outputs: bool = True,
        check: Callable[[str, nn.Module, Tensor, Tensor], None] | None = None,
    ):
        self.model, self.memory, self._check = model, memory, check
        self.with_inputs, self.with_outputs = with_inputs, with_outputs
        self._samples = sum(len(batch) for batch in batches)
        self._counted = sum(batch.counted for batch in batches)
        modules = dict(model.named_modules(remove_duplicate=False))
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise ValueError(f"the model has no layer {unknown[0]!r}; it has {', '.join(modules)}")
        self._layers = {name: modules[name] for name in names}
        self.records = {name: LayerRecord() for name in names}
        self.whole_outputs: dict[str, list[Tensor]] = {}
        self.paused = False
        self._batch: Batch | None = None
        self._seen: dict[int, tuple[Tensor, int, tuple, Tensor]] = {}
        self._places = count()

    @contextmanager
    def attached(self) -> Iterator["Recorder"]:
        """Note all passes that are made inside."""
        # Before the hooks of the owner, which may change the output.
        options = {"with_kwargs": True, "prepend": True}
        hooks = [
            (layer.register_forward_hook, self._note(name), options)
            for name, layer in self._layers.items()
        ]
        with hooked(*hooks):
            yield self

    def run(self, batch: Batch, device: torch.device) -> Any:
        """One pass over a batch, of which the rows that count are noted."""
        self._batch, self.whole_outputs = batch, {name: [] for name in self.records}
        try:
            return batch.run(self.model, device)
        finally:
            self._batch = None
            self._samples -= len(batch)
            self._counted -= batch.counted
            self._seen.clear()

    def _note(self, name: str) -> Callable:
        record = self.records[name]

        def hook(layer, arguments, keywords, output):
            if not self.paused:
                # What is done here is not what the network does, which others may be noting.
                with torch.no_grad(), _disable_current_modes():
                    note(layer, arguments, keywords, output)

        def note(layer, arguments, keywords, output):
            if not record.called:
                record.place = next(self._places)
            kind = rows_kind(layer)
            given = given_to(arguments, keywords)
            rows = rows_that_count(layer, output, self._batch)
            # Cloned at once: an in-place activation would overwrite it.
            outputs = self._kept(
                kind.output_rows(layer, output, rows), record.output_parts, rows is not None
            )
            inputs = self._inputs(kind, layer, given, rows, record.input_parts)
            record.shapes.append(tuple(output.shape))
            record.negative |= bool((outputs < 0).any())
            if self._check is not None:
                self._check(name, layer, inputs, outputs)
            if self.with_inputs:
                record.input_parts.append(inputs)
            if self.with_outputs:
                record.output_parts.append(outputs)
                if self._batch is not None:
                    self.whole_outputs[name].append(
                        kind.as_given(outputs, output) if rows is None else output.detach().clone()
                    )

        return hook

    def _inputs(
        self,
        kind: LinearMap,
        layer: nn.Module,
        given: Tensor,
        rows: Tensor | None,
        before: Sequence[Tensor],
    ) -> Tensor:
        """The rows of a layer's inputs, those of an earlier layer where the tensor is the same."""
        about = kind.about_inputs(layer), None if rows is None else len(rows)
        # What was made in inference mode does not say whether it was overwritten since.
        sharing = self._batch is not None and not given.is_inference()
        if sharing and id(given) in self._seen:
            _, version, told, inputs = self._seen[id(given)]
            if (version, told) == (given._version, about):
                return inputs
        inputs = self._kept(kind.input_rows(layer, given, rows), before, rows is not None)
        if sharing:
            self._seen[id(given)] = given, given._version, about, inputs
        return inputs

    def _kept(self, rows: Tensor, before: Sequence[Tensor], chosen: bool) -> Tensor:
        """A copy of rows, below those of the batches before; `chosen` if they are not all."""
        if self.memory is None or self._batch is None:
            return rows.clone()
        now, to_come = (
            (self._batch.counted, self._counted)
            if chosen or len(rows) == self._batch.counted
            else (len(self._batch), self._samples)
        )
        expected = math.ceil(len(rows) * to_come / now)
        return self.memory.kept(rows, before[-1] if before else None, expected)


def record(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    each: Callable[[Any], None] | None = None,
    around: Callable | None = None,
    with_inputs: bool = True,
    with_outputs: bool = True,
) -> Mapping[str, LayerRecord]:
    """Run a network on batches, in evaluation mode, and note what its layers see and give.

    Parameters
    ----------
    each : callable, optional
        Is called with what the network gives for each batch.
    around : callable, optional
        Gives a context for each pass.
    """
    recorder = Recorder(model, names, with_inputs=with_inputs, with_outputs=with_outputs)
    with recorder.attached(), untouched(model) as device:
        for batch in batches:
            if around is None:
                outputs = recorder.run(batch, device)
            else:
                with around():
                    outputs = recorder.run(batch, device)
            if each is not None:
                each(outputs)
    return recorder.records
