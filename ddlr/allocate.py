"""From what each layer loses at each size to a network of a given size, error or accuracy.

Works for every method of `ddlr.layerwise.compress_layers`, since all that is allocated is one
relative tolerance a layer.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr.arguments import as_number
from ddlr.capture import OutputError
from ddlr.goals import (
    Goal,
    budget_of,
    check_refit_of,
    chosen_goal,
    kept_weights,
    measure_of,
    output_error,
    settled,
)
from ddlr.held_out import HeldOut
from ddlr.layerwise import (
    CapturedLayers,
    LayerProblem,
    capture_layers,
    is_all_that_reads,
)
from ddlr.network_bound import output_bound
from ddlr.network_refit import refit_result
from ddlr.outputs import Output, check_outputs, divergence, network_outputs
from ddlr.result import CompressionResult, GoalReport

log = logging.getLogger(__name__)

# Those a layer is tried at, besides being left as it is: a factor of 1.2 apart.
TOLERANCES = tuple(round(0.03 * 1.2**step, 4) for step in range(20))
_FRONTIER_AT_MOST = 4096

Compress = Callable[..., CompressionResult]


@dataclass(frozen=True)
class Option:
    """A layer at one tolerance: the weights it keeps, and what that alone does to the network.

    Where a method drops outputs that the next layer does not read, it has `unread` inputs, and
    keeps fewer weights `an_output` that the next layer leaves unread.
    """

    tolerance: float
    parameters: int
    effect: float
    unread: int = 0
    an_output: int = 0


@dataclass(frozen=True)
class Allocation:
    """A tolerance for each layer, with the sums of the weights and of the effects."""

    parameters: int
    effect: float
    tolerances: Mapping[str, float]


def compress_to_goal(
    compress: Compress,
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor] | CapturedLayers,
    *,
    max_parameters: int | None = None,
    kept_fraction: float | None = None,
    max_output_error: float | None = None,
    max_accuracy_drop: float | None = None,
    min_agreement: float | None = None,
    held_out: HeldOut | None = None,
    output: Output | None = None,
    order: str = "parallel",
    tolerances: Sequence[float] = TOLERANCES,
    options: Mapping[str, Sequence[Option]] | None = None,
    refit_network: bool = False,
) -> CompressionResult:
    """Compress a network to a goal, by any method that takes a relative tolerance for each layer.

        prune = functools.partial(nettrim.prune, refit="layer")
        ddlr.compress_to_goal(prune, model, calibration, kept_fraction=0.1, order="cascade")

    Each layer is compressed by itself at each of several tolerances, in parallel order, and what
    that alone does to the network's outputs on the calibration inputs is measured. From these
    curves come the allocations of tolerances to layers that no other beats, see `frontier`; on
    these the goal is sought, by networks that are made and measured.

    Parameters
    ----------
    compress : callable
        As `ddlr.compress`: (model, captured layers, relative_tolerance=) to a result.
    model, calibration
        As for `ddlr.compress`.
    max_parameters, kept_fraction : the best network with at most so many weights
        In its layers that are compressed; as a number, or as a share of theirs.
    max_output_error : the smallest network with at most this error
        ||outputs - original outputs||_F / ||original outputs||_F on the calibration inputs.
    max_accuracy_drop : the smallest network that loses at most so many points
        Of accuracy, in per cent, on labelled held-out samples.
    min_agreement : the smallest network that predicts the same on at least this share
        Of held-out samples, between 0 and 1; they need no labels.
    held_out : Tensor, (Tensor, Tensor), or iterable of either
        For the last two goals: network inputs, and their labels, that are not among those of
        `calibration`; or batches of them, such as a DataLoader's.
    output : {"classes", "binary", "values"} or callable, optional
        What the network's outputs are. "classes": logits along the last dimension, of which the
        largest is the prediction. "binary": logits, each of which is a prediction by itself, 1
        above 0, with labels 0 and 1. "values": real numbers. Or a function of the original and the
        new outputs, two tensors: one number that is 0 for equal outputs and larger the more they
        differ. It decides what a layer is worth, see `ddlr.outputs.divergence`, what a prediction
        is, and what a refit of the network trains towards. Unless it is given, layers are weighed
        by "values" for the first three goals, and the last two take (samples, classes) for
        "classes", or what labels of the same leading dimensions show; whatever is less certain is
        refused.
    order : {"parallel", "cascade"}
        Of the networks that are made; where it is "cascade", `compress` is called with it.
    tolerances : sequence of float
        Those a layer is tried at.
    options : mapping, optional
        What `layer_options` found for each layer, where it is known already.
    refit_network : bool
        Whether networks are refitted as a whole before they are measured, see
        `ddlr.refit_network`.

    Returns
    -------
    CompressionResult
        Its `goal` says what was measured, and whether the goal is met.

    Raises
    ------
    ValueError, TypeError
        If not exactly one goal is given, or one is not usable; names it. If outputs are not one
        tensor, or have values that are nan or infinite; -inf, as of masked classes, is left out.
    """
    goal = chosen_goal(
        {
            "max_parameters": max_parameters,
            "kept_fraction": kept_fraction,
            "max_output_error": max_output_error,
            "max_accuracy_drop": max_accuracy_drop,
            "min_agreement": min_agreement,
        },
        held_out,
        output,
    )
    if refit_network:
        check_refit_of(goal)
    if not isinstance(calibration, CapturedLayers):
        calibration = capture_layers(model, calibration)
    goal = settled(goal, model, calibration)
    if options is None:
        options = layer_options(
            compress, model, calibration, tolerances, output=goal.output or "values"
        )
    if order != "parallel":
        compress = functools.partial(compress, order=order)
    return reach(goal, compress, model, calibration, frontier(options), refit_network)


def frontier(options: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """Allocations that no other beats in both size and effect, the smallest first.

    As if the effects of layers added up. Layers are joined one by one, and what is beaten by others
    with the same option of the layer joined last is left out at once, so this is exact; beyond 4096
    allocations it is thinned out. The network as it is, each tolerance being 0, comes last, also
    where a smaller one equals it on the calibration inputs.
    """
    last = [Option(0.0, 0, 0.0)]
    joined = [[Allocation(0, 0.0, {})]]
    for name, choices in options.items():
        joined = [
            _unbeaten(
                [
                    Allocation(
                        each.parameters + option.parameters - before.an_output * option.unread,
                        each.effect + option.effect,
                        {**each.tolerances, name: option.tolerance},
                    )
                    for before, allocations in zip(last, joined, strict=True)
                    for each in allocations
                ]
            )
            for option in choices
        ]
        last = choices
    found = _unbeaten([each for allocations in joined for each in allocations])
    untouched = [choices[0] for choices in options.values()]
    if any(found[-1].tolerances.values()) and not any(
        option.tolerance or option.effect for option in untouched
    ):
        # Equalled by a smaller one, or beaten by rounding.
        size = sum(option.parameters for option in untouched)
        found = found[: _FRONTIER_AT_MOST - 1]
        found.append(Allocation(size, 0.0, dict.fromkeys(options, 0.0)))
    return found


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
    *,
    output: Output = "values",
) -> dict[str, list[Option]]:
    """Compress each layer by itself at each tolerance, and measure what the network's outputs lose.

    The effect is the divergence of the outputs on the calibration inputs from the original ones,
    see `ddlr.outputs.divergence`. A tolerance at which they are not finite is left out.

    Parameters
    ----------
    compress : callable
        (model, captured, relative_tolerance) to a `CompressionResult`, in parallel order.
    model : nn.Module
    captured : CapturedLayers
    tolerances : sequence of float
    output : {"classes", "binary", "values"} or callable
        What the network's outputs are.
    """
    tolerances = sorted(as_number(each, "tolerances") for each in tolerances)
    original = network_outputs(model, captured.batches)
    check_outputs(original, output)
    options = {}
    layers = captured.layers
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        inputs, outputs = int(layer.live_in.sum()), int(layer.live_out.sum())
        found = [Option(0.0, layer.weight.numel(), 0.0, an_output=inputs)]
        drops = False
        for tolerance in tolerances:
            alone = CapturedLayers((layer,), captured.batches)
            result = compress(model, alone, relative_tolerance=tolerance)
            [report] = result.layers
            drops = result.drops_unused
            if report.parameters_kept >= found[-1].parameters:
                continue
            try:
                moved = network_outputs(result.model, captured.batches)
                effect = divergence(original, moved, output)
            except OutputError as error:
                log.warning("layer %r at a tolerance of %g: %s", layer.name, tolerance, error)
                continue
            low_rank = report.form == "low_rank"
            found.append(
                Option(
                    *(tolerance, report.parameters_kept, effect),
                    unread=report.inputs_dropped,
                    an_output=report.rank if low_rank else report.parameters_kept // outputs,
                )
            )
        if not (
            drops and following and is_all_that_reads(model, following, layer, captured.batches)
        ):
            found = [dataclasses.replace(option, an_output=0) for option in found]
        options[layer.name] = found
    return options


def reach(
    goal: Goal,
    compress: Compress,
    model: nn.Module,
    captured: CapturedLayers,
    allocations: Sequence[Allocation],
    refit_network: bool = False,
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
    refit_network : bool
    """
    if refit_network:
        check_refit_of(goal)
    goal = settled(goal, model, captured)
    made: dict[int, CompressionResult] = {}
    measured: dict[int, tuple[CompressionResult, GoalReport]] = {}
    original = network_outputs(model, captured.batches)
    measure = measure_of(goal, model, captured, original)

    def make(index: int) -> CompressionResult:
        if index not in made:
            made[index] = compress(
                model, captured, relative_tolerance=allocations[index].tolerances
            )
        return made[index]

    def final(index: int) -> tuple[CompressionResult, GoalReport]:
        if index not in measured:
            result = make(index)
            if refit_network:
                result = refit_result(model, result, captured, output=goal.output)
            measured[index] = result, measure(result)
        return measured[index]

    def meets(index: int) -> bool:
        try:
            return final(index)[1].met
        except OutputError as error:
            log.warning("a network is taken to miss %s: %s", goal.name, error)
            return False

    budget = budget_of(goal, captured)
    # The network as it is comes after one that equals it, if that does not do.
    last = len(allocations) - 1
    equalled = last > 0 and allocations[last - 1].effect <= allocations[last].effect
    last -= equalled
    if budget is not None:
        index = _largest_within(
            lambda index: kept_weights(make(index)), allocations[: last + 1], budget
        )
        if equalled and index == last and allocations[-1].parameters <= budget:
            index += 1
    else:
        low, index = -1, last
        while index - low > 1:
            middle = (low + index) // 2
            low, index = (low, middle) if meets(middle) else (middle, index)
        if equalled and index == last and not meets(index):
            index += 1
    result, report = final(index)
    report = dataclasses.replace(
        report,
        tried=len(made),
        output_error=output_error(original, result, captured),
        output_bound=output_bound(model, result, captured),
    )
    if not report.met:
        log.warning("%s=%g can not be met: %g at best", goal.name, goal.wanted, report.measured)
    return dataclasses.replace(result, goal=report)


