"""The forms in which a compressed convolution is stored."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ddlr.index_sets import IndexSet
from ddlr.layers import PivotedLinear
from ddlr.stored_form import empty_weights_allowed
from ddlr.untouched import random_state_kept

WITHOUT_GROUPS = (nn.Conv1d, nn.Conv2d)
GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


class LowRankConvolution(nn.Sequential):
    """A convolution of given rank: one to `rank` channels without bias, then one of 1 x 1.

    Parameters
    ----------
    in_channels, out_channels, rank : int
        Rank 0 is allowed, and leaves only the bias.
    kernel_size : sequence of int
        One number for sequences (`nn.Conv1d`), two for images (`nn.Conv2d`).
    stride, padding, dilation, padding_mode : optional
        Of the first convolution, as torch takes them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        kernel_size: tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        **factory: Any,
    ):
        kind = WITHOUT_GROUPS[len(kernel_size) - 1]
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        with empty_weights_allowed():
            super().__init__(
                kind(
                    in_channels,
                    rank,
                    tuple(kernel_size),
                    bias=False,
                    padding_mode=padding_mode,
                    **geometry,
                    **factory,
                ),
                kind(rank, out_channels, 1, **factory),
            )
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.groups = 1
        for name in GEOMETRY:
            setattr(self, name, getattr(self[0], name))

    def forward(self, input: Tensor) -> Tensor:
        if self.rank:
            return super().forward(input)
        # Torch has no convolutions without channels.
        dims = len(self.kernel_size)
        bias = self.bias.reshape(-1, *[1] * dims)
        return bias.expand(*input.shape[: -dims - 1], -1, *self._sides(input)).contiguous()

    def _sides(self, input: Tensor) -> list[int]:
        """Height and width of the outputs, or their length."""
        conv = self[0]
        return [
            (side + before + after - span(size, spread)) // step + 1
            for side, (before, after), size, spread, step in zip(
                input.shape[-len(self.kernel_size) :],
                margins_of(conv),
                conv.kernel_size,
                conv.dilation,
                conv.stride,
                strict=True,
            )
        ]

    @property
    def weight(self) -> Tensor:
        """The kernel of one convolution with the same outputs."""
        matrix = self[1].weight.flatten(1) @ self[0].weight.flatten(1)
        return matrix.unflatten(1, (self.in_channels, *self.kernel_size))

    @property
    def bias(self) -> Tensor:
        return self[1].bias


