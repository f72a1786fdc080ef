"""All compressed layers of a network adjusted together, without labels."""

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddlr.arguments import as_number, as_whole_number
from ddlr.calls import Batch, Forward, as_batches, check_call
from ddlr.captured import CapturedLayers
from ddlr.cascade import Behind
from ddlr.linear_maps import as_layer
from ddlr.measure import measured_layer
from ddlr.outputs import (
    Output,
    OutputError,
    check_outputs,
    check_trainable,
    one_tensor,
    outputs_by_batch,
    training_loss,
)
from ddlr.result import CompressionResult, LayerReport, SolverStatus
from ddlr.untouched import evaluating

_BATCH = 1000


@dataclass(frozen=True)
class NetworkRefit:
    """How `refit_network` moves the layers of a network together.

    Where the calibration samples are few for the weights that are left, a refit learns these
    samples by heart; more samples, which need no labels either, and a higher temperature keep it
    from that.

    Attributes
    ----------
    calibration : Tensor, or iterable of batches, optional
        The samples that it learns from; those of the compression unless given. Of the same form,
        and called the same way.
    epochs, batch_size, learning_rate, temperature
        See `refit_network`.

    Raises
    ------
    ValueError
        If a number is out of its range; names it.
    """

    calibration: Any = None
    epochs: int = 20
    batch_size: int = 100
    learning_rate: float = 1e-3
    temperature: float = 2.0

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            object.__setattr__(self, name, as_whole_number(getattr(self, name), name, lowest=1))
        for name in ("learning_rate", "temperature"):
            object.__setattr__(self, name, as_number(getattr(self, name), name, positive=True))


