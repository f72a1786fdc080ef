"""Held-out samples as callers have them, and what their labels say of a network's outputs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddlr.calls import Batch, Forward, check_values, iterable
from ddlr.outputs import Output

_BATCH = 1000
_FORMS = "inputs, (inputs, labels), or a list or DataLoader with batches of either"

HeldOut = Tensor | Mapping | tuple | Iterable
Labels = tuple[Tensor, ...]


def read_held_out(
    held_out: HeldOut, forward: Forward | None = None
) -> tuple[tuple[Batch, ...], Labels | None]:
    """Batches of network inputs, and of labels where there are any.

    Inputs have the forms of calibration batches, see `ddlr.calls.Batch`; a tuple of two is inputs
    and labels.

    Raises
    ------
    ValueError, TypeError
        If it is of another form; names held_out.
    """
    if isinstance(held_out, Tensor | tuple | Mapping):
        pairs = [_pair(held_out, forward)]
    elif isinstance(held_out, str) or not iterable(held_out):
        raise TypeError(f"held_out is a {type(held_out).__name__}; it must be {_FORMS}")
    elif hasattr(held_out, "dtype"):
        raise TypeError(
            f"held_out is a {type(held_out).__name__}; its inputs must be a tensor, as the network "
            "takes it: torch.as_tensor(...)"
        )
    else:
        pairs = [
            _pair(tuple(each) if isinstance(each, list) else each, forward) for each in held_out
        ]
        kinds = {(*_kind(inputs), labels is None) for inputs, labels in pairs}
        if len(kinds) > 1:
            raise ValueError(
                "held_out is a list whose batches are not of one kind; it must be "
                f"{_FORMS}; a pair of inputs and labels is a tuple"
            )
    batches, labels = [], []
    for inputs, some in pairs:
        parts = inputs.split(_BATCH) if isinstance(inputs, Tensor) else [inputs]
        start = 0
        for part in parts:
            batch = Batch(part, forward, place=len(batches))
            if len(batch):
                batches.append(batch)
                labels.append(None if some is None else some[start : start + len(batch)])
            start += len(batch)
    if not batches:
        raise ValueError("held_out is empty; it must have at least one sample")
    return tuple(batches), None if labels[0] is None else tuple(labels)


def _kind(inputs: Any) -> tuple:
    return (inputs.ndim, inputs.dtype) if isinstance(inputs, Tensor) else (type(inputs),)


def _pair(batch: object, forward: Forward | None) -> tuple[Any, Tensor | None]:
    inputs, labels = batch, None
    if isinstance(batch, tuple):
        if len(batch) not in (1, 2):
            raise ValueError(f"held_out has a tuple of {len(batch)}; it must be {_FORMS}")
        inputs, *rest = batch
        labels = rest[0] if rest else None
        if rest and labels is None:
            raise ValueError(f"held_out has None for labels; it must be {_FORMS}")
    if isinstance(inputs, Tensor) and inputs.ndim == 0:
        raise TypeError(
            "held_out has a number for inputs; they must be a tensor with a dimension of samples, "
            "as the network takes it"
        )
    if forward is None:
        check_values(inputs, "held_out")
    if labels is None:
        return inputs, None
    try:
        labels = torch.as_tensor(labels)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TypeError(
            f"held_out has a {type(labels).__name__} for labels; they must be a tensor, or numbers "
            f"that make one: {error}"
        ) from error
    if labels.ndim == 0:
        raise ValueError("held_out has one number for labels; it must have one for each sample")
    count = len(Batch(inputs))
    if len(labels) != count:
        raise ValueError(f"held_out has {count} inputs, but {len(labels)} labels")
    if (
        isinstance(inputs, Tensor)
        and labels.is_floating_point()
        and labels.ndim > 1
        and labels.shape[1:] == inputs.shape[1:]
    ):
        raise ValueError(
            f"held_out is a pair of tensors of shapes {tuple(inputs.shape)} and "
            f"{tuple(labels.shape)}, which is read as (inputs, labels); give batches of inputs as "
            "a list"
        )
    return inputs, labels


def settled_output(
    output: Output | None, outputs: Sequence[Tensor], labels: Sequence[Tensor] | None, goal: str
) -> Output:
    """What a network's outputs are, for a goal that counts predictions: as given, or certain.

    Certain are classes along the last of two dimensions; of more dimensions only where labels, of
    whole numbers, have the shape of those before the last.

    Parameters
    ----------
    output : {"classes", "binary"}, optional
    outputs : sequence of Tensor
        Those that the network gives for held-out samples.
    labels : sequence of Tensor, optional
    goal : str
        Its name, for the error.

    Raises
    ------
    ValueError
        If it is not certain, or one that has no predictions.
    """
    shape = tuple(outputs[0].shape)
    if output == "values" or callable(output):
        raise ValueError(
            f'{goal} counts predictions, of which output={output!r} has none; say "classes" or '
            '"binary", or take max_output_error for a goal'
        )
    if output == "binary":
        return output
    one_logit = len(shape) < 2 or shape[-1] < 2
    choices = "" if one_logit else 'output="classes" (the largest along the last dimension) or '
    uncertain = ValueError(
        f"{goal} counts predictions, and what these are is not certain for a network's output of "
        f'shape {shape}; say {choices}output="binary" (each above 0 or not)'
    )
    if output is None and one_logit:
        raise uncertain
    if labels is None:
        if len(shape) > 3 and output == "classes":
            raise ValueError(
                f'output is "classes", but the network\'s output has shape {shape}; without labels '
                "it must be (samples, classes) or (samples, tokens, classes)"
            )
        if len(shape) > 2 and output is None:
            raise uncertain
        return "classes"
    class_labels(labels[0], outputs[0])
    if output is None and len(shape) > 2 and shape[1] == shape[-1]:
        raise uncertain  # classes may be along either
    return "classes"


def checked_labels(labels: Tensor, outputs: Tensor, output: Output) -> Tensor:
    """Labels as the predictions from a batch of outputs are: of their shape, type and device."""
    return (binary_labels if output == "binary" else class_labels)(labels, outputs)


def class_labels(labels: Tensor, outputs: Tensor) -> Tensor:
    """Whole numbers below the number of classes, of the shape of outputs without the last."""
    shape, expected = tuple(labels.shape), tuple(outputs.shape[:-1])
    if shape == (*expected, 1):
        labels = labels[..., 0]
    elif shape != expected:
        hint = ""
        if shape == tuple(outputs.shape):
            hint = (
                "; of one-hot labels take argmax(-1); where each column is an answer of its own, "
                'say output="binary"'
            )
        elif shape == (len(outputs), *outputs.shape[2:]):
            hint = (
                "; classes along dimension 1 must come last: wrap the network in a module that "
                "returns output.movedim(1, -1)"
            )
        raise ValueError(
            f"held_out has labels of shape {shape} for a network's output of shape "
            f"{tuple(outputs.shape)}, whose last dimension is classes; labels must be of shape "
            f"{expected}{hint}"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"held_out has labels of {labels.dtype}; classes are whole numbers: labels.long()"
        )
    labels, classes = labels.long(), outputs.shape[-1]
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(
            f"held_out has labels from {low} to {high}, but the network's output has {classes} "
            f"classes; labels must be between 0 and {classes - 1}"
        )
    return labels.to(outputs.device)


def binary_labels(labels: Tensor, outputs: Tensor) -> Tensor:
    """Labels 0 and 1 for each logit, as bool."""
    shape, expected = tuple(labels.shape), tuple(outputs.shape)
    if shape != expected and (*shape, 1) != expected and shape != (*expected, 1):
        raise ValueError(
            f'held_out has labels of shape {shape}; for output="binary" they must have that of the '
            f"network's output, {expected}"
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(
            'held_out has labels that are neither 0 nor 1; for output="binary" they must be'
        )
    return (labels == 1).reshape(expected).to(outputs.device)
