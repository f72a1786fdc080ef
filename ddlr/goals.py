"""Goals for a network: what is wanted of it, on which samples, and what it measures."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr.arguments import as_number, as_whole_number
from ddlr.capture import OutputError
from ddlr.held_out import Batches, HeldOut, checked_labels, read_held_out, settled_output
from ddlr.layerwise import CapturedLayers
from ddlr.outputs import (
    Output,
    check_output,
    check_outputs,
    check_trainable,
    network_outputs,
    outputs_by_batch,
    predictions,
    relative_error,
)
from ddlr.result import CompressionResult, GoalReport

GOALS = (
    "max_parameters",
    "kept_fraction",
    "max_output_error",
    "max_accuracy_drop",
    "min_agreement",
)
_OF_PREDICTIONS = ("max_accuracy_drop", "min_agreement")
_NORMAL_QUANTILE = 2.576  # of an interval that holds 99 %


@dataclass(frozen=True)
class Goal:
    """What a network is compressed to, as in `compress_to_goal`, and samples that measure it.

    Attributes
    ----------
    name : str
    wanted : float
    inputs : Tensor or tuple of Tensor, optional
        Held-out network inputs, or batches of them, for the goals on accuracy and agreement.
    labels : Tensor or tuple of Tensor, optional
        Their labels, for accuracy.
    output : {"classes", "binary", "values"} or callable, optional
        What the network's outputs are, see `compress_to_goal`.
    """

    name: str
    wanted: float
    inputs: Tensor | Batches | None = None
    labels: Tensor | Batches | None = None
    output: Output | None = None


def chosen_goal(
    goals: Mapping[str, float | None], held_out: HeldOut | None, output: Output | None = None
) -> Goal:
    """The one goal that is given, after a check of its value and of the samples it needs."""
    given = {name: wanted for name, wanted in goals.items() if wanted is not None}
    if len(given) != 1:
        raise ValueError(f"give one goal of {tuple(goals)}; given are {tuple(given)}")
    check_output(output)
    [(name, wanted)] = given.items()
    if name == "max_parameters":
        wanted = as_whole_number(wanted, name)
    else:
        highest = 1 if name in ("kept_fraction", "min_agreement") else math.inf
        wanted = as_number(wanted, name, highest=highest)
    if name not in _OF_PREDICTIONS:
        return Goal(name, wanted, output=output)
    if held_out is None:
        raise ValueError(f"{name} is measured on held-out samples; give them as held_out")
    inputs, labels = read_held_out(held_out)
    if name == "max_accuracy_drop" and labels is None:
        raise ValueError("max_accuracy_drop needs labels: held_out must be (inputs, labels)")
    return Goal(name, wanted, inputs, labels, output)


def check_refit_of(goal: Goal) -> None:
    """Raise a ValueError where neither a goal nor its output say what a refit trains towards."""
    if goal.name in ("max_parameters", "kept_fraction"):  # the others say it
        check_trainable(goal.output)


def settled(goal: Goal, model: nn.Module, captured: CapturedLayers) -> Goal:
    """The goal with its output, as far as that is given or certain, and its samples in batches.

    None is left for a budget alone.
    """
    output, inputs, labels = goal.output, goal.inputs, goal.labels
    calibrated = network_outputs(model, captured.batches)
    if goal.name == "max_output_error":
        output = output or "values"
    if goal.name in _OF_PREDICTIONS:
        if isinstance(inputs, Tensor):
            inputs, labels = read_held_out(inputs if labels is None else (inputs, labels))
        found = _held_out_outputs(model, inputs)
        if output in ("classes", "binary"):
            check_outputs(found, output)
        counted = labels if goal.name == "max_accuracy_drop" else None
        output = settled_output(output, found, counted, goal.name)
        _check_predictions([*found, *calibrated], [len(each) for each in inputs], output)
        if counted is not None:
            for some, each in zip(counted, found, strict=True):
                checked_labels(some, each, output)
    check_outputs(calibrated, output or "values")
    return dataclasses.replace(goal, inputs=inputs, labels=labels, output=output)


def _held_out_outputs(model: nn.Module, inputs: Batches) -> list[Tensor]:
    try:
        return outputs_by_batch(model, inputs)
    except OutputError as error:
        raise OutputError(f"on held_out, {error}") from error
    except Exception as error:
        raise ValueError(
            f"the network does not take held_out inputs of shape {tuple(inputs[0].shape)} and "
            f"{inputs[0].dtype}: {error}"
        ) from error


def _check_predictions(outputs: list[Tensor], samples: list[int], output: str) -> None:
    """That each sample has as many, and that not all of them are the same by their sign."""
    for each, number in zip(outputs, samples, strict=False):
        if len(each) % number:
            raise ValueError(
                f"the network's output has shape {tuple(each.shape)} for {number} samples; its "
                "first dimension must be that of the samples"
            )
    if output == "binary" and len({bool(some) for each in outputs for some in _signs(each)}) == 1:
        raise ValueError(
            'output is "binary", but the network\'s output is on one side of 0 throughout, so that '
            "its predictions are all the same; it must be logits"
        )


def _signs(outputs: Tensor) -> Tensor:
    return (outputs > 0).unique()


def kept_weights(result: CompressionResult) -> int:
    return sum(layer.parameters_kept for layer in result.layers)


def measure_of(
    goal: Goal, model: nn.Module, captured: CapturedLayers, original: tuple[Tensor, ...]
) -> Callable[[CompressionResult], GoalReport]:
    """A network's measured value of a goal, with an interval where it is of held-out samples."""

    def report(measured: float, met: bool, interval: tuple[float, float] | None = None):
        return GoalReport(goal.name, goal.wanted, measured, interval, met, 1)

    budget = budget_of(goal, captured)
    if budget is not None:

        def measure(result: CompressionResult) -> GoalReport:
            kept = kept_weights(result)
            share = kept / _dense_weights(captured) if goal.name == "kept_fraction" else kept
            return report(share, kept <= budget)

    elif goal.name == "max_output_error":

        def measure(result: CompressionResult) -> GoalReport:
            error = output_error(original, result, captured)
            return report(error, error <= goal.wanted)

    else:
        samples = [len(batch) for batch in goal.inputs]
        outputs = outputs_by_batch(model, goal.inputs)
        before = [predictions(each, goal.output) for each in outputs]
        labels = [None] * len(outputs)
        if goal.name == "max_accuracy_drop":
            labels = [
                checked_labels(some, each, goal.output)
                for some, each in zip(goal.labels, outputs, strict=True)
            ]

        def measure(result: CompressionResult) -> GoalReport:
            outputs = outputs_by_batch(result.model, goal.inputs)
            after = [predictions(each, goal.output) for each in outputs]
            if goal.name == "min_agreement":
                same = [one == other for one, other in zip(before, after, strict=True)]
                agreement, _ = _mean_and_samples(same, samples)
                interval = _wilson_interval(agreement, sum(samples))
                return report(agreement, agreement >= goal.wanted, interval)
            drop, lost = _mean_and_samples(
                [
                    100 * ((one == label).double() - (other == label).double())
                    for one, other, label in zip(before, after, labels, strict=True)
                ],
                samples,
            )
            # Of the difference of two such means, hence the 2: other samples scatter, too.
            # With two more losses and gains it is sensible also where few samples changed.
            spread = torch.cat([lost, lost.new_tensor([100.0, 100.0, -100.0, -100.0])]).std().item()
            margin = _NORMAL_QUANTILE * spread * math.sqrt(2 / len(lost))
            return report(drop, drop <= goal.wanted, (drop - margin, drop + margin))

    return measure


