"""How far a compressed layer's outputs are from the original ones, and the report on it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr.captured import CapturedLayer
from ddlr.constraints import OutputSet, relative_violation
from ddlr.layers import numerical_rank_of
from ddlr.result import LayerReport, SolverResult, SolverStatus
from ddlr.sizes import layer_size


@dataclass(frozen=True)
class LayerErrors:
    """Errors of one layer on its calibration samples, output by output.

    Attributes
    ----------
    errors, deviations : Tensor, shape (out_features,)
        Squared norms over the samples: of the output's error, and of D.
    promised : Tensor, shape (out_features,)
        Squared norms of the original outputs that the bound is about, 0 for all others.
    original : Tensor, shape (out_features,)
        Squared norms of the original outputs.
    """

    errors: Tensor
    deviations: Tensor
    promised: Tensor
    original: Tensor

    @property
    def unpromised(self) -> Tensor:
        """Outputs that are not always zero and that the bound leaves out, shape (out_features,)."""
        return (self.original > 0) & (self.promised == 0)

    def measures(self, unread: Tensor, relative_bound: float) -> dict[str, float]:
        """The errors of a `LayerReport`, nothing reading the outputs `unread`."""
        norm, whole = (each.sum().sqrt().item() for each in (self.promised, self.original))
        error = self.errors[~unread].sum().sqrt().item()
        every = torch.where(unread, self.original, self.errors).sum().sqrt().item()
        deviation = self.deviations[~unread].sum().sqrt().item()
        return {
            "relative_error": every / whole if whole else every,
            "relative_error_read": error / norm if norm else error,
            "violation": relative_violation(deviation, relative_bound * norm, norm),
        }


@torch.no_grad()
def layer_errors(
    layer: nn.Module, inputs: Tensor, targets: Tensor, original: Tensor, activation: str
) -> LayerErrors:
    """Measure a layer on inputs against targets, those that it need not reproduce being zero.

    Parameters
    ----------
    layer : nn.Module
        As it is stored. Its hooks are not called: inputs are behind them, targets before.
    inputs : Tensor, shape (samples, in_features)
    targets, original : Tensor, shape (samples, out_features)
        What the layer is to give after its activation, and what the original one gives.
    activation : {"relu", "none"}
    """
    produced = layer.forward(inputs.to(next(layer.parameters()))).to(inputs.dtype)
    final = produced.relu() if activation == "relu" else produced
    deviation = OutputSet(targets, 0.0, activation, "hinge").deviation(produced)
    squares = (final - targets, deviation, targets, original)
    return LayerErrors(*(each.square().sum(dim=0, dtype=torch.float64) for each in squares))


@dataclass(frozen=True)
class MeasuredLayer:
    """A compressed layer's solve and errors, from which its report follows once it is stored.

    `live_in`, of shape (in_features,), says which inputs are not always zero.
    """

    name: str
    activation: str
    relative_tolerance: float
    relative_bound: float
    solved: SolverResult | None
    errors: LayerErrors
    live_in: Tensor

    def unread(self, removed: Tensor | None = None) -> Tensor:
        """Which outputs nothing reads: left out of the bound, or removed afterwards."""
        dropped = self.errors.unpromised
        return dropped if removed is None else dropped | removed.to(dropped.device)

    def report(self, layer: nn.Module, removed: Tensor | None = None) -> LayerReport:
        """The report on the layer as it is stored, some of its outputs being removed."""
        unread, solved = self.unread(removed), self.solved
        size = layer_size(layer)
        measures = self.errors.measures(unread, self.relative_bound)
        if solved is None:  # the original layer is what it is, also on other inputs
            measures["violation"] = 0.0
        return LayerReport(
            name=self.name,
            in_features=layer.in_features,
            out_features=layer.out_features,
            activation=self.activation,
            form=size.form,
            rank=numerical_rank_of(layer),
            nonzeros=int((layer.weight != 0).sum()),
            parameters_kept=size.parameters,
            parameters_dense=layer.in_features * layer.out_features,
            bytes_stored=size.bytes,
            relative_tolerance=self.relative_tolerance,
            relative_bound=self.relative_bound,
            status=solved.status if solved else SolverStatus.UNCHANGED,
            relative_gap=solved.relative_gap if solved else math.nan,
            shortfall=solved.shortfall if solved else math.nan,
            iterations=solved.iterations if solved else 0,
            seconds=solved.seconds if solved else 0.0,
            outputs_dropped=int((unread & (self.errors.original > 0)).sum()),
            inputs_dropped=int((self.live_in & ~(layer.weight != 0).any(dim=0)).sum()),
            **measures,
        )


def measured_layer(
    layer: nn.Module,
    captured: CapturedLayer,
    relative_tolerance: float,
    relative_bound: float,
    solved: SolverResult | None,
) -> MeasuredLayer:
    """Measure a layer as it is stored. Without a solve it is the original one."""
    original = captured.targets if captured.whole_targets is None else captured.whole_targets
    return MeasuredLayer(
        captured.name,
        captured.activation,
        float(relative_tolerance),
        float(relative_bound),
        solved,
        layer_errors(layer, captured.inputs, captured.targets, original, captured.activation),
        captured.live_in,
    )
