"""What a network that others trained must bring along to be compressed and judged here."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddlr.calls import as_batches
from ddlr.outputs import Output, network_outputs

Forward = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs of a network in batches of the form it is called on.

    No two of the sets for calibration, choosing and judging share a sample.

    Attributes
    ----------
    calibration : sequence of batches
        What layers are compressed on.
    searching : sequence of batches
        The first of the calibration samples, on which the search for an allocation measures what
        each layer is worth: it runs the network once for each layer and tolerance.
    choosing : sequence of batches
        What settings are chosen on.
    judging : sequence of batches
        What is reported.
    """

    calibration: Sequence[Any]
    searching: Sequence[Any]
    choosing: Sequence[Any]
    judging: Sequence[Any]


@dataclass(frozen=True)
class RealNetwork:
    """A network with its data, and how near a compressed copy is to it.

    Attributes
    ----------
    name : str
    model : nn.Module
    data : Data
    forward : callable, optional
        ``(model, batch)`` to the output that counts; the network's plain call unless given.
    output : {"values"} or callable
        What the search for an allocation makes smaller, see `ddlr.compress`.
    measure : str
        Name of the quality, for tables.
    quality : callable, optional
        ``(original outputs, outputs)``, two tensors of all samples, to a number: 1 for equal ones.
        None where nothing can be said, as of random weights.
    layers : sequence of str, optional
        The layers to compress; all linear ones unless given.
    """

    name: str
    model: nn.Module
    data: Data
    forward: Forward | None
    output: Output
    measure: str
    quality: Callable[[Tensor, Tensor], float] | None
    layers: Sequence[str] | None = None

    def outputs(self, model: nn.Module, batches: Sequence[Any]) -> Tensor:
        """What a network gives for batches of inputs, in evaluation mode, in one tensor."""
        [outputs] = network_outputs(model, as_batches(batches, forward=self.forward))
        return outputs

    def quality_of(self, model: nn.Module, batches: Sequence[Any]) -> float:
        """The quality of a compressed copy on batches of inputs; nan where it has none."""
        if self.quality is None:
            return math.nan
        return self.quality(self.outputs(self.model, batches), self.outputs(model, batches))


class AsCalled(nn.Module):
    """A network, or a compressed copy, with the output that counts: as a user would deploy it."""

    def __init__(self, network: RealNetwork, model: nn.Module):
        super().__init__()
        self.model, self.call = model, network.forward

    def forward(self, batch: Tensor | None = None, **named: Tensor) -> Tensor:
        inputs = named if batch is None else batch
        return self.model(inputs) if self.call is None else self.call(self.model, inputs)


def variance_explained(original: Tensor, outputs: Tensor) -> float:
    """The share of the outputs' variance that other outputs explain: 1 for equal ones.

    Of each output by itself, then their mean, so that scales do not count.

        1 - mean over outputs j of  sum_i (a_ij - b_ij)^2 / sum_i (a_ij - mean_j)^2
    """
    original, outputs = original.double(), outputs.double()
    missed = (outputs - original).square().sum(dim=0)
    varied = (original - original.mean(dim=0)).square().sum(dim=0)
    return 1 - (missed / varied).mean().item()


def draw(samples: int, sizes: Sequence[int], seed: int) -> list[list[int]]:
    """Disjoint random choices of so many of the samples each, in random order.

    Raises
    ------
    ValueError
        If there are not so many samples; says how many there are.
    """
    if sum(sizes) > samples:
        raise ValueError(
            f"{' + '.join(map(str, sizes))} samples are asked for, but there are {samples}; "
            "take fewer for calibration, choosing or judging"
        )
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return [each.tolist() for each in order[: sum(sizes)].split(list(sizes))]