def _mean_and_samples(
    of_predictions: Sequence[Tensor], samples: Sequence[int]
) -> tuple[float, Tensor]:
    """The mean over all predictions of all batches, and what each sample adds to it.

    A sample may have several, as of its tokens. These are not drawn one by one, so it is samples
    that an interval counts.
    """
    count = sum(each.numel() for each in of_predictions)
    total = sum(each.double().sum().item() for each in of_predictions)
    share = sum(samples) / count
    by_sample = [
        share * each.double().reshape(number, -1).sum(dim=1)
        for each, number in zip(of_predictions, samples, strict=True)
    ]
    return total / count, torch.cat(by_sample)


def output_error(
    original: tuple[Tensor, ...], result: CompressionResult, captured: CapturedLayers
) -> float:
    return relative_error(original, network_outputs(result.model, captured.batches))


def budget_of(goal: Goal, captured: CapturedLayers) -> int | None:
    """The weights that a goal allows, if it is one of size."""
    if goal.name == "kept_fraction":
        return math.floor(goal.wanted * _dense_weights(captured))
    return math.floor(goal.wanted) if goal.name == "max_parameters" else None


def _dense_weights(captured: CapturedLayers) -> int:
    return sum(layer.weight.numel() for layer in captured.layers)


def _wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """Of the share that as many other samples would show; sensible also where it is 0 or 1.

    The interval of Wilson (1927) with half the samples, since the others scatter, too.
    """
    samples = samples / 2
    square = _NORMAL_QUANTILE**2
    middle = (share + square / (2 * samples)) / (1 + square / samples)
    spread = share * (1 - share) / samples + square / (4 * samples**2)
    margin = _NORMAL_QUANTILE * math.sqrt(spread) / (1 + square / samples)
    return middle - margin, middle + margin
