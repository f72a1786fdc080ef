"""The search for the smallest network that meets a goal, or for the best one within a budget."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from ddlr.allocate import frontier, layer_options
from ddlr.captured import CapturedLayers
from ddlr.goals import (
    Allocation,
    Goal,
    Option,
    SettledGoal,
    budget_of,
    check_refit_of,
    kept_weights,
    measure_of,
    output_error,
    settled,
)
from ddlr.measured_allocation import measured_frontier
from ddlr.method import Method
from ddlr.network_bound import output_bound
from ddlr.network_refit import NetworkRefit, refit_if_asked
from ddlr.outputs import Output, OutputError, divergence, network_outputs
from ddlr.result import CompressionResult, GoalReport
from ddlr.walk import Solved, WalkSettings, compress_layers

log = logging.getLogger(__name__)

# Of a budget: between these networks are tried out for it.
_LEAST, _MOST = 0.5, 1.1


def compress_to_goal(
    model: nn.Module,
    captured: CapturedLayers,
    method: Method,
    goal: Goal,
    settings: WalkSettings,
    *,
    output: Output | None = None,
    refit: NetworkRefit | None = None,
) -> CompressionResult:
    """Compress a network to a goal by any method, with a tolerance of its own for each layer.

    Each layer is compressed by itself at each of several tolerances, in parallel order, and what
    that alone does to the network's outputs on the calibration inputs is measured. From these
    curves come the allocations of tolerances to layers that no other beats, see
    `ddlr.allocate.frontier`; on these the goal is sought, by networks that are made and measured.

    Parameters
    ----------
    model, captured, method, settings
        As for `ddlr.walk.compress_layers`.
    goal : Goal
    output : {"classes", "binary", "values"} or callable, optional
        What the network's outputs are, see `ddlr.compress`.
    refit : NetworkRefit, optional
        Refits networks as a whole before they are measured, see `ddlr.refit_network`; whether
        layers are refitted by themselves is in `settings`.

    Returns
    -------
    CompressionResult
        Its `goal` says what was measured, and whether the goal is met.

    Raises
    ------
    ValueError, TypeError
        If outputs are not one tensor, or have values that are nan or infinite; -inf, as of masked
        classes, is left out. If held-out samples do not fit the network.
    """
    if refit is not None:
        check_refit_of(goal, output)
    solved: Solved = {}
    to_meet = settled(goal, model, captured, output)
    options = goal.options
    if options is None:
        options = layer_options(
            model,
            captured,
            method,
            settings,
            goal.tolerances,
            output=to_meet.output or "values",
            solved=solved,
        )
    networks = Networks(model, captured, method, settings, refit, to_meet.output, solved)
    allocations = goal.allocations or frontier(options, goal.adding)
    if goal.trials and goal.allocations is None:
        budget = budget_of(to_meet, captured)
        sizes = (0.0, math.inf) if budget is None else (_LEAST * budget, _MOST * budget)
        allocations = measured_allocations(
            networks, options, allocations, trials=goal.trials, sizes=sizes
        )
    return reach(to_meet, networks, allocations)


def measured_allocations(
    networks: "Networks",
    options: Mapping[str, Sequence[Option]],
    predicted: Sequence[Allocation],
    *,
    trials: int,
    sizes: tuple[float, float],
) -> list[Allocation]:
    """As `ddlr.measured_allocation.measured_frontier`, of networks compressed layer by layer."""
    original = network_outputs(networks.model, networks.captured.batches)

    def measure(tolerances: Mapping[str, float]) -> Allocation:
        result = networks.by_layer(tolerances)
        try:
            moved = network_outputs(result.model, networks.captured.batches)
            lost = divergence(original, moved, networks.output or "values")
        except OutputError as error:
            log.warning("a network is left out: %s", error)
            lost = math.inf
        return Allocation(kept_weights(result), lost, tolerances, measured=True)

    return measured_frontier(measure, predicted, options, trials=trials, sizes=sizes)


@dataclass(frozen=True)
class Networks:
    """Makes compressed networks, all by one method with one set of settings.

    `solved` is what is known of layers on the original network's activations, see
    `ddlr.walk.compress_layers`.
    """

    model: nn.Module
    captured: CapturedLayers
    method: Method
    settings: WalkSettings
    refit: NetworkRefit | None = None
    output: Output | None = None
    solved: Solved = field(default_factory=dict)

    def by_layer(self, tolerances: Mapping[str, float]) -> CompressionResult:
        """A network whose layers are compressed one by one."""
        return compress_layers(
            self.model, self.captured, self.method, tolerances, self.settings, solved=self.solved
        )

    def size(self, tolerances: Mapping[str, float]) -> int:
        """The weights of `by_layer`, where layers in cascade have the sizes of parallel order.

        But for what is dead in cascade alone. It takes no pass of the network then.
        """
        in_parallel = self.settings.in_parallel()
        return kept_weights(
            compress_layers(
                self.model, self.captured, self.method, tolerances, in_parallel, solved=self.solved
            )
        )

    def finished(self, result: CompressionResult) -> CompressionResult:
        """The same after the refit of all layers together, if there is to be one."""
        return refit_if_asked(
            self.model, result, self.captured, refit=self.refit, output=self.output
        )


def reach(
    goal: SettledGoal, networks: Networks, allocations: Sequence[Allocation]
) -> CompressionResult:
    """Find the smallest network on a frontier that meets a goal, or the best within a budget.

    A network is made at every allocation that is tried, and measured. For errors and accuracies
    the smallest is found by bisection, as if a larger network were never worse.

    Parameters
    ----------
    goal : SettledGoal
    networks : Networks
    allocations : sequence of Allocation
        As `ddlr.allocate.frontier` gives them.
    """
    captured = networks.captured
    original = network_outputs(networks.model, captured.batches)
    measure = measure_of(goal, networks.model, captured, original)
    trials = [_Trial(networks, measure, each) for each in allocations]
    budget = budget_of(goal, captured)
    # The network as it is comes after one that equals it, if that does not do.
    last = len(allocations) - 1
    equalled = last > 0 and allocations[last - 1].divergence <= allocations[last].divergence
    last -= equalled
    if budget is not None:
        index = _largest_within(trials[: last + 1], budget)
        while index and kept_weights(trials[index].by_layer) > budget:  # its size was foretold
            index -= 1
        if equalled and index == last and allocations[-1].parameters <= budget:
            index += 1
    else:
        low, index = -1, last
        while index - low > 1:
            middle = (low + index) // 2
            low, index = (low, middle) if trials[middle].meets else (middle, index)
        if equalled and index == last and not trials[index].meets:
            index += 1
    result, report = trials[index].final
    report = dataclasses.replace(
        report,
        tried=sum(trial.is_made for trial in trials),
        output_error=output_error(original, result, captured),
        output_bound=output_bound(networks.model, result, captured),
    )
    if not report.met:
        log.warning("%s=%g can not be met: %g at best", goal.name, goal.wanted, report.measured)
    return dataclasses.replace(result, goal=report)


class _Trial:
    """The network at one allocation, made and measured when first asked for."""

    def __init__(
        self,
        networks: Networks,
        measure: Callable[[CompressionResult], GoalReport],
        allocation: Allocation,
    ):
        self._networks, self._measure = networks, measure
        self.allocation = allocation
        self.is_made = False

    @cached_property
    def by_layer(self) -> CompressionResult:
        self.is_made = True
        return self._networks.by_layer(self.allocation.tolerances)

    @cached_property
    def final(self) -> tuple[CompressionResult, GoalReport]:
        result = self._networks.finished(self.by_layer)
        return result, self._measure(result)

    @cached_property
    def size(self) -> int:
        if self.allocation.measured:
            return self.allocation.parameters
        if self._networks.settings.keeps_sizes and not self.is_made:
            return self._networks.size(self.allocation.tolerances)
        return kept_weights(self.by_layer)

    @property
    def meets(self) -> bool:
        try:
            return self.final[1].met
        except OutputError as error:
            log.warning("a network is taken to miss its goal: %s", error)
            return False


def _largest_within(trials: Sequence[_Trial], budget: int) -> int:
    """The place of the largest allocation within a budget, by the size of the network it makes.

    Layers together may turn out larger than each alone, in cascade, or smaller, where one of them
    drops inputs. So the next to be tried is the allocation that would fit if these were off by the
    same factor as the one before it, between the largest known to fit and the smallest that does
    not; in turn with the middle of these, should the factor vary. 0 where none fits.
    """
    expected = [trial.allocation.parameters for trial in trials]
    within, above = -1, len(trials)
    factor, tries = 1.0, 0
    while above - within > 1:
        fitting = sum(factor * each <= budget for each in expected) - 1
        place = fitting if tries < 2 or tries % 2 else (within + above) // 2
        place = min(max(place, within + 1), above - 1)
        size = trials[place].size
        within, above = (place, above) if size <= budget else (within, place)
        factor, tries = size / max(expected[place], 1), tries + 1
    return max(within, 0)