def refit_network(
    original: nn.Module,
    compressed: nn.Module,
    calibration: Any,
    layers: Sequence[str],
    *,
    forward: Forward | None = None,
    output: Output | None = None,
    epochs: int = 20,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    temperature: float = 2.0,
    seed: int = 0,
) -> nn.Module:
    """Move the weights of compressed layers so that the network's outputs match the original's.

        minimise the mean of KL(softmax(original / T), softmax(outputs / T))

    over the factors, the nonzeros and the biases of the given layers; ranks and supports stay. That
    is for outputs that are logits of classes, T being the temperature (Hinton et al. 2015); for
    others, see `output`. By Adam with one cycle of learning rates, on calibration inputs alone: no
    labels, though it is training, unlike all else here. An epoch costs three passes over the
    samples. A network whose outputs are those of the original to the last bit is not moved.

    Parameters
    ----------
    original, compressed : nn.Module
        Are left untouched.
    calibration : Tensor, or iterable of batches
        Network inputs, see `ddlr.compress`. Of batches of unequal shapes each step takes samples of
        one.
    forward : callable, optional
        How the network is called, see `ddlr.compress`.
    layers : sequence of str
        Names of the layers that move; all others stay as they are.
    output : {"classes", "binary", "values"} or callable
        What the outputs are: logits of classes along the last dimension; logits that each stand for
        yes or no, which gives the same divergence of these two; real numbers, for which the mean
        squared difference is minimised. Or a function of the original and the new outputs of some
        samples, which gives a tensor of one number to be minimised. It must be given.
    epochs, batch_size : int
    learning_rate : float
        The highest.
    temperature : float
        Divides logits before their softmax.
    seed : int
        Decides the order of samples.

    Returns
    -------
    nn.Module
        A refitted copy of `compressed`.

    Raises
    ------
    ValueError
        If `output` is not given, or the outputs are not what it says, are no tensor with a first
        dimension of samples, are not finite, or do not depend on the layers.
    """
    check_trainable(output)
    how = NetworkRefit(calibration, epochs, batch_size, learning_rate, temperature)
    batches = as_batches(calibration, forward=forward)
    check_call(original, batches)
    batches = _joined(batches)
    original_outputs = [
        _of_samples(outputs_by_batch(original, _parts(batch)), batch) for batch in batches
    ]
    check_outputs(original_outputs, output)
    refitted = copy.deepcopy(compressed)
    if all(
        torch.equal(torch.cat(outputs_by_batch(refitted, _parts(batch))), before)
        for batch, before in zip(batches, original_outputs, strict=True)
    ):
        return refitted
    loss_of = training_loss(original_outputs, output, how.temperature)
    refitted.requires_grad_(False)
    moving = [
        parameter for name in layers for parameter in refitted.get_submodule(name).parameters()
    ]
    supports = [parameter != 0 if parameter.ndim > 1 else None for parameter in moving]
    for parameter in moving:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(moving, lr=how.learning_rate)
    steps = how.epochs * sum(math.ceil(len(batch) / how.batch_size) for batch in batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, how.learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    with evaluating(refitted) as device, torch.enable_grad():
        for _ in range(how.epochs):
            for place, chosen in _minibatches(batches, how.batch_size, generator):
                outputs = one_tensor(batches[place].part(chosen).run(refitted, device))
                loss = loss_of(original_outputs[place][chosen.to(outputs.device)], outputs)
                if not loss.requires_grad:
                    raise ValueError(
                        "the network's output has no gradient towards the layers to refit; it "
                        "must not be rounded, detached, or computed without gradients"
                    )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                with torch.no_grad():
                    for parameter, support in zip(moving, supports, strict=True):
                        if support is not None:
                            parameter.mul_(support)
            if not loss.isfinite():  # nor will it be in the next
                raise OutputError(
                    f"the network's output gives a loss of {loss.item()} in its refit; it must be "
                    "finite: a lower learning_rate may help"
                )
    for before, after in zip(compressed.parameters(), refitted.parameters(), strict=True):
        after.requires_grad_(before.requires_grad)
    return refitted


def _joined(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Batches in one, where they are tensors of one shape and the network is called on them."""
    values = [batch.values for batch in batches]
    if any(batch.forward is not None for batch in batches):
        return batches
    if not all(isinstance(each, Tensor) for each in values):
        return batches
    if len({(each.shape[1:], each.dtype, each.device) for each in values}) > 1:
        return batches
    return [Batch(torch.cat(values))]


def _parts(batch: Batch) -> list[Batch]:
    starts = range(0, len(batch), _BATCH)
    return [batch] if len(starts) < 2 else [batch.part(slice(at, at + _BATCH)) for at in starts]


def _of_samples(outputs: list[Tensor], inputs: Batch) -> Tensor:
    joined = torch.cat(outputs)
    if len(joined) != len(inputs):
        raise ValueError(
            f"the network's output has shape {tuple(joined.shape)} for {len(inputs)} samples; its "
            "first dimension must be that of the samples"
        )
    return joined


def _minibatches(
    batches: Sequence[Batch], size: int, generator: torch.Generator
) -> Iterator[tuple[int, Tensor]]:
    """The place of a batch and of some of its samples, each sample once, in random order."""
    chunks = []
    for place, batch in enumerate(batches):
        order = torch.randperm(len(batch), generator=generator)
        chunks += [(place, chosen) for chosen in order.split(size)]
    if len(batches) > 1:
        chunks = [chunks[index] for index in torch.randperm(len(chunks), generator=generator)]
    yield from chunks


def refit_if_asked(
    model: nn.Module,
    result: CompressionResult,
    captured: CapturedLayers,
    *,
    refit: NetworkRefit | None,
    output: Output | None,
) -> CompressionResult:
    """A compression, after a refit of all its layers together where one is given.

    They are moved by `refit_network` and measured again. No certificate speaks of the weights any
    longer, and the layers' bounds may not hold: by how much is each report's violation.
    """
    if refit is None:
        return result
    started = time.perf_counter()
    names = [report.name for report in result.layers]
    refitted = refit_network(
        model,
        result.model,
        captured.batches if refit.calibration is None else refit.calibration,
        names,
        output=output,
        epochs=refit.epochs,
        batch_size=refit.batch_size,
        learning_rate=refit.learning_rate,
        temperature=refit.temperature,
    )
    share = (time.perf_counter() - started) / len(names)
    result = _measured_again(dataclasses.replace(result, model=refitted), captured)
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


@torch.no_grad()
def _measured_again(result: CompressionResult, captured: CapturedLayers) -> CompressionResult:
    """The errors and violations of a result whose layers have moved, at the sizes they had."""
    layers = {layer.name: layer for layer in captured.layers}
    reports: list[LayerReport] = []
    later = [layers[report.name] for report in result.layers[1:]]
    behind = Behind(result.model, later, captured.batches)
    for report in result.layers:
        layer = layers[report.name]
        if result.order == "cascade" and reports:
            layer = behind.layer(result.model, report.name)
        stored = as_layer(result.model.get_submodule(report.name))
        unread = result.unread.get(report.name, torch.zeros_like(layer.live_out))
        if result.drops_unread:
            layer = layer.reading(~unread)
        moved = measured_layer(
            stored, layer, report.relative_tolerance, report.relative_bound, None
        )
        measures = moved.errors.measures(unread, report.relative_bound)
        reports.append(dataclasses.replace(report, **measures))
    return dataclasses.replace(result, layers=tuple(reports))
