"""Inputs and outputs of a network's layers on data, and what reads them, found by trying it out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddlr.calls import Batch, as_batches, check_call, cloned
from ddlr.linear_maps import given_to
from ddlr.recording import LayerRecord, Recorder
from ddlr.trials import Trace, agree, hooked, trace, traced_modules, with_output
from ddlr.untouched import random_state_kept, untouched

# Of outputs, to see what depends on them: as they are once they are dropped, and far up, where also
# what lets only large ones pass is seen.
_CHANGES = (
    torch.zeros_like,
    lambda output: 2 * output.abs() + 100 * (1 + output.abs().max()),
)
# Samples on which each layer's ReLU is tried by itself, before all are tried together on all.
_HEAD = 4


@contextmanager
def capture(
    model: nn.Module, names: Sequence[str], *, decide: bool = True
) -> Iterator[Mapping[str, LayerRecord]]:
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

    That costs two passes for each pass, one more where some layer may have a ReLU, and short ones
    on few samples, see `try_relu`. The model is as it was after them, see
    `ddlr.untouched.untouched`.

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
    recorder = Recorder(model, names)
    asked: list[Batch] = []

    def before(_module, arguments, keywords):
        if not recorder.paused:
            asked.append(Batch(cloned((arguments, keywords)), forward=_call))

    def after(_module, _arguments, _output):
        if recorder.paused:
            return
        recorder.paused = True
        try:
            with untouched(model) as device:
                try_relu(model, recorder.records, asked.pop(), device)
        finally:
            recorder.paused = False

    hooks = []
    if decide:
        options = {"with_kwargs": True, "prepend": True}
        hooks.append((model.register_forward_pre_hook, before, options))
        hooks.append((model.register_forward_hook, after))
    with recorder.attached(), hooked(*hooks):
        yield recorder.records


def _call(model: nn.Module, given: tuple[tuple, dict]) -> Any:
    arguments, keywords = given
    return model(*arguments, **keywords)


def try_relu(
    model: nn.Module,
    records: Mapping[str, LayerRecord],
    batch: Batch,
    device: torch.device,
    names: Sequence[str] | None = None,
    expected: Trace | None = None,
) -> Trace:
    """Hold each record's ReLU against one batch of a model in evaluation mode, see `capture`.

    Each is tried by itself on the first few samples, which is enough to refute most; all that are
    left are tried together on the batch, and only if that fails, one by one. A ReLU that changes
    nothing beside others changes nothing alone: every module with parameters is given the same in
    both, to the last bit.

    Parameters
    ----------
    names : sequence of str, optional
        Modules by which passes are compared; those that have parameters unless given.
    expected : Trace, optional
        What happens over these, where passes are known to agree whatever the random states.

    Returns
    -------
    Trace
        Of a pass over the batch.
    """
    names = traced_modules(model, list(records)) if names is None else names

    def agrees(expected: Trace, batch: Batch, *hooks) -> bool:
        with random_state_kept(), hooked(*hooks):
            try:
                return agree(expected, trace(model, names, lambda: batch.run(model, device)))
            except Exception:
                return False

    def without_hooks(batch: Batch) -> Trace:
        with random_state_kept():
            return trace(model, names, lambda: batch.run(model, device))

    relus = {
        name: with_output(model.get_submodule(name), torch.relu)
        for name, record in records.items()
        if not record.refuted
    }
    if expected is None:
        # Random states move on in between: a network that draws from them is not decided on.
        once = trace(model, names, lambda: batch.run(model, device))
        expected = without_hooks(batch)
        if not agree(once, expected):
            relus.clear()
    elif not expected.outputs:
        relus.clear()

    def keep(held: Mapping[str, tuple]) -> None:
        for name in set(relus) - set(held):
            del relus[name]

    head, head_expected = batch.part(slice(0, _HEAD)), None
    if relus and len(batch) > 2 * _HEAD:
        try:
            head_expected = without_hooks(head)
        except Exception:
            pass  # the network takes no other number of samples
        else:
            keep({name: hook for name, hook in relus.items() if agrees(head_expected, head, hook)})
    if relus and not agrees(expected, batch, *relus.values()):
        keep({name: hook for name, hook in relus.items() if agrees(expected, batch, hook)})
    for name, record in records.items():
        record.refuted = name not in relus
        if not (record.refuted or record.noticed):
            # Outputs that are too coarse to show other values, such as an argmax, show nothing.
            other = with_output(model.get_submodule(name), lambda output: 1.5 * output.relu() + 1)
            if head_expected is not None:
                record.noticed = not agrees(head_expected, head, other)
            record.noticed = record.noticed or not agrees(expected, batch, other)
    return expected


def run_batches(model: nn.Module, batches: Iterable[Any]) -> None:
    """Pass batches of network inputs through a model in evaluation mode, on its device.

    Model and batches are left as they are, see `ddlr.untouched.untouched`.

    Raises
    ------
    ValueError, TypeError
        If there is no sample, or a batch is of another form, see `ddlr.calls.as_batches`.
    """
    batches = as_batches(batches)
    check_call(model, batches)
    with untouched(model) as device:
        for batch in batches:
            batch.run(model, device)


def is_sole_consumer(model: nn.Module, name: str, following: str, batches: Sequence[Batch]) -> bool:
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
        return arguments, dict.fromkeys(keywords, given[0].clone())

    def called(_module, _arguments, _output):
        calls.append(None)

    def traced(batch: Batch, device: torch.device, *hooks) -> Trace:
        with random_state_kept(), hooked(*hooks):
            return trace(model, names, lambda: batch.run(model, device))

    def same(before: Trace, batch: Batch, device: torch.device, *hooks) -> bool:
        try:
            return agree(before, traced(batch, device, *hooks))
        except Exception:
            return False

    with untouched(model) as device:
        for batch in batches:
            given.clear()
            calls.clear()
            before = traced(
                batch,
                device,
                (other.register_forward_pre_hook, note, {"with_kwargs": True}),
                (layer.register_forward_hook, called),
            )
            if not len(given) == len(calls) == 1:
                return False
            # After the hooks of the owner, where the inputs were noted.
            kept = (other.register_forward_pre_hook, give, {"with_kwargs": True})
            if not all(
                same(before, batch, device, kept, with_output(layer, change)) for change in _CHANGES
            ):
                return False
    return True


def reaches(
    model: nn.Module, layers: Sequence[str], following: str, batches: Sequence[Batch]
) -> bool:
    """Whether what a layer is given depends on the outputs of any of some layers, or its own."""

    def given(batch: Batch, device: torch.device, *hooks) -> tuple:
        with random_state_kept(), hooked(*hooks):
            return trace(model, [following], lambda: batch.run(model, device)).given

    with untouched(model) as device:
        for batch in batches:
            before = given(batch, device)
            for change in _CHANGES:
                moved = [with_output(model.get_submodule(name), change) for name in layers]
                if given(batch, device, *moved) != before:
                    return True
    return False
