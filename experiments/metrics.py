"""The judge: accuracy and size of a network, measured in one place for every method.

Size is read off the modules of the network as it stands, never taken from what a method says of
itself. Only the layers that a method may compress are counted; biases and other layers are the
same for all methods.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr import CapturedLayers, CompressionResult, capture
from ddlr.hooks import run_batches
from ddlr.sizes import BYTES_PER_VALUE, layer_size
from ddlr.untouched import evaluating
from experiments.data import Split

_EVALUATION_BATCH = 1000


@torch.no_grad()
def accuracy(network: nn.Module, split: Split) -> float:
    """Share of samples whose largest logit is the label's, as a percentage."""
    predictions = predict(network, split.images).argmax(dim=1)
    return 100.0 * (predictions == split.labels).double().mean().item()


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Logits of the network in evaluation mode, on the device of `images`."""
    batches = images.split(_EVALUATION_BATCH)
    with evaluating(network) as device:
        return torch.cat([network(batch.to(device)).to(images.device) for batch in batches])


def size_measures(original: nn.Module, compressed: nn.Module, layers: Sequence[str]) -> dict:
    """Weights and bytes of the named layers, before and after; biases are not counted."""
    before = [original.get_submodule(name) for name in layers]
    after = [layer_size(compressed.get_submodule(name)) for name in layers]
    dense = sum(layer.in_features * layer.out_features for layer in before)
    kept = sum(size.parameters for size in after)
    return {
        "parameters_dense": dense,
        "parameters_kept": kept,
        "kept_fraction": kept / dense,
        "bytes_dense": BYTES_PER_VALUE * dense,
        "bytes_stored": sum(size.bytes for size in after),
    }


@dataclass(frozen=True)
class Judged:
    """What compressions of a network are held against: the network itself, on all samples.

    Attributes
    ----------
    test, held_out : Split
        In place of images, what the network takes.
    accuracy, accuracy_held_out : float
        On them.
    inputs : dict of Tensor
        The calibration and the held-out samples, as "calibration" and "held_out".
    outputs : dict of Tensor
        The network's outputs on them.
    held_out_layers : dict
        Layer name to its inputs and, after the activation, its outputs on the held-out samples.
    activations : dict
        Layer name to "relu" or "none".
    """

    test: Split
    held_out: Split
    accuracy: float
    accuracy_held_out: float
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    held_out_layers: dict[str, tuple[Tensor, Tensor]]
    activations: dict[str, str]


@torch.no_grad()
def judge_dense(
    network: nn.Module, captured: CapturedLayers, test: Split, held_out: Split
) -> Judged:
    """Measure a network once, for all its compressions."""
    inputs = {
        "calibration": torch.cat([batch.values for batch in captured.batches]),
        "held_out": held_out.images,
    }
    activations = {layer.name: layer.activation for layer in captured.layers}
    with capture(network, list(activations)) as records:
        run_batches(network, held_out.images.split(_EVALUATION_BATCH))
    return Judged(
        test=test,
        held_out=held_out,
        accuracy=accuracy(network, test),
        accuracy_held_out=accuracy(network, held_out),
        inputs=inputs,
        outputs={name: predict(network, samples) for name, samples in inputs.items()},
        held_out_layers={
            name: (record.inputs, _activated(record.outputs, activations[name]))
            for name, record in records.items()
        },
        activations=activations,
    )


@torch.no_grad()
def layer_errors(judged: Judged, compressed: CompressionResult) -> dict[str, float]:
    """Relative output error of each stored layer on its original inputs from held-out samples.

    Of the outputs that something reads, as `LayerReport.relative_error_read` has it.
    """
    errors = {}
    for report in compressed.layers:
        name = report.name
        inputs, outputs = judged.held_out_layers[name]
        stored = compressed.model.get_submodule(name)
        read = ~compressed.unread[name]
        if compressed.drops_unread:
            outputs = outputs * read
        produced = _activated(stored(inputs), judged.activations[name])
        norm = torch.linalg.vector_norm(outputs).item()
        missed = torch.linalg.vector_norm((produced - outputs)[:, read]).item()
        errors[name] = missed / norm if norm else math.nan
    return errors


@torch.no_grad()
def output_measures(judged: Judged, compressed: CompressionResult) -> dict:
    """Error of the network's outputs, relative to those of the original."""
    errors = {
        name: _relative_error(predict(compressed.model, samples), judged.outputs[name])
        for name, samples in judged.inputs.items()
    }
    return {
        "output_error": errors["calibration"],
        "output_error_held_out": errors["held_out"],
    }


def _activated(outputs: Tensor, activation: str) -> Tensor:
    return outputs.relu() if activation == "relu" else outputs


def _relative_error(produced: Tensor, wanted: Tensor) -> float:
    norm = torch.linalg.vector_norm(wanted).item()
    return torch.linalg.vector_norm(produced - wanted).item() / norm if norm else math.nan
