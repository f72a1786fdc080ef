"""Fits of a weight with a given number of nonzeros: where these are, and what they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs, row_blocks
from ddlr.problem import WarmStart
from ddlr.quadratic import OutputQuadratic
from ddlr.reduced_rank import MajorisedFit
from ddlr.result import SolverResult
from nettrim.budgets import RESOLUTION, log_ratio, next_size
from nettrim.support import SupportRegression, SupportSearch

_SUPPORTS = 1  # for each number of nonzeros, in the search for the fewest
_STEPS_PER_SUPPORT = 6
_SETTLED = 1e-3  # of the loss: a support that brings less is the last
_SWING = 1.4


def on_inputs(inputs: CentredInputs, kept: Tensor) -> CentredInputs:
    """Some of the inputs, given by their indices; with what is known of them if these are all."""
    if len(kept) == inputs.inputs.shape[1]:
        return inputs
    return CentredInputs(inputs.inputs[:, kept])


@dataclass(frozen=True)
class SparseProblem:
    """What all fits of one layer share; the ridge counts from the weight of `start`."""

    inputs: CentredInputs
    outputs: OutputSet
    start: WarmStart | SolverResult
    ridge: float

    @classmethod
    def on_used(
        cls,
        used: Tensor,
        inputs: CentredInputs,
        outputs: OutputSet,
        start: WarmStart | SolverResult,
        ridge: float,
    ) -> Self:
        """The problem of a layer with some of the inputs, given by a mask."""
        some = WarmStart(start.weight[:, used], start.bias)
        return cls(on_inputs(inputs, used.nonzero()[:, 0]), outputs, some, ridge)

    @cached_property
    def quadratic(self) -> OutputQuadratic:
        return OutputQuadratic.of(self.inputs, self.outputs, self.start, self.ridge)

    @cached_property
    def search(self) -> SupportSearch:
        return SupportSearch(self.quadratic.gram, self.start.weight.dtype)

    @cached_property
    def origin(self) -> Tensor:
        return self.start.weight.double()

    @property
    def targets_of_start(self) -> Tensor:
        """The outputs nearest to the start's that reproduce the targets."""
        start = self.start
        return self.outputs.nearest(torch.addmm(start.bias, self.inputs.inputs, start.weight.T))

    def cross(self, targets: Tensor) -> Tensor:
        """That of the quadratic with other targets."""
        pulled = (targets.T @ self.inputs.centred).double()
        return pulled + self.quadratic.penalty * self.origin


