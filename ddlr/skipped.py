"""The weights of a network that are left as they are, though layers like them are compressed."""

from collections.abc import Mapping, Sequence

from torch import nn

from ddlr.linear_maps import kind_of
from ddlr.result import SkippedStatus, SkippedWeights


def skipped_weights(
    model: nn.Module,
    refused: Mapping[str, tuple[SkippedStatus, str]],
    captured: Sequence[str],
) -> tuple[SkippedWeights, ...]:
    """What is left of a network's weights besides its captured layers, with its share.

    Parameters
    ----------
    refused : mapping
        Layers that were chosen and cannot be compressed: why, as a status and in words.
    captured : sequence of str
    """
    left = {
        name: (_weights(model.get_submodule(name)), status, reason)
        for name, (status, reason) in refused.items()
    }
    for name, parameters, reason in _packed(model):
        left[name] = parameters, SkippedStatus.PACKED, reason
    total = sum(count for count, _, _ in left.values())
    total += sum(_weights(model.get_submodule(name)) for name in captured)
    return tuple(
        SkippedWeights(name, parameters, parameters / total, status, reason)
        for name, (parameters, status, reason) in left.items()
    )


def _weights(layer: nn.Module) -> int:
    in_features, out_features = kind_of(layer).features(layer)
    return in_features * out_features


def _packed(model: nn.Module) -> list[tuple[str, int, str]]:
    """Matrices that are part of modules which are no linear layers, and no tables of vectors."""
    inside: set[nn.Module] = set()
    found = []
    for name, module in model.named_modules():
        if module in inside:
            continue
        if kind_of(module) is not None or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            inside.update(module.modules())
            continue
        found += [
            (
                f"{name}.{kind}" if name else kind,
                parameter.numel(),
                f"is a parameter of a {type(module).__name__}, which is no linear layer",
            )
            for kind, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 2
        ]
    return found
