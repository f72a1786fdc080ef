"""A layer's outputs against targets as a quadratic function of its weight, without the samples."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddlr.constraints import OutputSet
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart
from ddlr.result import SolverResult


@dataclass(frozen=True)
class OutputQuadratic:
    """The squared error of a layer's outputs, with a ridge towards a weight.

        ||Xc Wt - Tc||_F^2 + penalty * ||W - W0||_F^2  =  tr(W G Wt) - 2 tr(W Bt) + constant

    Xc and Tc are the centred inputs and targets; a free bias is the mean that they leave.

    Attributes
    ----------
    gram : Tensor, shape (in_features, in_features), float64
        G = Xct Xc + penalty * 1.
    cross : Tensor, shape (out_features, in_features), float64
        B = Tct Xc + penalty * W0.
    mean_inputs, mean_targets : Tensor, shapes (in_features,) and (out_features,)
    penalty : float
    """

    gram: Tensor
    cross: Tensor
    mean_inputs: Tensor
    mean_targets: Tensor
    penalty: float

    @classmethod
    def of(
        cls,
        inputs: CentredInputs,
        outputs: OutputSet,
        start: WarmStart | SolverResult,
        ridge: float,
    ) -> "OutputQuadratic":
        """The one whose targets are the outputs, nearest to the start's, that reproduce a layer.

        On the inputs that the original layer had these are its own outputs, before the activation.

        Parameters
        ----------
        start : WarmStart or SolverResult
            W0 and its bias.
        ridge : float
            `penalty` relative to the mean eigenvalue of Xct Xc.
        """
        gram, penalty = ridged_gram(inputs, ridge)
        produced = torch.addmm(start.bias, inputs.inputs, start.weight.T)
        missed = outputs.deviation(produced)
        cross = start.weight.double() @ gram - (missed.T @ inputs.centred).double()
        return cls(gram, cross, inputs.mean, produced.mean(dim=0) - missed.mean(dim=0), penalty)

    def bias_of(self, weight: Tensor) -> Tensor:
        """The best bias beside a weight, shape (out_features,)."""
        return self.mean_targets - weight @ self.mean_inputs

    @cached_property
    def minimiser(self) -> Tensor:
        """The weight at which it is smallest, shape (out_features, in_features)."""
        return torch.cholesky_solve(self.cross.T, torch.linalg.cholesky(self.gram)).T

    def excess(self, weight: Tensor) -> float:
        """How much larger than its minimum it is at a weight."""
        moved = weight.double() - self.minimiser
        return ((moved @ self.gram) * moved).sum().item()

    def on_inputs(self, kept: Tensor) -> "OutputQuadratic":
        """The same for weights that are 0 but for some inputs, given by their indices."""
        return OutputQuadratic(
            self.gram[kept][:, kept],
            self.cross[:, kept],
            self.mean_inputs[kept],
            self.mean_targets,
            self.penalty,
        )


def ridged_gram(
    inputs: CentredInputs, ridge: float, kept: Tensor | None = None
) -> tuple[Tensor, float]:
    """The Gram matrix of the centred inputs in float64 with a ridge, and the ridge's penalty.

    Of some inputs, given by their indices, the columns alone.
    """
    values, vectors = (each.double() for each in inputs.eigen)
    penalty = ridge * (vectors.square() @ values).mean().item()
    if kept is None:
        gram = (vectors * values) @ vectors.T
        gram.diagonal().add_(penalty)
    else:
        gram = (vectors * values) @ vectors[kept].T
        gram[kept, torch.arange(len(kept), device=kept.device)] += penalty
    return gram, penalty
