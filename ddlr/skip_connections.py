"""Skip connections: what a network adds to the outputs of a layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ddlr.calls import Batch
from ddlr.linear_maps import rows_kind, rows_that_count
from ddlr.trials import hooked, leaves
from ddlr.untouched import untouched

_SUMS = frozenset(("aten::add", "aten::add_"))


class _Reads(TorchDispatchMode):
    """Calls ``on_read(name, addend)`` for each operation on the latest output of a layer.

    The addend is what it is added to, of the same shape; None for any other operation.
    """

    def __init__(self, on_read: Callable[[str, Tensor | None], None]):
        super().__init__()
        self._on_read = on_read
        self.outputs: dict[str, Tensor] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.outputs:
            given = [each for each in leaves((args, kwargs)) if isinstance(each, Tensor)]
            read = [
                name for name, output in self.outputs.items() if any(x is output for x in given)
            ]
            for name in read:
                output = self.outputs[name]
                self._on_read(name, _addend(output, operation, args, kwargs))
                if operation._schema.name == "aten::add_" and args[0] is output:
                    self.outputs.pop(name, None)  # from now on it is the sum
        return operation(*args, **kwargs)


def _addend(output: Tensor, operation, args: tuple, kwargs: dict) -> Tensor | None:
    if operation._schema.name not in _SUMS or len(args) != 2 or kwargs.get("alpha", 1) != 1:
        return None
    one, other = args
    addend = other if one is output else one
    same = isinstance(addend, Tensor) and addend is not output
    return addend if same and addend.shape == output.shape else None


def layers_in_sums(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> frozenset[str]:
    """Which layers' outputs are read by a sum with another tensor, and by nothing else.

    By one pass over the batches in evaluation mode, in each of which a layer has to be called once.
    What stands between layer and sum must leave its output as it is, like dropout.
    """
    reads: dict[str, list[bool]] = {}

    def on_output(name: str) -> Callable:
        def hook(_layer, _arguments, output):
            calls[name] += 1
            if isinstance(output, Tensor):
                noting.outputs[name] = output

        return hook

    noting = _Reads(lambda name, addend: reads[name].append(addend is not None))
    hooks = [(model.get_submodule(name).register_forward_hook, on_output(name)) for name in names]
    left = set(names)
    with untouched(model) as device, hooked(*hooks):
        for batch in batches:
            reads, calls = {name: [] for name in names}, dict.fromkeys(names, 0)
            noting.outputs = {}
            with noting:
                batch.run(model, device)
            left = {name for name in left if reads[name] == [True] and calls[name] == 1}
    return frozenset(left)


class Addends:
    """What is added to a layer's outputs in each pass, as rows like those of its outputs.

    Parameters
    ----------
    model : nn.Module
    name : str
        Of a layer in a sum, see `layers_in_sums`.
    on_sum : callable, optional
        Is called once a pass has come to the sum.
    """

    def __init__(self, model: nn.Module, name: str, on_sum: Callable[[], None] | None = None):
        self._layer, self._on_sum = model.get_submodule(name), on_sum
        self._rows: Tensor | None = None
        self._batch: Batch | None = None
        self._noting = _Reads(self._note)
        self._parts: list[Tensor] = []

    @contextmanager
    def attached(self) -> Iterator["Addends"]:
        with hooked((self._layer.register_forward_hook, self._on_output)):
            yield self

    @contextmanager
    def batch(self, batch: Batch) -> Iterator[None]:
        """Around one pass of the network."""
        self._batch = batch
        try:
            with self._noting:
                yield
        finally:
            self._batch, self._noting.outputs = None, {}

    @property
    def rows(self) -> Tensor | None:
        """Shape (samples, out_features); None where no pass came to a sum."""
        return torch.cat(self._parts) if self._parts else None

    def _on_output(self, layer, _arguments, output) -> None:
        with _disable_current_modes():
            self._rows = rows_that_count(layer, output, self._batch)
        self._noting.outputs = {"": output}

    def _note(self, _name: str, addend: Tensor | None) -> None:
        if addend is None:
            return
        self._noting.outputs = {}
        with torch.no_grad(), _disable_current_modes():
            rows = rows_kind(self._layer).output_rows(self._layer, addend, self._rows)
            self._parts.append(rows.clone())
        if self._on_sum is not None:
            self._on_sum()
