"""Batches of network inputs in the forms that people have them, and how a network runs on one."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

# ``(model, batch)`` to the output of the network that counts.
Forward = Callable[[nn.Module, Any], Any]
# ``(batch)`` to a mask of the positions that count, or None where all do.
Samples = Callable[[Any], Tensor | None]

_BATCH = 1000
_FORMS = "a tensor, or an iterable of batches: tensors, dicts or tuples of them"


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of a network for one pass, in any form, and how the network is called on them.

    Attributes
    ----------
    values : Tensor, mapping, tuple, list or any object
        A tensor is the one argument of the network; a mapping holds its keyword arguments; a tuple
        or list its positional ones.
    forward : callable, optional
        ``(model, values)`` to the output; the call above unless given.
    samples : callable, optional
        ``(values)`` to a mask of the rows that count, see `chosen_rows`.
    most_rows : int, optional
        The most rows of a layer's inputs that are kept of all batches; a random choice beyond.
    place, of : int
        Its number among how many batches, each of which gives its share of the rows.
    """

    values: Any
    forward: Forward | None = None
    samples: Samples | None = None
    most_rows: int | None = None
    place: int = 0
    of: int = 1
    _masks: dict = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        """The number of samples: the first dimension of the first tensor; 1 where there is none."""
        first = next(tensors_in(self.values), None)
        return 1 if first is None or first.ndim == 0 else len(first)

    @property
    def counted(self) -> int:
        """The number of positions that count by its mask; of samples, where there is none."""
        mask = self._mask(whole=True)
        return len(self) if mask is None else int(mask.sum())

    def run(self, model: nn.Module, device: torch.device) -> Any:
        """What the network gives for a copy of the inputs, on its device."""
        return call(model, moved(self.values, device), self.forward)

    def part(self, chosen: slice | Tensor) -> "Batch":
        """Some of the samples: of each tensor that has as many, those."""
        count = len(self)

        def change(tensor: Tensor) -> Tensor:
            if not tensor.ndim or len(tensor) != count:
                return tensor
            return tensor[chosen if isinstance(chosen, slice) else chosen.to(tensor.device)]

        return replace(self, values=_changed(self.values, change))

    def chosen_rows(self, shape: tuple[int, ...], most_rows: int | None = None) -> Tensor | None:
        """Indices of the rows of a layer's inputs that count, or None where all do.

        Parameters
        ----------
        shape : tuple of int
            Leading dimensions of the inputs, before the features. A mask counts for those layers
            whose inputs begin with its shape.
        most_rows : int, optional
            Where the batch has none of its own.

        Returns
        -------
        Tensor of shape (rows,), ascending; the same in each pass
        """
        mask = self._mask()
        rows = None
        if mask is not None and tuple(mask.shape) == tuple(shape):
            rows = mask.flatten().nonzero()[:, 0]
        count = torch.Size(shape).numel() if rows is None else len(rows)
        most_rows = most_rows if self.most_rows is None else self.most_rows
        share = count if most_rows is None else math.ceil(most_rows / self.of)
        if count <= share:
            return rows
        # Of all calls of one shape the same, so that what two layers saw belongs together.
        generator = torch.Generator().manual_seed(1_000_003 * self.place + count)
        some = torch.randperm(count, generator=generator)[:share].sort().values
        return some if rows is None else rows[some]

    def _mask(self, *, whole: bool = False) -> Tensor | None:
        """The mask of what counts; None where all does, unless `whole` masks are asked for too."""
        if "mask" not in self._masks:
            self._masks["mask"] = self._made_mask()
        mask = self._masks["mask"]
        return None if mask is None or (mask.all() and not whole) else mask

    def _made_mask(self) -> Tensor | None:
        if self.samples is not None:
            mask = self.samples(self.values)
            if mask is None:
                return None
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(
                    f"samples gives a {kind} for a batch; it must give a tensor of bool, True for "
                    "each position that counts, or None where all do"
                )
            mask = mask.cpu()
        else:
            mask = attention_mask(self.values)
        if mask is not None and not mask.any():
            raise ValueError(
                "a calibration batch has no position that counts, by its mask; leave it out"
            )
        return mask


def call(model: nn.Module, values: Any, forward: Forward | None = None) -> Any:
    """What a network gives for inputs in any form, see `Batch`."""
    if forward is not None:
        return forward(model, values)
    if isinstance(values, Mapping):
        return model(**values)
    if isinstance(values, tuple | list):
        return model(*values)
    return model(values)


