"""Convolutions as linear maps on patches, and convolutions of low rank.

A patch is what the kernel covers at one place of an image: a convolution multiplies each patch by
the kernel as a matrix of shape (out_channels, in_channels * kernel area). Of low rank, it is a
convolution to `rank` channels and one of 1 x 1 behind it (Zhang et al. 2016, arXiv 1505.06798).

Not built is the other split, into k x 1 and 1 x k (Jaderberg et al. 2014, arXiv 1405.3866), though
it needs fewer weights: at 30 % of them, fitted to 500 images, it left 7 to 21 % of the output's
deviation from its mean, and this one 31 to 40 %, on the convolutions behind the first of LeNet-5,
`vgg_small` and `convnet_nettrim`; on the first ones this one was better.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddlr.convolution_forms import (
    GEOMETRY,
    WITHOUT_GROUPS,
    LowRankConvolution,
    PivotedConvolution,
    margins_of,
    span,
)
from ddlr.fully_connected import LinearMap
from ddlr.layers import LowRankLinear, store_linear
from ddlr.untouched import random_state_kept

# The most patches that are kept of one convolution: this many, or so many for each of its inputs
# where that is more. Patches of one image overlap, so that further ones say little.
MOST_PATCHES = 10_000
PATCHES_PER_INPUT = 4

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# TF32, which torch lets convolutions on a GPU round their inputs to, has 10 bits.
_TF32_WITHIN = 1e-2


class Convolution(LinearMap):
    """An `nn.Conv1d` or `nn.Conv2d` of any geometry, without groups.

    Rows of its inputs are patches, in the order of the places of its outputs. Other convolutions
    are of this kind too, and unsupported.
    """

    on_patches = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, (*WITHOUT_GROUPS, nn.Conv3d, *_TRANSPOSED))

    def unsupported(self, module: nn.Module) -> str:
        if not isinstance(module, WITHOUT_GROUPS):
            return f"is a {type(module).__name__}, of which no patches are made"
        if module.groups > 1:
            return f"is a {type(module).__name__} of {module.groups} groups, each a map of its own"
        return ""

    def features(self, module: nn.Module) -> tuple[int, int]:
        return module.weight.numel() // module.out_channels, module.out_channels

    def weight(self, module: nn.Module) -> Tensor:
        return module.weight.flatten(1)

    def leading_shape(self, module: nn.Module, outputs: Tensor) -> tuple[int, ...]:
        """The samples and the sides of the images."""
        return tuple(outputs.movedim(_channels(module), -1).shape[:-1])

    def input_rows(self, module: nn.Module, inputs: Tensor, rows: Tensor | None) -> Tensor:
        return patches(_geometry_of(module), inputs.detach(), rows)

    def output_rows(self, module: nn.Module, outputs: Tensor, rows: Tensor | None) -> Tensor:
        return super().output_rows(module, outputs.movedim(_channels(module), -1), rows)

    def as_given(self, rows: Tensor, outputs: Tensor) -> Tensor:
        # In the order in memory that it had: by that, what reads it may round otherwise.
        return outputs.detach().clone()

    def linear_within(self, outputs: Tensor) -> float:
        rounded = outputs.is_cuda and torch.backends.cudnn.allow_tf32
        within = super().linear_within(outputs)
        return max(within, _TF32_WITHIN) if rounded else within

    def about_inputs(self, module: nn.Module) -> tuple:
        return tuple(getattr(module, name) for name in GEOMETRY)

    def most_rows(self, module: nn.Module) -> int | None:
        return max(MOST_PATCHES, PATCHES_PER_INPUT * self.features(module)[0])

    def wrapped(self, original: nn.Module, layer: nn.Module) -> nn.Module:
        return convolution_of(_geometry_of(original), layer)

    def as_layer(self, module: nn.Module) -> nn.Module:
        bias = self.bias(module)
        return store_linear(self.weight(module).detach(), None if bias is None else bias.detach())


class CompressedConvolution(Convolution):
    """A convolution that was compressed before, in two parts, as one linear map."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, LowRankConvolution | PivotedConvolution)

    def unsupported(self, module: nn.Module) -> str:
        return ""

    def features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_channels * math.prod(module.kernel_size), module.out_channels

    @torch.no_grad()
    def as_layer(self, module: nn.Module) -> nn.Module:
        if isinstance(module, PivotedConvolution):
            return module.on_patches()
        first, second = module[0].weight.flatten(1), module[1].weight.flatten(1)
        return _low_rank_linear(first, second, module.bias)

    def is_plain(self, module: nn.Module) -> bool:
        return False  # its weight is the product of its parts


