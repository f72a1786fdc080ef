"""All compressed layers of a network adjusted together, without labels."""

import copy
import dataclasses
import math
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddlr.capture import evaluating, outputs_of
from ddlr.layerwise import CapturedLayers, measured_again
from ddlr.result import CompressionResult, SolverStatus


def refit_network(
    original: nn.Module,
    compressed: nn.Module,
    calibration: Tensor | Iterable[Tensor],
    layers: Sequence[str],
    *,
    epochs: int = 20,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    temperature: float = 2.0,
    seed: int = 0,
) -> nn.Module:
    """Move the weights of compressed layers so that the network's outputs match the original's.

        minimise the mean of KL(softmax(original / T), softmax(outputs / T))

    over the factors, the nonzeros and the biases of the given layers; ranks and supports stay. The
    outputs are logits, T is the temperature (Hinton et al. 2015). By Adam with one cycle of
    learning rates, on calibration inputs alone: no labels, though it is training, unlike all else
    here. An epoch costs three passes over the samples.

    Parameters
    ----------
    original, compressed : nn.Module
        Are left untouched.
    calibration : Tensor, or iterable of Tensor
        Network inputs.
    layers : sequence of str
        Names of the layers that move; all others stay as they are.
    epochs, batch_size : int
    learning_rate : float
        The highest.
    temperature : float
    seed : int
        Of the order of samples.

    Returns
    -------
    nn.Module
        A refitted copy of `compressed`.
    """
    inputs = calibration if isinstance(calibration, Tensor) else torch.cat(list(calibration))
    device = next(original.parameters()).device
    inputs = inputs.to(device)
    wanted = (outputs_of(original, inputs.split(1000)) / temperature).log_softmax(dim=1)
    refitted = copy.deepcopy(compressed)
    refitted.requires_grad_(False)
    moving = [
        parameter for name in layers for parameter in refitted.get_submodule(name).parameters()
    ]
    supports = [parameter != 0 if parameter.ndim > 1 else None for parameter in moving]
    for parameter in moving:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(moving, lr=learning_rate)
    steps = epochs * math.ceil(len(inputs) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    with evaluating(refitted), torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(inputs), generator=generator).to(device)
            for chosen in order.split(batch_size):
                outputs = refitted(inputs[chosen]).flatten(1) / temperature
                loss = functional.kl_div(
                    outputs.log_softmax(dim=1),
                    wanted[chosen],
                    log_target=True,
                    reduction="batchmean",
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                with torch.no_grad():
                    for parameter, support in zip(moving, supports, strict=True):
                        if support is not None:
                            parameter.mul_(support)
    for before, after in zip(compressed.parameters(), refitted.parameters(), strict=True):
        after.requires_grad_(before.requires_grad)
    return refitted


def refit_result(
    model: nn.Module, result: CompressionResult, captured: CapturedLayers
) -> CompressionResult:
    """A compression whose layers are refitted together, by `refit_network`, and measured again.

    No certificate speaks of the weights any longer, and the layers' bounds may not hold: by how
    much they do not is each report's violation.
    """
    started = time.perf_counter()
    names = [report.name for report in result.layers]
    refitted = refit_network(model, result.model, captured.batches, names)
    share = (time.perf_counter() - started) / len(names)
    result = measured_again(dataclasses.replace(result, model=refitted), captured)
    reports = tuple(
        dataclasses.replace(
            report,
            status=SolverStatus.REFITTED,
            relative_gap=math.nan,
            seconds=report.seconds + share,
        )
        for report in result.layers
    )
    return dataclasses.replace(result, layers=reports)