def attention_mask(values: Any) -> Tensor | None:
    """The mask of tokens that are no padding, where inputs have one by its usual name."""
    mask = values.get("attention_mask") if isinstance(values, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return None
    return (mask != 0).cpu()


def as_batches(
    calibration: Any,
    *,
    forward: Forward | None = None,
    samples: Samples | None = None,
    what: str = "calibration",
) -> tuple[Batch, ...]:
    """Calibration data as batches; those that have no samples are left out.

    Parameters
    ----------
    calibration : Tensor, mapping, or iterable of batches
        A tensor is split into batches of 1000, and a mapping is one batch of keyword arguments.
    forward, samples : callable, optional
        See `Batch`.
    what : str
        Its name in messages.

    Raises
    ------
    TypeError
        If it is of another form, or has batches that are.
    ValueError
        If there is no sample.
    """
    if isinstance(calibration, Tensor) and calibration.ndim:
        given = calibration.split(_BATCH)
    elif isinstance(calibration, Mapping):
        given = [calibration]
    elif hasattr(calibration, "dtype") or isinstance(calibration, str) or not iterable(calibration):
        raise TypeError(f"{what} is a {type(calibration).__name__}; it must be {_FORMS}")
    else:
        given = calibration
    batches = []
    for values in given:
        if not isinstance(values, Batch):
            if forward is None:
                check_values(values, what)
            values = Batch(values, forward, samples, place=len(batches))
        if len(values):
            batches.append(values)
    if not batches:
        raise ValueError(f"the {what} set is empty; it must have at least one sample")
    return tuple(batches)


def check_values(values: Any, what: str) -> None:
    """Refuse a batch whose form does not say how a network is called on it."""
    if isinstance(values, Tensor | Mapping):
        return
    if isinstance(values, tuple | list) and values:
        wrong = next((each for each in values if not isinstance(each, Tensor)), None)
        if wrong is None:
            return
        raise TypeError(
            f"a {what} batch is a {type(values).__name__} with a {type(wrong).__name__} in it; "
            "say how the network is called on it: forward=lambda model, batch: ..."
        )
    raise TypeError(
        f"a {what} batch is a {type(values).__name__}; it must be a tensor, or a dict or tuple of "
        "tensors, or say how the network is called on it: forward=lambda model, batch: ..."
    )


def check_call(model: nn.Module, batches: Iterable[Batch], what: str = "calibration") -> None:
    """Refuse batches of several tensors where it is not plain that all are network inputs.

    The second may be labels, which a network with an optional argument would take for something
    else without a word.

    Raises
    ------
    TypeError
        Says what to do.
    """
    for batch in batches:
        values = batch.values
        if batch.forward is not None or not isinstance(values, tuple | list) or len(values) == 1:
            continue
        required = _required_arguments(model)
        if required != len(values):
            takes = "an unknown number of" if required is None else required
            raise TypeError(
                f"a {what} batch is a {type(values).__name__} of {len(values)} tensors, and the "
                f"network takes {takes} positional arguments; take the labels off: (inputs for "
                "inputs, _ in loader), or say how the network is called: "
                "forward=lambda model, batch: model(batch[0])"
            )


def _required_arguments(model: nn.Module) -> int | None:
    """How many positional arguments a network must be given; None where that is not known."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is each.empty for each in parameters)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in their order."""
    found: list[Tensor] = []
    _changed(values, lambda tensor: found.append(tensor) or tensor)
    yield from found


def moved(values: Any, device: torch.device) -> Any:
    """A copy of a batch on a device; a network may overwrite what it is given."""
    return _changed(values, lambda tensor: tensor.to(device, copy=True))


def cloned(values: Any) -> Any:
    """A copy of a batch where it is."""
    return _changed(values, torch.clone)


def _changed(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with all its tensors passed through a function; other objects are copied."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, Mapping):
        parts = {key: _changed(one, change) for key, one in values.items()}
        return parts if type(values) is dict else _like(values, parts)
    if isinstance(values, tuple | list):
        parts = [_changed(one, change) for one in values]
        return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)
    if hasattr(values, "__dict__") and not isinstance(values, type) and not callable(values):
        made = copy.copy(values)
        for name, one in vars(values).items():
            if isinstance(one, Tensor | Mapping | tuple | list):
                vars(made)[name] = _changed(one, change)
        return made
    return values


def _like(values: Mapping, parts: dict) -> Mapping:
    """A mapping of the same class, where it can be made of a dict, such as tokenisers give."""
    try:
        return type(values)(parts)
    except TypeError:
        return parts


def iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True
