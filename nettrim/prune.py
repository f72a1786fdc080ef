"""Net-Trim for whole networks: network in, pruned copy and reports out."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ddlr.layerwise import CapturedLayers, compress_layers, start_from_original
from ddlr.result import CompressionResult, LayerReport
from nettrim.sparse import solve_sparse


def prune(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor] | CapturedLayers,
    *,
    relative_tolerance: float,
    constraint: str = "net_trim",
    layers: Sequence[str] | None = None,
    activations: Mapping[str, str] | None = None,
    tolerance: float = 1e-2,
    max_iterations: int = 5000,
    raise_on_failure: bool = True,
    workers: int = 1,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> CompressionResult:
    """Make the fully connected layers of a trained network sparse, without retraining.

    Each `nn.Linear` is solved on its own, on the original network's activations, by
    `nettrim.solve_sparse` with the bound ``relative_tolerance * ||its output||_F``, and replaced by
    an `nn.Linear` with that weight.

    Parameters, return value and errors are those of `ddlr.compress`.

    References
    ----------
    Aghasi, Abdi, Nguyen and Romberg (2017), Net-Trim, NIPS; Aghasi, Abdi and Romberg (2020),
    arXiv 1806.06457: the parallel scheme.
    """
    solve = start_from_original(
        solve_sparse, constraint=constraint, tolerance=tolerance, max_iterations=max_iterations
    )
    return compress_layers(
        model,
        calibration,
        relative_tolerance=relative_tolerance,
        solve=solve,
        store=store_linear,
        layers=layers,
        activations=activations,
        raise_on_failure=raise_on_failure,
        workers=workers,
        on_layer=on_layer,
    )


@torch.no_grad()
def store_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with the given weight and bias."""
    layer = nn.utils.skip_init(nn.Linear, *weight.T.shape, dtype=weight.dtype, device=weight.device)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer
