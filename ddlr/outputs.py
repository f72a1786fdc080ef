"""What a network's outputs are, and how far those of a compressed network are from them.

The outputs of a network are kept as a tuple of tensors: one of all batches, or one a batch where
their shapes differ, as with sequences of unequal length.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddlr.calls import Batch
from ddlr.untouched import evaluating

KINDS = ("classes", "binary", "values")
Output = str | Callable[[Tensor, Tensor], Tensor | float]
Outputs = Tensor | Sequence[Tensor]

# Numbers from here downwards may stand for what is left out: -1e9 in place of -inf, or logits to
# which -1e4 was added.
_MASK = -5e3
_FAR = 10  # times as far from 0 as all other values, these are
# Of a function of equal outputs, which is 0 but for rounding.
_ZERO = 1e-4


def check_output(output: Output | None) -> None:
    """Raise a ValueError unless it is one of the kinds, a function, or None."""
    if not (output is None or callable(output) or (isinstance(output, str) and output in KINDS)):
        raise ValueError(
            f"output is {output!r}; choose one of {KINDS}, or give a function of the original and "
            "the new outputs"
        )


def check_trainable(output: Output | None) -> None:
    """Raise a ValueError where a refit of the network is not told what it trains towards."""
    check_output(output)
    if output is None:
        raise ValueError(
            "a refit of the network trains it towards the original network's output; say what that "
            'is: output="classes" (their logits, along the last dimension), "binary" (logits, '
            'each above 0 or not), "values" (real numbers), or a function of the original and the '
            "new outputs"
        )


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
            "compared with another network's; say which of it counts: "
            "forward=lambda model, batch: model(...).logits"
        )
    if output.ndim == 0 or output.is_complex():
        raise OutputError(
            f"the network's output is of shape {tuple(output.shape)} and {output.dtype}; it must "
            "be real, and its first dimension that of the samples"
        )
    return output.to(torch.promote_types(output.dtype, torch.float32))


def outputs_by_batch(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Outputs of a network in evaluation mode, in its own shape, for each batch.

    Raises
    ------
    OutputError
        If an output is not one tensor, or has values that are nan or +inf; -inf stands for what a
        network leaves out.
    """
    with evaluating(model) as device, torch.no_grad():
        outputs = [one_tensor(batch.run(model, device)) for batch in batches]
    bad = sum(int((~(each < math.inf)).sum()) for each in outputs)
    if bad:
        raise OutputError(
            f"the network's output has {bad} values that are nan or infinite; it must be finite "
            "(-inf may stand for what the network leaves out)"
        )
    return outputs


def network_outputs(model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, ...]:
    """As `outputs_by_batch`, but all batches in one tensor where their shapes allow it."""
    outputs = outputs_by_batch(model, batches)
    if len({each.shape[1:] for each in outputs}) == 1:
        return (torch.cat(outputs),)
    return tuple(outputs)


def check_outputs(outputs: Sequence[Tensor], output: Output | None) -> None:
    """Raise a ValueError where a network's outputs are not what they are said to be."""
    shape = tuple(outputs[0].shape)
    if all(bool((each == -math.inf).all()) for each in outputs):
        raise ValueError("the network's output is -inf throughout, so there is nothing to compare")
    if output == "values" and not any(bool(each.any()) for each in outputs):
        raise ValueError("the network's output is 0 throughout, so nothing is relative to it")
    if output == "classes":
        if len(shape) < 2 or shape[-1] < 2:
            raise ValueError(
                f'output is "classes", but the network\'s output has shape {shape}; classes are '
                'along its last dimension, 2 of them at least; a single logit is output="binary"'
            )
        if any(bool((each == -math.inf).all(dim=-1).any()) for each in outputs):
            raise ValueError("the network's output is -inf for all classes of a sample")
    if output == "binary" and all(bool(((0 <= each) & (each <= 1)).all()) for each in outputs):
        raise ValueError(
            'output is "binary", but the network\'s output is between 0 and 1 throughout; it must '
            "be logits, which are above 0 for one answer and below for the other: leave the "
            "sigmoid out"
        )
    if callable(output) and abs(divergence(outputs, outputs, output)) > _ZERO:
        raise ValueError(
            "output is a function that is not 0 for equal outputs; it must be the larger, the more "
            "they differ"
        )


def divergence(original: Outputs, outputs: Outputs, output: Output) -> float:
    """How far a network's outputs are from the original's: 0 for equal ones, but for rounding.

    Parameters
    ----------
    original, outputs : Tensor, or sequence of Tensor
        They have the same shapes. The mean over the samples of all is taken.
    output : {"classes", "binary", "values"} or callable
        "classes": the Kullback-Leibler divergence of the probabilities of classes, from logits
        along the last dimension; "binary": the same of each logit's two answers; "values": the
        squared difference relative to the square of the original. What is -inf in both, as masked
        classes are, adds nothing; for "values" neither do low numbers that take its place, such as
        -1e9. A function is called with two tensors, and gives one number.

    Raises
    ------
    OutputError
        If it is not finite.
    ValueError
        If shapes or masks differ, or a function's number is negative.
    """
    original, outputs = _parts(original), _parts(outputs)
    pairs = list(zip(original, outputs, strict=True))
    if callable(output):
        samples = sum(len(one) for one in original)
        distance = sum(len(one) * float(output(one, other)) for one, other in pairs) / samples
        if distance < -_ZERO:
            raise ValueError(
                f"output is a function that gives {distance:g}; it must not be negative"
            )
    elif output == "values":
        distance = relative_error(original, outputs) ** 2
    else:
        total = sum(_kullback_leibler(one, other, output) for one, other in pairs)
        distance = (total / sum(_rows(one, output) for one in original)).item()
    if not math.isfinite(distance):
        raise OutputError(
            f"the network's output and the original's are {distance} apart; "
            "it must be a finite number"
        )
    return distance


