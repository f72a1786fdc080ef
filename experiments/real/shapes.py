"""Networks of torchvision with random weights, for their shapes and the memory they need.

Nothing is said of how good they are once compressed: there is nothing that they know.
"""

from collections.abc import Sequence

import torch
from torch import nn

from experiments.real.network import Data, RealNetwork
from experiments.vision import torchvision

_PIXELS = 224


def load(
    calibration_samples: int,
    searching_samples: int,
    choosing_samples: int,
    judging_samples: int,
    *,
    architecture: str,
    layers: Sequence[str] | None = None,
    batch: int = 8,
    seed: int = 0,
) -> RealNetwork:
    """A network of torchvision with random weights, and random images.

    Parameters
    ----------
    architecture : {"alexnet", "vgg16", "vit_b_16"}
        Or another of `torchvision.models`.
    layers : sequence of str, optional
        Names of those that are compressed; all linear ones unless given.
    """
    torch.manual_seed(seed)
    model = torchvision.models.get_model(architecture, weights=None).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():  # as ViT's head begins
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    counts = (calibration_samples, choosing_samples, judging_samples)
    calibration, choosing, judging = (
        torch.stack([torch.randn(3, _PIXELS, _PIXELS) for _ in range(count)]) for count in counts
    )
    sets = (calibration, calibration[:searching_samples], choosing, judging)
    return RealNetwork(
        name=architecture,
        model=model,
        data=Data(*(each.split(batch) for each in sets)),
        forward=None,
        output="values",
        measure="none",
        quality=None,
        layers=layers,
    )
