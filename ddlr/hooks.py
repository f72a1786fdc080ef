"""Inputs and outputs of a network's layers on data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ddlr.trials import Trace, agree, hooked, trace, traced_modules, with_output
from ddlr.untouched import evaluating, random_state_kept, untouched

__all__ = [
    "LayerRecord",
    "capture",
    "checked",
    "evaluating",
    "given_to",
    "is_sole_consumer",
    "outputs_of",
    "reaches",
    "run_batches",
    "try_relu",
]

# Of outputs, to see what depends on them: as they are once they are dropped, and far up, where also
# what lets only large ones pass is seen.
_CHANGES = (
    torch.zeros_like,
    lambda output: 2 * output.abs() + 100 * (1 + output.abs().max()),
)


@dataclass
class LayerRecord:
    """What one layer saw and gave while it was captured.

    `inputs` and `outputs` are of shape (samples, features), leading dimensions flattened, outputs
    before any activation and before hooks that change them. `activation` is "relu" or "none", as
    decided by `capture`. `shapes` are those of the outputs, one for each call; `place` is the
    layer's among those that were called, by their first call.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    place: int = -1
    _inputs: list[Tensor] = field(default_factory=list)
    _outputs: list[Tensor] = field(default_factory=list)
    _noticed: bool = False
    refuted: bool = False
    _negative: bool = False

    @property
    def called(self) -> bool:
        return bool(self._inputs)

    @property
    def calls(self) -> int:
        return len(self.shapes)

    @property
    def inputs(self) -> Tensor:
        return torch.cat(self._inputs)

    @property
    def outputs(self) -> Tensor:
        return torch.cat(self._outputs)

    @property
    def activation(self) -> str:
        return "relu" if self._noticed and self._negative and not self.refuted else "none"

    def output(self, call: int) -> Tensor:
        """What a call gave, in its shape."""
        return self._outputs[call].reshape(self.shapes[call])

    def _add(self, inputs: Tensor, outputs: Tensor) -> None:
        self.shapes.append(tuple(outputs.shape))
        self._inputs.append(inputs.detach().flatten(0, -2).clone())
        # Cloned at once: an in-place activation would overwrite it.
        self._outputs.append(outputs.detach().flatten(0, -2).clone())
        self._negative |= bool((outputs < 0).any())


@contextmanager
def capture(
    model: nn.Module, names: Sequence[str], *, decide: bool = True
) -> Iterator[dict[str, LayerRecord]]:
    """Record inputs and outputs of named layers over all forward passes made inside the context.

        with capture(model, ["fc1", "fc2"]) as records:
            for batch in batches:
                model(batch)

    Hooks are removed when the context is left, also by an exception. The model's mode and
    gradients are the caller's business. Hooks of the caller run as often as the model does.

    Whether a ReLU follows a layer is tried out, after each pass of the model and on its arguments:
    the model is run with relu(output) in place of the layer's output, in evaluation mode. "relu" is
    the answer if that never changed anything, to the last bit: neither the model's outputs nor the
    inputs of its modules that have parameters; if other values did; and if some output was
    negative. Whatever reads the layer then reads it through a ReLU, be it a module, a function or a
    method, also behind pooling, dropout or a reshape.

    In all other cases the answer is "none", under which the whole output has to be reproduced: that
    is always a valid demand, only a harder one. So it is the answer too where outputs happen never
    to be negative, where normalisation stands before the ReLU, for other activations, where
    something else reads the raw output, where two equal passes differ, since the network draws
    random numbers, and where the model was never called as a whole.

    That costs two passes for each pass, and one for each layer that may have a ReLU (and one more
    in all for each that has). The model is
    as it was after them, see `ddlr.untouched.untouched`.

    Parameters
    ----------
    model : nn.Module
    names : sequence of str
    decide : bool
        Whether activations are wanted; without it they are "none", and nothing is tried out.

    Raises
    ------
    ValueError
        If a name is not a module of the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"the model has no layer {unknown[0]!r}; it has {', '.join(modules)}")
    records = {name: LayerRecord() for name in names}
    places = count()
    trying = False
    asked: list[tuple[tuple, dict]] = []

    def note(record: LayerRecord):
        def hook(_module, arguments, keywords, output):
            if trying:
                return
            if not record.called:
                record.place = next(places)
            record._add(given_to(arguments, keywords), output)

        return hook

    def before(_module, arguments, keywords):
        if not trying:
            asked.append(_kept(arguments, keywords))

    def after(_module, _arguments, _output):
        nonlocal trying
        if trying:
            return
        trying = True
        try:
            with untouched(model):
                try_relu(model, records, *asked.pop())
        finally:
            trying = False

    keywords = {"with_kwargs": True}
    hooks = [
        # Before the hooks of the owner, which may change the output.
        (modules[name].register_forward_hook, note(record), {**keywords, "prepend": True})
        for name, record in records.items()
    ]
    if decide:
        hooks.append((model.register_forward_pre_hook, before, {**keywords, "prepend": True}))
        hooks.append((model.register_forward_hook, after))
    with hooked(*hooks):
        yield records


def given_to(arguments: tuple, keywords: Mapping) -> Tensor:
    """The input of a linear layer, however it was called."""
    return arguments[0] if arguments else keywords["input"]


def _kept(arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
    """Arguments of a pass, of which tensors may be overwritten in it."""
    copied = tuple(each.clone() if isinstance(each, Tensor) else each for each in arguments)
    return copied, {
        name: each.clone() if isinstance(each, Tensor) else each for name, each in keywords.items()
    }


def try_relu(
    model: nn.Module,
    records: Mapping[str, LayerRecord],
    arguments: tuple,
    keywords: dict,
    names: Sequence[str] | None = None,
) -> Trace:
    """Hold each record's ReLU against one pass of a model in evaluation mode, see `capture`.

    Returns the trace of the pass over the modules called `names`.
    """
    if names is None:
        names = traced_modules(model, list(records))
    once = trace(model, names, arguments, keywords)
    with random_state_kept():
        again = trace(model, names, arguments, keywords)
    for name, record in records.items():
        if record.refuted or not agree(once, again):
            record.refuted = True
            continue

        layer, run = model.get_submodule(name), (again, model, names, arguments, keywords)
        record.refuted = not _agrees(*run, with_output(layer, torch.relu))
        if not (record.refuted or record._noticed):
            # Outputs that are too coarse to show other values, such as an argmax, show nothing.
            other = with_output(layer, lambda output: 1.5 * output.relu() + 1)
            record._noticed = not _agrees(*run, other)
    return again


def _agrees(expected: Trace, model: nn.Module, names, arguments, keywords, *hooks) -> bool:
    """Whether a pass with hooks has the same trace; not, if it fails."""
    with random_state_kept(), hooked(*hooks):
        try:
            return agree(expected, trace(model, names, arguments, keywords))
        except Exception:
            return False


def checked(batches: Iterable[Any]) -> Iterator[Tensor]:
    """Those batches that have samples.

    Raises
    ------
    ValueError
        If there is no batch, or one without samples.
    TypeError
        If a batch is not a tensor.
    """
    samples = 0
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"a calibration batch is a {type(batch).__name__}; it must be a tensor of "
                "network inputs, so take the labels off: (inputs for inputs, _ in loader)"
            )
        samples += len(batch)
        if len(batch):
            yield batch
    if samples == 0:
        raise ValueError("the calibration set is empty; it must have at least one sample")


def run_batches(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Pass batches of network inputs through a model in evaluation mode, on its device.

    Model and batches are left as they are, see `ddlr.untouched.untouched`.

    Raises
    ------
    ValueError
        If there is no batch, or one without samples.
    TypeError
        If a batch is not a tensor.
    """
    with untouched(model) as device:
        for batch in checked(batches):
            model(batch.to(device, copy=True))