class PivotedConvolution(nn.Module):
    """A convolution of given rank, with fewer weights than two in sequence and equal outputs.

    As many output channels as the rank, the pivots, come from a convolution with the kernel's size;
    the others are combinations of them, by one of 1 x 1. See `ddlr.layers.PivotedLinear`. The
    geometry is given as for `LowRankConvolution`.

    Parameters
    ----------
    in_channels, out_channels, rank : int
        The rank is from 1 to `out_channels`.
    bias : bool
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        kernel_size: tuple[int, ...],
        *,
        bias: bool = True,
        **geometry: Any,
    ):
        if not 1 <= rank <= out_channels:
            raise ValueError(f"rank is {rank}; it must be from 1 to out_channels, {out_channels}")
        super().__init__()
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.groups = 1
        factory = {key: geometry[key] for key in ("dtype", "device") if key in geometry}
        kind = WITHOUT_GROUPS[len(kernel_size) - 1]
        with empty_weights_allowed():
            self.pivot_rows = kind(in_channels, rank, tuple(kernel_size), bias=False, **geometry)
            self.other_rows = nn.Linear(rank, out_channels - rank, bias=False, **factory)
        for name in GEOMETRY:
            setattr(self, name, getattr(self.pivot_rows, name))
        self.pivots = IndexSet(rank, out_channels, factory.get("device"))
        like = self.pivot_rows.weight
        self.bias = nn.Parameter(like.new_zeros(out_channels)) if bias else None

    @classmethod
    @torch.no_grad()
    def of(cls, convolution: LowRankConvolution) -> "PivotedConvolution":
        """The same map, up to rounding, with fewer weights; of a rank from 1 to out_channels."""
        right, left = convolution[0].weight.flatten(1), convolution[1].weight.flatten(1)
        layer = PivotedLinear.from_factors(left, right, convolution.bias)
        geometry = {name: getattr(convolution, name) for name in GEOMETRY}
        with random_state_kept():  # the initial values are overwritten
            made = cls(
                convolution.in_channels,
                convolution.out_channels,
                convolution.rank,
                **geometry,
                dtype=left.dtype,
                device=left.device,
            )
        made.pivots = layer.pivots
        made.pivot_rows.weight.copy_(layer.pivot_rows.weight.view_as(made.pivot_rows.weight))
        made.other_rows.weight.copy_(layer.other_rows.weight)
        given = (left != 0).any(dim=1)[layer.pivots.order[convolution.rank :]]
        made.other_rows.weight *= given[:, None]  # no rounding where there was no weight
        made.bias.copy_(layer.bias)
        return made

    @torch.no_grad()
    def on_patches(self) -> PivotedLinear:
        """A copy as a layer on patches."""
        inputs = self.pivot_rows.weight[0].numel()
        like = {"dtype": self.pivot_rows.weight.dtype, "device": self.pivot_rows.weight.device}
        with random_state_kept():
            layer = PivotedLinear(
                inputs, self.out_channels, self.rank, bias=self.bias is not None, **like
            )
        layer.pivots = copy.deepcopy(self.pivots)
        layer.pivot_rows.weight.copy_(self.pivot_rows.weight.flatten(1))
        layer.other_rows.weight.copy_(self.other_rows.weight)
        if self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        pivots, channels = self.pivot_rows(input), -len(self.kernel_size) - 1
        outputs = pivots
        if self.rank < self.out_channels:
            others = self.other_rows(pivots.movedim(channels, -1)).movedim(-1, channels)
            outputs = torch.cat([pivots, others], dim=channels)
        outputs = outputs.index_select(channels, self.pivots.places)
        if self.bias is None:
            return outputs
        return outputs + self.bias.reshape(-1, *[1] * len(self.kernel_size))

    @property
    def weight(self) -> Tensor:
        """The kernel of one convolution with the same outputs."""
        pivots = self.pivot_rows.weight.flatten(1)
        matrix = torch.cat([pivots, self.other_rows.weight @ pivots])[self.pivots.places]
        return matrix.unflatten(1, (self.in_channels, *self.kernel_size))


class SeparableConvolution(nn.Sequential):
    """A convolution as two: one of height x 1 to `terms` channels without bias, one of 1 x width.

    Equal to one convolution whose kernel is a sum of so many products of a column and a row. The
    geometry is given as for `nn.Conv2d`; each part has that of its side of the image.

    Parameters
    ----------
    in_channels, out_channels, terms : int
        There is at least one term.
    kernel_size : (int, int)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        terms: int,
        kernel_size: tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        **factory: Any,
    ):
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        one = nn.Conv2d(1, 1, kernel_size, padding_mode=padding_mode, **geometry, device="meta")
        geometry = {name: getattr(one, name) for name in GEOMETRY}
        down = {name: _one_side(name, value, 0) for name, value in geometry.items()}
        across = {name: _one_side(name, value, 1) for name, value in geometry.items()}
        super().__init__(
            nn.Conv2d(in_channels, terms, bias=False, **down, **factory),
            nn.Conv2d(terms, out_channels, **across, **factory),
        )
        self.in_channels, self.out_channels, self.terms = in_channels, out_channels, terms
        self.groups = 1
        for name, value in geometry.items():
            setattr(self, name, value)

    def whole(self) -> nn.Conv2d:
        """One convolution of the same geometry, without values."""
        geometry = {name: getattr(self, name) for name in GEOMETRY}
        return nn.Conv2d(self.in_channels, self.out_channels, **geometry, device="meta")

    @property
    def weight(self) -> Tensor:
        """The kernel of one convolution with the same outputs."""
        return torch.einsum("sci,osj->ocij", self[0].weight[..., 0], self[1].weight[:, :, 0])

    @property
    def bias(self) -> Tensor:
        return self[1].bias


def _one_side(name: str, value: Any, side: int) -> Any:
    """A setting of a convolution for one side of the image; on the other it does nothing."""
    if isinstance(value, str):
        return value
    nothing = 0 if name == "padding" else 1
    return tuple(number if each == side else nothing for each, number in enumerate(value))


def margins_of(convolution: nn.Module) -> list[tuple[int, int]]:
    """By how much each side of the image is padded, before and after, also where it says "same"."""
    flat = convolution._reversed_padding_repeated_twice
    return list(zip(flat[::2], flat[1::2], strict=True))[::-1]


def span(size: int, spread: int) -> int:
    """The side of what a dilated kernel covers."""
    return (size - 1) * spread + 1
