"""Random layers for the tests of solvers."""

import torch
from torch import Tensor


def made_up_layer(
    samples: int,
    in_features: int,
    out_features: int,
    *,
    activation: str = "relu",
    seed: int = 0,
    scale: float = 1.0,
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a random layer in float64; `rank` is that of the inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(samples, in_features) + 0.5
    if rank is not None:
        inputs = normal(samples, rank) @ normal(rank, in_features)
    outputs = inputs @ normal(in_features, out_features) + normal(out_features)
    targets = outputs.relu() if activation == "relu" else outputs
    return scale * inputs, scale * targets
