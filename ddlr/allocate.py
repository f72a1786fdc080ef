"""From what each layer costs at each tolerance to tolerances for all layers together."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr.arguments import one_of
from ddlr.captured import CapturedLayers, released
from ddlr.goals import ADDING, TOLERANCES, Allocation, Option, as_tolerances
from ddlr.method import Method
from ddlr.outputs import Output, OutputError, check_outputs, divergence, network_outputs
from ddlr.walk import Solved, WalkSettings, compress_layers

log = logging.getLogger(__name__)

_FRONTIER_AT_MOST = 4096


def frontier(
    options: Mapping[str, Sequence[Option]], adding: str = "divergences"
) -> list[Allocation]:
    """Allocations that no other beats in both size and divergence, the smallest first.

    As if the divergences of layers added up, as they do where layers move the outputs in directions
    of their own; or, with `adding` as "roots", as if their roots did, as where all move them in the
    same direction: a divergence is about the square of how far they move. Layers are joined one by
    one, and what is beaten by others is left out at once. Where a layer drops inputs that are
    outputs of the one before it, only those with the same option of the layer joined last are
    compared, so this is exact; beyond 4096 allocations it is thinned out. The network as it is,
    each tolerance being 0, comes last, also where a smaller one equals it on the calibration
    inputs.
    """
    one_of(adding, "adding", ADDING)
    joined = [_Joined.of_nothing()]
    before = [Option(0.0, 0, 0.0)]
    for choices in options.values():
        if not _are_coupled(before, choices):
            joined, before = [_together(joined)], [Option(0.0, 0, 0.0)]
        joined = [
            _together(
                [
                    each.with_layer(option, last, adding)
                    for each, last in zip(joined, before, strict=True)
                ]
            )
            for option in choices
        ]
        before = choices
    unbeaten = _together(joined).allocations(list(options))
    untouched = [choices[0] for choices in options.values()]
    if any(unbeaten[-1].tolerances.values()) and not any(
        option.tolerance or option.divergence for option in untouched
    ):
        # Equalled by a smaller one, or beaten by rounding.
        size = sum(option.parameters for option in untouched)
        unbeaten = unbeaten[: _FRONTIER_AT_MOST - 1]
        unbeaten.append(Allocation(size, 0.0, dict.fromkeys(options, 0.0)))
    return unbeaten


def _are_coupled(before: Sequence[Option], choices: Sequence[Option]) -> bool:
    """Whether what a layer weighs depends on the option of the one before it."""
    return any(each.parameters_per_output for each in before) and any(
        each.inputs_dropped for each in choices
    )


@dataclass(frozen=True)
class _Joined:
    """Allocations to the layers so far that no other beats, the smallest first.

    Attributes
    ----------
    parameters, divergences : Tensor, shape (allocations,)
        Their sums, of int64 and float64.
    tolerances : Tensor, shape (allocations, layers)
    """

    parameters: Tensor
    divergences: Tensor
    tolerances: Tensor

    @classmethod
    def of_nothing(cls) -> "_Joined":
        sums = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
        return cls(*sums, torch.zeros(1, 0, dtype=torch.float64))

    def with_layer(self, option: Option, before: Option, adding: str) -> "_Joined":
        """With one more layer, whose dropped inputs are outputs of the one before it."""
        saved = before.parameters_per_output * option.inputs_dropped
        tolerance = self.tolerances.new_full((len(self.tolerances), 1), option.tolerance)
        if adding == "roots":
            added = (self.divergences.sqrt() + max(option.divergence, 0.0) ** 0.5).square()
        else:
            added = self.divergences + option.divergence
        return _Joined(
            self.parameters + option.parameters - saved,
            added,
            torch.cat([self.tolerances, tolerance], dim=1),
        )

    def at(self, places: Tensor) -> "_Joined":
        return _Joined(self.parameters[places], self.divergences[places], self.tolerances[places])

    def allocations(self, names: Sequence[str]) -> list[Allocation]:
        return [
            Allocation(parameters, divergence, dict(zip(names, tolerances, strict=True)))
            for parameters, divergence, tolerances in zip(
                self.parameters.tolist(),
                self.divergences.tolist(),
                self.tolerances.tolist(),
                strict=True,
            )
        ]


def _together(parts: Sequence[_Joined]) -> _Joined:
    """Those of several that no other beats; the first of equal ones."""
    whole = _Joined(
        torch.cat([each.parameters for each in parts]),
        torch.cat([each.divergences for each in parts]),
        torch.cat([each.tolerances for each in parts]),
    )
    by_divergence = whole.divergences.argsort(stable=True)
    order = by_divergence[whole.parameters[by_divergence].argsort(stable=True)]
    divergences = whole.divergences[order]
    smallest = divergences.cummin(dim=0).values
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = divergences[1:] < smallest[:-1]
    kept = order[better]
    if len(kept) > _FRONTIER_AT_MOST:
        step = (len(kept) - 1) / (_FRONTIER_AT_MOST - 1)
        kept = kept[[round(step * index) for index in range(_FRONTIER_AT_MOST)]]
    return whole.at(kept)


@torch.no_grad()
def layer_options(
    model: nn.Module,
    captured: CapturedLayers,
    method: Method,
    settings: WalkSettings,
    tolerances: Sequence[float] = TOLERANCES,
    *,
    output: Output = "values",
    largest: float | None = None,
    solved: Solved | None = None,
) -> dict[str, list[Option]]:
    """Compress each layer by itself at each tolerance, and measure what the network's outputs lose.

    Parameters
    ----------
    model : nn.Module
    captured : CapturedLayers
    method : Method
    settings : WalkSettings
        Each layer alone is solved in parallel order, whatever theirs is.
    tolerances : sequence of float
        One at which the outputs are not finite is left out.
    output : {"classes", "binary", "values"} or callable
        What the network's outputs are; it decides how far they are from the original ones on the
        calibration inputs, see `ddlr.outputs.divergence`.
    largest : float, optional
        A layer that keeps more weights than this is not looked at, and at smaller tolerances it is
        not solved: the tolerances that are of use to a last layer are many times the work to a
        first one.
    solved : dict, optional
        As for `ddlr.walk.compress_layers`.
    """
    settings, tolerances = settings.in_parallel(), sorted(as_tolerances(tolerances))
    original = network_outputs(model, captured.batches)
    check_outputs(original, output)
    if method.freeing_nothing:
        captured = captured.noting_what_frees(model)
    options = {}
    layers = captured.layers
    for layer, following in zip(released(layers), [*layers[1:], None], strict=True):
        alone = captured.only([layer.name])
        inputs, outputs = int(layer.live_in.sum()), int(layer.live_out.sum())
        tried = [Option(0.0, layer.weight.numel(), 0.0, parameters_per_output=inputs)]
        found = []
        for tolerance in reversed(tolerances):
            result = compress_layers(model, alone, method, tolerance, settings, solved=solved)
            [report] = result.layers
            if largest is not None and report.parameters_kept > largest:
                break
            if report.parameters_kept >= layer.weight.numel():
                continue
            try:
                moved = network_outputs(result.model, captured.batches)
                lost = divergence(original, moved, output)
            except OutputError as error:
                log.warning("layer %r at a tolerance of %g: %s", layer.name, tolerance, error)
                continue
            low_rank = report.form == "low_rank"
            per_output = report.rank if low_rank else report.parameters_kept // outputs
            found.append(
                Option(tolerance, report.parameters_kept, lost, report.inputs_dropped, per_output)
            )
        for option in reversed(found):
            if option.parameters < tried[-1].parameters:
                tried.append(option)
        if not (
            method.drops_unread
            and following is not None
            and captured.is_sole_consumer(model, following, layer)
        ):
            tried = [dataclasses.replace(option, parameters_per_output=0) for option in tried]
        options[layer.name] = tried
    return options