class OutputError(ValueError):
    """Outputs of a network that can not be compared: not one tensor, or not finite."""


def one_tensor(output: object) -> Tensor:
    """What a network gave, in single precision at least, if it is a tensor with samples.

    Raises
    ------
    OutputError
        If it is not; says what to do.
    """
    if not isinstance(output, Tensor):
        raise OutputError(
            f"the network's output is a {type(output).__name__}, where it must be one tensor to be "
            "compared with another network's; wrap the network in a module that returns the "
            "tensor that counts"
        )
    if output.ndim == 0 or output.is_complex():
        raise OutputError(
            f"the network's output is of shape {tuple(output.shape)} and {output.dtype}; it must "
            "be real, and its first dimension that of the samples"
        )
    return output.to(torch.promote_types(output.dtype, torch.float32))


def outputs_of(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Outputs of a network in evaluation mode, all batches in one, shape (rows, outputs).

    Leading dimensions are flattened, as those of a layer in a capture.

    Raises
    ------
    OutputError
        If an output is not one tensor, or their last dimensions differ.
    """
    with untouched(model) as device:
        outputs = [one_tensor(model(batch.to(device, copy=True))) for batch in batches]
    rows = [each.flatten(0, -2) if each.ndim > 1 else each[:, None] for each in outputs]
    if len({each.shape[1] for each in rows}) > 1:
        raise OutputError(
            "the last dimension of the network's output is not the same in all batches"
        )
    return torch.cat(rows)


def is_sole_consumer(
    model: nn.Module, name: str, following: str, batches: Sequence[Tensor]
) -> bool:
    """Whether a layer's outputs reach the network's outputs through one other layer alone.

    Tried out on all batches: the layer's outputs are set to zero, and moved far up, while the other
    layer is given the inputs that it had. Neither the network's outputs nor the inputs of its
    modules that have parameters may change. Both layers have to be called once for each batch.
    """
    layer, other = model.get_submodule(name), model.get_submodule(following)
    names = traced_modules(model, [name, following])
    given: list[Tensor] = []
    calls: list[None] = []

    def note(_module, arguments, keywords):
        given.append(given_to(arguments, keywords).clone())

    def give(_module, arguments, keywords):
        if arguments:
            return (given[0].clone(), *arguments[1:]), keywords
        return arguments, {**keywords, "input": given[0].clone()}

    def called(_module, _arguments, _output):
        calls.append(None)

    with untouched(model) as device:
        for batch in (batch.to(device) for batch in batches if len(batch)):
            given.clear()
            calls.clear()
            noted = (
                (other.register_forward_pre_hook, note, {"with_kwargs": True}),
                (layer.register_forward_hook, called),
            )
            with random_state_kept(), hooked(*noted):
                before = trace(model, names, (batch,), {})
            if not len(given) == len(calls) == 1:
                return False
            # After the hooks of the owner, where the inputs were noted.
            kept = (other.register_forward_pre_hook, give, {"with_kwargs": True})
            for change in _CHANGES:
                if not _agrees(
                    before, model, names, (batch,), {}, kept, with_output(layer, change)
                ):
                    return False
    return True


def reaches(
    model: nn.Module, layers: Sequence[str], following: str, batches: Sequence[Tensor]
) -> bool:
    """Whether what a layer is given depends on the outputs of any of some layers, or its own."""
    with untouched(model) as device:
        for batch in (batch.to(device) for batch in batches):
            with random_state_kept():
                before = trace(model, [following], (batch,), {}).given
            for change in _CHANGES:
                moved = [with_output(model.get_submodule(name), change) for name in layers]
                with random_state_kept(), hooked(*moved):
                    if trace(model, [following], (batch,), {}).given != before:
                        return True
    return False