def _largest_within(
    size_at: Callable[[int], int], allocations: Sequence[Allocation], budget: int
) -> int:
    """The place of the largest allocation within a budget, by the size of the network it makes.

    Layers together may turn out larger than each alone, in cascade, or smaller, where one of them
    drops inputs. So the next to be tried is the allocation that would fit if these were off by the
    same factor as the one before it, between the largest known to fit and the smallest that does
    not; in turn with the middle of these, should the factor vary. 0 where none fits.
    """
    within, above = -1, len(allocations)
    factor, tries = 1.0, 0
    while above - within > 1:
        fitting = sum(factor * each.parameters <= budget for each in allocations) - 1
        place = fitting if tries < 2 or tries % 2 else (within + above) // 2
        place = min(max(place, within + 1), above - 1)
        size = size_at(place)
        within, above = (place, above) if size <= budget else (within, place)
        factor, tries = size / max(allocations[place].parameters, 1), tries + 1
    return max(within, 0)


def remember_layers(captured: CapturedLayers) -> Callable:
    """A memory for `ddlr.layerwise.LayerSolver`, of solves on the original network's activations.

    Those on the inputs that compressed layers give are not kept: they do not come again.
    """
    known = {id(layer.live_inputs) for layer in captured.layers}
    kept = {}

    def memory(compute: Callable, *arguments, **options):
        if isinstance(arguments[1], LayerProblem):
            inputs, targets, radius = (
                getattr(arguments[1], name) for name in ("inputs", "targets", "radius")
            )
        else:
            inputs, targets, radius = arguments
        # A layer's targets may be those of some outputs only.
        key = (compute, id(inputs), radius, targets.shape, targets.sum().item())
        if id(inputs) not in known:
            return compute(*arguments, **options)
        if key not in kept:
            kept[key] = compute(*arguments, **options)
        return kept[key]

    return memory
