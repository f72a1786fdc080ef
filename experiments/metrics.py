"""The judge: accuracy and size of a network, measured in one place for every method.

Size is read off the modules of the network as it stands, never taken from what a method says of
itself. Only the layers that a method may compress are counted; biases and other layers are the
same for all methods.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddlr.layers import BYTES_A_VALUE, layer_size
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
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        batches = images.split(_EVALUATION_BATCH)
        return torch.cat([network(batch.to(device)).to(images.device) for batch in batches])
    finally:
        network.train(was_training)


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
        "bytes_dense": BYTES_A_VALUE * dense,
        "bytes_stored": sum(size.bytes for size in after),
    }
