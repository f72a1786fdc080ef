"""Goals for a network: what is wanted of it, on which samples, and what it measures."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from ddlr.arguments import as_number, as_whole_number, one_of
from ddlr.calls import Batch, check_call, tensors_in
from ddlr.captured import CapturedLayers
from ddlr.held_out import HeldOut, Labels, checked_labels, read_held_out, settled_output
from ddlr.outputs import (
    Output,
    OutputError,
    check_output,
    check_outputs,
    check_trainable,
    network_outputs,
    outputs_by_batch,
    predictions,
    relative_error,
)
from ddlr.result import CompressionResult, GoalReport

# Those a layer is tried at, besides being left as it is: a factor of 1.2 apart.
TOLERANCES = tuple(round(0.03 * 1.2**step, 4) for step in range(20))
# What of the layers' divergences is taken to add up, see `ddlr.allocate.frontier`.
ADDING = ("divergences", "roots")
ON_HELD_OUT = ("max_accuracy_drop", "min_agreement")
_NORMAL_QUANTILE = 2.576  # of an interval that holds 99 %


@dataclass(frozen=True)
class Allocation:
    """A tolerance for each layer, with the sums of the weights and of the divergences.

    `measured` says that both are those of the network that was made with these tolerances.
    """

    parameters: int
    divergence: float
    tolerances: Mapping[str, float]
    measured: bool = False


@dataclass(frozen=True)
class Option:
    """A layer at one tolerance: the weights that it keeps, and what that does to the network.

    Attributes
    ----------
    tolerance : float
    parameters : int
        Weights of the layer.
    divergence : float
        How far the network's outputs move, where this layer alone is compressed.
    inputs_dropped : int
        Inputs for which the layer has no weights.
    parameters_per_output : int
        Weights that the layer loses for each of its outputs that the next layer drops; 0 where a
        method does not free a layer from these.
    """

    tolerance: float
    parameters: int
    divergence: float
    inputs_dropped: int = 0
    parameters_per_output: int = 0


def _goal():
    return field(default=None, metadata={"goal": True})


@dataclass(frozen=True)
class Goal:
    """What a network is to be compressed to, in place of one tolerance for all layers.

        ddlr.compress(model, calibration, kept_fraction=0.1)
        ddlr.compress(model, calibration, max_accuracy_drop=1, held_out=(inputs, labels))

    Its attributes are keyword arguments of `ddlr.compress` and `nettrim.prune`. Each layer gets a
    tolerance of its own. Just one of the first five is given.

    Attributes
    ----------
    max_parameters : int
        The best network with at most so many weights in the layers that are compressed.
    kept_fraction : float
        The same, as a share of the weights that these layers had.
    max_output_error : float
        The smallest network with at most this ||outputs - original||_F / ||original||_F on the
        calibration inputs.
    max_accuracy_drop : float
        The smallest network that loses at most so many points of accuracy, in per cent, on
        labelled held-out samples.
    min_agreement : float
        The smallest network that predicts the same on at least this share of held-out samples,
        between 0 and 1; they need no labels.
    held_out : Tensor, (Tensor, Tensor), or iterable of either
        For the last two: network inputs, and their labels, that are not among those of the
        calibration; or batches of them, such as a DataLoader's.
    tolerances : sequence of float
        Those that each layer is tried at.
    options : mapping of layer name to sequence of Option, optional
        What `ddlr.allocate.layer_options` measured for each layer, where it is known already.
    adding : {"divergences", "roots"}
        What is taken to add up over layers: what each alone does to the outputs, or the roots of
        this. See `ddlr.allocate.frontier`.
    trials : int
        How many networks are made to find better allocations of tolerances to layers than the
        curves of single layers add up to, see `ddlr.measured_allocation`. Each costs as much as
        the network that is returned. 0 for none.
    allocations : sequence of Allocation, optional
        What `measured_frontier` found, where it is known already.

    Raises
    ------
    ValueError
        If not just one goal is given, it is not usable, or `held_out` is missing or of no use;
        names it.
    """

    max_parameters: int | None = _goal()
    kept_fraction: float | None = _goal()
    max_output_error: float | None = _goal()
    max_accuracy_drop: float | None = _goal()
    min_agreement: float | None = _goal()
    held_out: HeldOut | None = field(default=None, repr=False)
    tolerances: Sequence[float] = TOLERANCES
    options: Mapping[str, Sequence[Option]] | None = field(default=None, repr=False)
    adding: str = "divergences"
    trials: int = 0
    allocations: Sequence[Allocation] | None = field(default=None, repr=False)

    def __post_init__(self):
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one goal of {GOALS}; given are {tuple(given)}")
        _ = self.wanted  # checks it
        if self.on_held_out and self.held_out is None:
            raise ValueError(f"{self.name} is measured on held-out samples; give them as held_out")
        if self.held_out is not None and not self.on_held_out:
            raise ValueError(f"held_out is for {' and '.join(ON_HELD_OUT)}, not for {self.name}")
        object.__setattr__(self, "tolerances", as_tolerances(self.tolerances))
        one_of(self.adding, "adding", ADDING)
        object.__setattr__(self, "trials", as_whole_number(self.trials, "trials"))

    @property
    def name(self) -> str:
        return next(name for name in GOALS if getattr(self, name) is not None)

    @property
    def wanted(self) -> float:
        """The value of the goal, as Python has it."""
        value = getattr(self, self.name)
        if self.name == "max_parameters":
            return as_whole_number(value, self.name)
        highest = 1 if self.name in ("kept_fraction", "min_agreement") else math.inf
        return as_number(value, self.name, highest=highest)

    @property
    def on_held_out(self) -> bool:
        return self.name in ON_HELD_OUT


# Names of the goals, listed in `Goal` alone.
GOALS = tuple(each.name for each in fields(Goal) if each.metadata.get("goal"))


def goal_of(values: Mapping[str, object]) -> Goal | None:
    """The goal that further keyword arguments of a function make, or None where there are none.

    Raises
    ------
    TypeError
        If one of them is not of a `Goal`; names it.
    """
    known = [each.name for each in fields(Goal)]
    for name in values:
        if name not in known:
            raise TypeError(
                f"there is no argument {name!r}; beside those of the function itself there are "
                f"those of ddlr.Goal: {', '.join(known)}"
            )
    given = {name: value for name, value in values.items() if value is not None}
    return Goal(**given) if given else None


def as_tolerances(tolerances: Iterable[float]) -> tuple[float, ...]:
    """Tolerances that layers are tried at, as numbers of Python; there must be one at least."""
    numbers = tuple(as_number(each, "tolerances") for each in tolerances)
    if not numbers:
        raise ValueError("tolerances is empty; it must have one number at least")
    return numbers


@dataclass(frozen=True)
class SettledGoal:
    """A goal with all that measures it: the meaning of outputs, and held-out samples in batches."""

    name: str
    wanted: float
    inputs: tuple[Batch, ...] | None = None
    labels: Labels | None = None
    output: Output | None = None


def check_refit_of(goal: Goal, output: Output | None) -> None:
    """Raise a ValueError where neither a goal nor its output say what a refit trains towards."""
    if goal.name in ("max_parameters", "kept_fraction"):  # the others say it
        check_trainable(output)


def settled(
    goal: Goal, model: nn.Module, captured: CapturedLayers, output: Output | None
) -> SettledGoal:
    """The goal with its output, as far as that is given or certain, and its samples in batches.

    An output of None is left for a budget alone.
    """
    check_output(output)
    inputs = labels = None
    calibrated = network_outputs(model, captured.batches)
    if goal.name == "max_output_error":
        output = output or "values"
    if goal.on_held_out:
        inputs, labels = read_held_out(goal.held_out, captured.batches[0].forward)
        check_call(model, inputs, "held_out")
        if goal.name == "max_accuracy_drop" and labels is None:
            raise ValueError("max_accuracy_drop needs labels: held_out must be (inputs, labels)")
        held_out = _held_out_outputs(model, inputs)
        if output in ("classes", "binary"):
            check_outputs(held_out, output)
        counted = labels if goal.name == "max_accuracy_drop" else None
        output = settled_output(output, held_out, counted, goal.name)
        _check_predictions([*held_out, *calibrated], [len(each) for each in inputs], output)
        if counted is not None:
            for some, each in zip(counted, held_out, strict=True):
                checked_labels(some, each, output)
    check_outputs(calibrated, output or "values")
    return SettledGoal(goal.name, goal.wanted, inputs, labels, output)


def _held_out_outputs(model: nn.Module, inputs: Sequence[Batch]) -> list[Tensor]:
    try:
        return outputs_by_batch(model, inputs)
    except OutputError as error:
        raise OutputError(f"on held_out, {error}") from error
    except Exception as error:
        shapes = [f"{tuple(each.shape)} and {each.dtype}" for each in tensors_in(inputs[0].values)]
        raise ValueError(
            f"the network does not take held_out inputs of shape {', '.join(shapes)}: {error}"
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
    goal: SettledGoal, model: nn.Module, captured: CapturedLayers, original: tuple[Tensor, ...]
) -> Callable[[CompressionResult], GoalReport]:
    """A network's measured value of a goal, with an interval where it is of held-out samples."""

    def report(measured: float, met: bool, interval: tuple[float, float] | None = None):
        return GoalReport(goal.name, goal.wanted, measured, interval, met, 1)

    budget = budget_of(goal, captured)
    if budget is not None:

        def measure(result: CompressionResult) -> GoalReport:
            kept = kept_weights(result)
            share = kept / captured.weights if goal.name == "kept_fraction" else kept
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
            # The 2 is for the difference of two such means: other samples scatter, too.
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


def budget_of(goal: SettledGoal, captured: CapturedLayers) -> int | None:
    """The weights that a goal allows, if it is one of size."""
    if goal.name == "kept_fraction":
        return math.floor(goal.wanted * captured.weights)
    return math.floor(goal.wanted) if goal.name == "max_parameters" else None


def _wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """An interval for the share that as many other samples would show, also where it is 0 or 1.

    The interval of Wilson (1927) with half the samples, since the others scatter, too.
    """
    samples = samples / 2
    square = _NORMAL_QUANTILE**2
    middle = (share + square / (2 * samples)) / (1 + square / samples)
    spread = share * (1 - share) / samples + square / (4 * samples**2)
    margin = _NORMAL_QUANTILE * math.sqrt(spread) / (1 + square / samples)
    return middle - margin, middle + margin