def patches(convolution: nn.Module, inputs: Tensor, rows: Tensor | None = None) -> Tensor:
    """What the kernel covers at each place of its outputs, as rows, or at some of these places.

    Takes memory for the rows and, where it is padded, for the input.

    Parameters
    ----------
    convolution : nn.Conv1d or nn.Conv2d
    inputs : Tensor, shape (samples, in_channels, *sides), or without samples
    rows : Tensor, optional
        Indices among all rows.

    Returns
    -------
    Tensor, shape (rows, in_channels * kernel area)
        Samples come first, then rows of the image, as in ``outputs.movedim(1, -1)``.
    """
    dims = len(convolution.kernel_size)
    images = inputs if inputs.ndim == dims + 2 else inputs[None]
    margins = [margin for pair in reversed(margins_of(convolution)) for margin in pair]
    if any(margins):
        mode = convolution.padding_mode
        images = functional.pad(images, margins, "constant" if mode == "zeros" else mode)
    windows = images  # becomes a view with one more dimension for each side of the kernel
    for side in range(dims):
        size, spread = convolution.kernel_size[side], convolution.dilation[side]
        windows = windows.unfold(2 + side, span(size, spread), convolution.stride[side])
        windows = windows[..., ::spread]
    windows = windows.movedim(1, 1 + dims)
    if rows is None:
        return windows.flatten(1 + dims).flatten(0, dims)
    places = torch.unravel_index(rows.to(windows.device), windows.shape[: 1 + dims])
    return windows[places].flatten(1)


@torch.no_grad()
def convolution_of(like: nn.Module, layer: nn.Module) -> nn.Module:
    """A layer on patches as a convolution of the geometry of another one.

    Parameters
    ----------
    like : nn.Conv1d or nn.Conv2d
    layer : nn.Linear or LowRankLinear

    Raises
    ------
    TypeError
        If it is a layer of another form.
    """
    geometry = {name: getattr(like, name) for name in GEOMETRY}
    kernel = (like.in_channels, *like.kernel_size)
    factory = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    if type(layer) is LowRankLinear:
        with random_state_kept():  # the initial values are overwritten
            made = LowRankConvolution(
                like.in_channels, layer.out_features, layer.rank, **geometry, **factory
            )
        made[0].weight.copy_(layer[0].weight.unflatten(1, kernel))
        made[1].weight.copy_(layer[1].weight.reshape(made[1].weight.shape))
        made[1].bias.copy_(layer.bias)
        return made
    if type(layer) is not nn.Linear:
        raise TypeError(
            f"a convolution can not be stored as a {type(layer).__name__}; it must be an nn.Linear "
            "or a LowRankLinear"
        )
    made = nn.utils.skip_init(
        WITHOUT_GROUPS[len(like.kernel_size) - 1],
        like.in_channels,
        layer.out_features,
        bias=layer.bias is not None,
        **geometry,
        **factory,
    )
    made.weight.copy_(layer.weight.unflatten(1, kernel))
    if layer.bias is not None:
        made.bias.copy_(layer.bias)
    return made


def _low_rank_linear(first: Tensor, second: Tensor, bias: Tensor) -> LowRankLinear:
    with random_state_kept():  # the initial values are overwritten
        layer = LowRankLinear(
            first.shape[1], len(second), len(first), dtype=first.dtype, device=first.device
        )
    layer[0].weight.copy_(first)
    layer[1].weight.copy_(second)
    layer[1].bias.copy_(bias)
    return layer


def _geometry_of(module: nn.Module) -> nn.Module:
    """The convolution itself, or the one of two that has the kernel."""
    if isinstance(module, PivotedConvolution):
        return module.pivot_rows
    return module[0] if isinstance(module, LowRankConvolution) else module


def _channels(module: nn.Module) -> int:
    """The dimension of channels, from the end: there may be no dimension of samples."""
    return -len(module.kernel_size) - 1
