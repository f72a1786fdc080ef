"""Which samples reach a layer: whether its inputs in two networks are of the same, row by row.

In a mixture of experts, or where tokens are sorted or left out, a network chooses rows by what it
computes. A compressed copy may choose others, and then a layer's inputs there do not belong to the
outputs that the original gave, even where there are as many.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddlr.trials import digest, hooked, leaves

# Operations that take or place rows by indices or a mask.
_CHOOSING = frozenset(
    f"aten::{name}"
    for name in (
        *("index", "index_select", "gather", "take", "masked_select", "repeat_interleave"),
        *("index_put", "index_add", "index_copy", "scatter", "scatter_add", "masked_scatter"),
        *("index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_", "masked_scatter_"),
    )
)

# For each batch: the shapes of a layer's outputs, one for each call, and the digests of what rows
# had been chosen by until the last of them.
Route = tuple[tuple[tuple, tuple], ...]


class _Choices(TorchDispatchMode):
    """Notes the indices and masks by which rows are chosen."""

    def __init__(self):
        super().__init__()
        self.noted: list[Any] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._schema.name in _CHOOSING:
            self.noted.extend(
                digest(each)
                for each in leaves((args, kwargs))
                if isinstance(each, Tensor) and not (each.is_floating_point() or each.is_complex())
            )
        return operation(*args, **(kwargs or {}))


class Routes:
    """The routes to layers, batch by batch."""

    def __init__(self, names: Sequence[str]):
        self._batches: dict[str, list[tuple[tuple, tuple]]] = {name: [] for name in names}
        self._choices: _Choices | None = None
        self._shapes: dict[str, list[tuple]] = {}
        self._chosen: dict[str, tuple] = {}
        self.paused = False

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around one pass of the network."""
        self._shapes = {name: [] for name in self._batches}
        self._chosen = dict.fromkeys(self._batches, ())
        self._choices = _Choices()
        with self._choices:
            yield
        for name, batches in self._batches.items():
            batches.append((tuple(self._shapes[name]), self._chosen[name]))

    def to(self, name: str) -> Route:
        return tuple(self._batches[name])

    def _note(self, name: str):
        def hook(_layer, _arguments, output):
            if self.paused:
                return
            self._shapes[name].append(tuple(output.shape))
            self._chosen[name] = tuple(self._choices.noted)

        return hook


@contextmanager
def noting_routes(model: nn.Module, names: Sequence[str]) -> Iterator[Routes]:
    """Note how the batches that are passed inside reach the layers of these names."""
    routes = Routes(names)
    hooks = [
        (model.get_submodule(name).register_forward_hook, routes._note(name)) for name in names
    ]
    with hooked(*hooks):
        yield routes


def called_several_times(route: Route) -> bool:
    """Whether a layer is called more than once in some pass."""
    return any(len(shapes) > 1 for shapes, _chosen in route)
