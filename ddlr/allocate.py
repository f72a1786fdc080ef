"""From what each layer loses at each size to a network of a given size, error or accuracy.

Works for every method of `ddlr.layerwise.compress_layers`, since all that is allocated is one
relative tolerance a layer.
"""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddlr.layerwise import CapturedLayers, replace_layer
from ddlr.result import CompressionResult, GoalReport

log = logging.getLogger(__name__)

# Those a layer is tried at, besides being left as it is: a factor of 1.2 apart.
TOLERANCES = tuple(round(0.03 * 1.2**step, 4) for step in range(20))
GOALS = (
    "max_parameters",
    "kept_fraction",
    "max_output_error",
    "max_accuracy_drop",
    "min_agreement",
)
_NORMAL_QUANTILE = 2.576  # of an interval that holds 99 %
_FRONTIER_AT_MOST = 4096
_BATCH = 1000

Compress = Callable[..., CompressionResult]


@dataclass(frozen=True)
class Option:
    """A layer at one tolerance: the weights it keeps, and what that alone does to the network."""

    tolerance: float
    parameters: int
    effect: float


@dataclass(frozen=True)
class Allocation:
    """A tolerance for each layer, with the sums of the weights and of the effects."""

    parameters: int
    effect: float
    tolerances: Mapping[str, float]


@dataclass(frozen=True)
class Goal:
    """What a network is compressed to: one of `GOALS`, its value, and samples that measure it.

    Attributes
    ----------
    name : str
    wanted : float
    inputs : Tensor, optional
        Held-out network inputs, for the goals on accuracy and agreement.
    labels : Tensor, optional
        Their classes, for accuracy.
    """

    name: str
    wanted: float
    inputs: Tensor | None = None
    labels: Tensor | None = None