def training_loss(
    original: Sequence[Tensor], output: Output, temperature: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """`divergence` of some of the original's outputs and others, as a tensor with a gradient.

    Logits are divided by the temperature (Hinton et al. 2015).
    """
    if callable(output):

        def loss(one: Tensor, other: Tensor) -> Tensor:
            value = output(one, other)
            if not (isinstance(value, Tensor) and value.numel() == 1):
                raise ValueError(
                    f"output is a function that gives {value!r:.60}; a refit needs a tensor of one "
                    "number, with a gradient"
                )
            return value.sum()

        return loss
    if output == "values":
        floor = _floor(original)
        flat = torch.cat([each[each > floor] for each in original]).double()
        scale = flat.square().mean().sqrt().item() or 1.0

        def loss(one: Tensor, other: Tensor) -> Tensor:
            one, other = _without_masked(one, other, floor)
            return ((other - one) / scale).square().mean()

        return loss
    return lambda one, other: (
        _kullback_leibler(one / temperature, other / temperature, output) / _rows(one, output)
    )


def relative_error(original: Outputs, outputs: Outputs) -> float:
    """||outputs - original||_F / ||original||_F, without what both leave out; 0 for equal ones."""
    original, outputs = _parts(original), _parts(outputs)
    floor = _floor(original)
    moved = norm = 0.0
    for one, other in zip(original, outputs, strict=True):
        one, other = (each.double() for each in _without_masked(one, other, floor))
        moved += (other - one).square().sum().item()
        norm += one.square().sum().item()
    return math.sqrt(moved / norm) if norm else math.inf if moved else 0.0


def predictions(outputs: Tensor, output: Output) -> Tensor:
    """The largest class of the last dimension, or for "binary" whether each logit is above 0."""
    return outputs > 0 if output == "binary" else outputs.argmax(dim=-1)


def _parts(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _rows(outputs: Tensor, output: str) -> int:
    """What a mean is over: samples and all that has a prediction in each."""
    return outputs.numel() // (outputs.shape[-1] if output == "classes" else 1)


def _kullback_leibler(original: Tensor, outputs: Tensor, output: str) -> Tensor:
    """Summed over all predictions."""
    masked = _masked(original, outputs, -math.inf)
    if output == "classes":
        one, other = original.log_softmax(dim=-1), outputs.log_softmax(dim=-1)
        if masked is not None:  # no probability in both
            one, other = one.masked_fill(masked, 0.0), other.masked_fill(masked, 0.0)
        return functional.kl_div(other, one, log_target=True, reduction="sum")
    one, other = _without_masked(original, outputs, -math.inf)
    return sum(
        (each.sigmoid() * (functional.logsigmoid(each) - functional.logsigmoid(new))).sum()
        for each, new in ((one, other), (-one, -other))
    )


def _floor(original: Sequence[Tensor]) -> float:
    """The highest value that stands for what is left out: -inf, or low numbers far from others.

    A mask that is added to the outputs is about as far spread as they are, but for its rounding.
    """
    flat = torch.cat([each.flatten() for each in original])
    low, rest = flat[flat <= _MASK], flat[flat > _MASK]
    finite = low[low > -math.inf]
    if not (finite.numel() and rest.numel()):
        return -math.inf
    highest = finite.max()
    far = rest.abs().max() * _FAR <= -highest
    spread = 10 * (rest.max() - rest.min()) + 1e-6 * highest.abs()
    return highest.item() if far and highest - finite.min() <= spread else -math.inf


def _masked(original: Tensor, outputs: Tensor, floor: float) -> Tensor | None:
    """Where both are left out, if anywhere."""
    if original.shape != outputs.shape:
        raise ValueError(
            f"the network's output has shape {tuple(outputs.shape)}, the original network's "
            f"{tuple(original.shape)}; they must be the same"
        )
    masked, also = original <= floor, outputs <= floor / 2
    if not torch.equal(masked, also):
        raise ValueError(
            "the network's output is masked (-inf, or a low number in its place) at other places "
            "than the original's, so that they can not be compared; take the mask out, or give a "
            "function as output"
        )
    return masked if masked.any() else None


def _without_masked(original: Tensor, outputs: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The same with 0 where both are left out."""
    masked = _masked(original, outputs, floor)
    if masked is None:
        return original, outputs
    return original.masked_fill(masked, 0.0), outputs.masked_fill(masked, 0.0)