class SparseFit(MajorisedFit):
    """A weight on a support, on its way to a smaller loss; at first the least-squares fit.

    Parameters
    ----------
    problem : SparseProblem
    support : Tensor of bool, shape (out_features, in_features)
    targets : Tensor, shape (samples, out_features)
        Those to fit first.
    """

    weight: Tensor  # shape (out_features, in_features), float64
    shift: Tensor  # shape (out_features,), the bias beside centred inputs
    parts: Mapping[str, Tensor] = {}  # what the weight is the sum of, if of several

    def __init__(self, problem: SparseProblem, support: Tensor, targets: Tensor):
        super().__init__(problem.outputs)
        self.problem, self.support = problem, support
        self._regression = SupportRegression(problem.quadratic.gram, support)
        self.square = self.loss = math.inf
        self._sweep(targets)

    @property
    def nonzeros(self) -> int:
        """How many the support has."""
        return int(self.support.sum())

    def with_support(self, nonzeros: int) -> "SparseFit":
        """The fit on a support that is looked for from here, for the targets nearest to this."""
        return SparseFit(self.problem, self._support_from_here(nonzeros), self.nearest)

    def alternate(self, nonzeros: int, times: int) -> None:
        """Take steps and look for another support of so many, in turn, while the loss falls.

        It ends as soon as the outputs are within the radius.
        """
        for _ in range(times):
            for _ in range(_STEPS_PER_SUPPORT):
                self.step()
            if 0 < self.square <= self.outputs.radius**2:
                return
            before = self.loss
            if not self._change_support(self._support_from_here(nonzeros)):
                return
            if not self.loss < (1 - _SETTLED) * before:
                return

    def after_swing(self, nonzeros: int) -> "SparseFit":
        """The fit after a turn with more nonzeros and back to so many, if its loss is lower.

        Entries that came in too early leave then, as in swaps after a greedy selection.
        """
        more = min(round(_SWING * nonzeros), self.weight.numel())
        wider = self.with_support(more)
        wider.alternate(more, 1)
        back = wider.with_support(nonzeros)
        back.alternate(nonzeros, 1)
        back.iterations += wider.iterations + self.iterations
        return back if back.loss < self.loss else self

    def _support_from_here(self, nonzeros: int) -> Tensor:
        cross = self.problem.cross(self.nearest)
        start = self.weight.to(self.problem.start.weight)
        return self.problem.search.support(cross, nonzeros, start)

    def _change_support(self, support: Tensor) -> bool:
        """Take the least-squares weight on another support, if its loss is lower."""
        before = self.support, self._regression
        self.support = support
        self._regression = SupportRegression(self.problem.quadratic.gram, support)
        self.begin_anew()
        if self._sweep(self.nearest):
            return True
        self.support, self._regression = before
        return False

    def answer(self) -> WarmStart:
        weight = self.weight.to(self.problem.start.weight)
        return WarmStart(weight, self.shift - weight @ self.problem.inputs.mean)

    def _sweep(self, targets: Tensor) -> bool:
        weight, parts = self._least_squares(targets)
        shift = targets.mean(dim=0)
        square, loss = self._evaluate(weight, shift, self._spare)
        if not self._is_lower(square, loss):
            return False
        self.weight, self.shift, self.parts = weight, shift, parts
        return True

    def _least_squares(self, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The weight for given targets, and its parts."""
        return self._regression(self.problem.cross(targets)), {}

    def _evaluate(self, weight: Tensor, shift: Tensor, nearest: Tensor) -> tuple[float, float]:
        """The ||D||_F^2 of a weight and its loss; writes the majoriser's targets to `nearest`."""
        centred, square = self.problem.inputs.centred, shift.new_zeros(())
        rounded = weight.to(shift)
        for rows in row_blocks(len(nearest)):
            produced = torch.addmm(shift, centred[rows], rounded.T)
            self.outputs.nearest(produced, rows, out=nearest[rows])
            square += produced.sub_(nearest[rows]).square_().sum()
        held = self.problem.quadratic.penalty * (weight - self.problem.origin).square().sum()
        return square.item(), square.item() + held.item()


def fewest_within(fit: SparseFit, largest: int) -> tuple[WarmStart | None, int]:
    """The sparsest fit found within the radius, None if there is none; and the number of steps.

    Each fit begins at the one before it, the first one at few nonzeros: fits that have grown end at
    a smaller error than those that have shrunk from a dense weight. Since they get better on the
    way, numbers that were too few before one was enough are open again.

    Parameters
    ----------
    fit : SparseFit
        The first one.
    largest : int
        The answer has fewer nonzeros.
    """
    radius = fit.outputs.radius
    best, iterations = None, 0
    errors: dict[int, float] = {}  # logarithms, relative to the radius, by numbers of nonzeros
    missed, kept, nonzeros = 0, largest, fit.nonzeros
    while True:
        fit.alternate(nonzeros, _SUPPORTS)
        iterations += fit.iterations
        errors[nonzeros] = log_ratio(fit.square**0.5, radius)
        if fit.square > radius**2:
            missed = nonzeros
        else:
            missed = 0 if best is None else missed
            best, kept = fit.answer(), nonzeros
        if kept <= max(missed + 1, RESOLUTION * missed):
            return best, iterations
        nonzeros = next_size(errors, missed, kept)
        fit = fit.with_support(nonzeros)