def frontier(options: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """Allocations that no other beats in both size and effect, the smallest first.

    As if the effects of layers added up. Layers are joined one by one, and what is beaten is left
    out at once, so this is exact; beyond 4096 allocations it is thinned out.
    """
    joined = [Allocation(0, 0.0, {})]
    for name, choices in options.items():
        joined = _unbeaten(
            [
                Allocation(
                    each.parameters + option.parameters,
                    each.effect + option.effect,
                    {**each.tolerances, name: option.tolerance},
                )
                for each in joined
                for option in choices
            ]
        )
    return joined


def _unbeaten(allocations: list[Allocation]) -> list[Allocation]:
    kept: list[Allocation] = []
    for each in sorted(allocations, key=lambda one: (one.parameters, one.effect)):
        if not kept or each.effect < kept[-1].effect:
            kept.append(each)
    if len(kept) <= _FRONTIER_AT_MOST:
        return kept
    step = (len(kept) - 1) / (_FRONTIER_AT_MOST - 1)
    return [kept[round(step * index)] for index in range(_FRONTIER_AT_MOST)]


@torch.no_grad()
def layer_options(
    compress: Compress,
    model: nn.Module,
    captured: CapturedLayers,
    tolerances: Sequence[float] = TOLERANCES,
) -> dict[str, list[Option]]:
    """Compress each layer by itself at each tolerance, and measure what the network's outputs lose.

    The effect is the mean Kullback-Leibler divergence of the classes' probabilities on the
    calibration inputs, outputs being logits.

    Parameters
    ----------
    compress : callable
        (model, captured, relative_tolerance) to a `CompressionResult`, in parallel order.
    model : nn.Module
    captured : CapturedLayers
    tolerances : sequence of float
    """
    original = outputs_of(model, captured.batches)
    options = {layer.name: [Option(0.0, layer.weight.numel(), 0.0)] for layer in captured.layers}
    for tolerance in tolerances:
        result = compress(model, captured, relative_tolerance=tolerance)
        for report in result.layers:
            if report.parameters_kept >= options[report.name][-1].parameters:
                continue
            alone = copy.deepcopy(model)
            layer = result.model.get_submodule(report.name)
            alone = replace_layer(alone, report.name, layer)
            effect = divergence(original, outputs_of(alone, captured.batches))
            options[report.name].append(Option(tolerance, report.parameters_kept, effect))
    return options


def reach(
    goal: Goal,
    compress: Compress,
    model: nn.Module,
    captured: CapturedLayers,
    allocations: Sequence[Allocation],
) -> CompressionResult:
    """Find the smallest network on a frontier that meets a goal, or the best within a budget.

    A network is made at every allocation that is tried, and measured. For errors and accuracies
    these are found by bisection, as if a larger network were never worse.

    Parameters
    ----------
    goal : Goal
    compress : callable
        (model, captured, relative_tolerance) to a `CompressionResult`, in any order.
    allocations : sequence of Allocation
        As `frontier` gives them.
    """
    tried: dict[int, tuple[CompressionResult, GoalReport]] = {}
    measure = _measure(goal, model, captured)

    def met(index: int) -> bool:
        if index not in tried:
            result = compress(model, captured, relative_tolerance=allocations[index].tolerances)
            tried[index] = result, measure(result)
        return tried[index][1].met

    if goal.name == "max_parameters":
        # In cascade the sizes are not quite those that were allocated.
        index = max(
            (i for i, each in enumerate(allocations) if each.parameters <= goal.wanted), default=0
        )
        while not met(index) and index > 0:
            index -= 1
    else:
        low, index = -1, len(allocations) - 1
        met(index)  # the largest: nothing is compressed
        while index - low > 1:
            middle = (low + index) // 2
            low, index = (low, middle) if met(middle) else (middle, index)
    result, report = tried[index]
    report = dataclasses.replace(report, tried=len(tried))
    if not report.met:
        log.warning("%s=%g can not be met: %g at best", goal.name, goal.wanted, report.measured)
    return dataclasses.replace(result, goal=report)


def _measure(
    goal: Goal, model: nn.Module, captured: CapturedLayers
) -> Callable[[CompressionResult], GoalReport]:
    """A network's measured value of a goal, with an interval where it is of held-out samples."""

    def report(measured: float, met: bool, interval: tuple[float, float] | None = None):
        return GoalReport(goal.name, goal.wanted, measured, interval, met, 1)

    if goal.name == "max_parameters":

        def measure(result: CompressionResult) -> GoalReport:
            kept = sum(layer.parameters_kept for layer in result.layers)
            return report(kept, kept <= goal.wanted)

    elif goal.name == "max_output_error":
        wanted = outputs_of(model, captured.batches)

        def measure(result: CompressionResult) -> GoalReport:
            moved = outputs_of(result.model, captured.batches) - wanted
            error = (moved.norm() / wanted.norm()).item()
            return report(error, error <= goal.wanted)

    else:
        batches = goal.inputs.split(_BATCH)
        before = outputs_of(model, batches).argmax(dim=1)
        labels = None if goal.labels is None else goal.labels.to(before.device)

        def measure(result: CompressionResult) -> GoalReport:
            after = outputs_of(result.model, batches).argmax(dim=1)
            if goal.name == "min_agreement":
                agreement = (after == before).double().mean().item()
                interval = _wilson_interval(agreement, len(after))
                return report(agreement, agreement >= goal.wanted, interval)
            lost = 100 * ((before == labels).double() - (after == labels).double())
            drop = lost.mean().item()
            margin = _NORMAL_QUANTILE * lost.std().item() / math.sqrt(len(lost))
            return report(drop, drop <= goal.wanted, (drop - margin, drop + margin))

    return measure


def _wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """Of a proportion (Wilson 1927); sensible also where the share is 0 or 1."""
    square = _NORMAL_QUANTILE**2
    middle = (share + square / (2 * samples)) / (1 + square / samples)
    spread = share * (1 - share) / samples + square / (4 * samples**2)
    margin = _NORMAL_QUANTILE * math.sqrt(spread) / (1 + square / samples)
    return middle - margin, middle + margin


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Outputs of a network in evaluation mode, all batches in one."""
    mode = model.training
    model.eval()
    device = next(model.parameters()).device
    outputs = torch.cat([model(batch.to(device)) for batch in batches])
    model.train(mode)
    return outputs.flatten(1).float()


def divergence(original: Tensor, outputs: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the probabilities that two sets of logits stand for."""
    return functional.kl_div(
        outputs.log_softmax(dim=1),
        original.log_softmax(dim=1),
        log_target=True,
        reduction="batchmean",
    ).item()
