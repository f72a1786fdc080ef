"""What all forms of a compressed layer have in common, and the dense layer that each equals."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class StoredForm:
    """A module that computes ``inputs @ weight.T + bias``, whatever it stores.

    It has `in_features`, `out_features`, `weight` and `bias` like an `nn.Linear`; `bias` may be
    None. Its weight is computed from what it stores, so it is no parameter.
    """

    weight: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """A new `nn.Linear` with the same outputs, up to rounding, for tools that know no other."""
        return store_linear(self.weight, self.bias).train(self.training)


@torch.no_grad()
def store_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with the given weight and bias."""
    with empty_weights_allowed():
        layer = nn.utils.skip_init(
            nn.Linear,
            weight.shape[1],
            weight.shape[0],
            bias=bias is not None,
            dtype=weight.dtype,
            device=weight.device,
        )
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


@contextmanager
def empty_weights_allowed() -> Iterator[None]:
    """No warning of torch where a layer is made whose weight has no entries."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        yield
