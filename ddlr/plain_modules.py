"""The modules of torch that a file can describe: their classes, and the arguments that make them.

A file names a class by a word of this table, and nothing else of a file is looked up anywhere.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_CONVOLUTION = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    *("dilation", "groups", "bias", "padding_mode"),
)
_TRANSPOSED = (*_CONVOLUTION, "output_padding")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats", "bias")
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_AVERAGE_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

# The class, and its arguments, which it keeps as attributes of the same name: all but device, dtype
# and what only sets first values. `bias` is whether there is one.
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Sequential: (),
    nn.ModuleList: (),
    nn.ModuleDict: (),
    nn.Identity: (),
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Bilinear: ("in1_features", "in2_features", "out_features", "bias"),
    nn.Embedding: (
        *("num_embeddings", "embedding_dim", "padding_idx"),
        *("max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    ),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.InstanceNorm1d: _BATCH_NORM,
    nn.InstanceNorm2d: _BATCH_NORM,
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine", "bias"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.Dropout: ("p", "inplace"),
    nn.Dropout1d: ("p", "inplace"),
    nn.Dropout2d: ("p", "inplace"),
    nn.Dropout3d: ("p", "inplace"),
    nn.AlphaDropout: ("p", "inplace"),
    nn.MaxPool1d: _MAX_POOL,
    nn.MaxPool2d: _MAX_POOL,
    nn.MaxPool3d: _MAX_POOL,
    nn.AvgPool1d: _AVERAGE_POOL,
    nn.AvgPool2d: (*_AVERAGE_POOL, "divisor_override"),
    nn.AvgPool3d: (*_AVERAGE_POOL, "divisor_override"),
    nn.AdaptiveAvgPool1d: ("output_size",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveAvgPool3d: ("output_size",),
    nn.AdaptiveMaxPool1d: ("output_size", "return_indices"),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.ZeroPad2d: ("padding",),
    nn.ReflectionPad2d: ("padding",),
    nn.ReplicationPad2d: ("padding",),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"),
    nn.PixelShuffle: ("upscale_factor",),
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.PReLU: ("num_parameters",),
    nn.ELU: ("alpha", "inplace"),
    nn.CELU: ("alpha", "inplace"),
    nn.SELU: ("inplace",),
    nn.GELU: ("approximate",),
    nn.SiLU: ("inplace",),
    nn.Mish: ("inplace",),
    nn.Sigmoid: (),
    nn.LogSigmoid: (),
    nn.Tanh: (),
    nn.Softplus: ("beta", "threshold"),
    nn.Softsign: (),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.Hardsigmoid: ("inplace",),
    nn.Hardswish: ("inplace",),
}
_CLASSES = {each.__name__: each for each in _ARGUMENTS}
_PLAIN = bool | int | float | str | None


def plain_arguments(module: nn.Module) -> dict[str, Any] | None:
    """The arguments that make a module of torch, as JSON has them; None if it is not in the table.

    Those that are as by default are left out.
    """
    names = _ARGUMENTS.get(type(module))
    if names is None:
        return None
    defaults = inspect.signature(type(module)).parameters
    arguments = {}
    for name in names:
        if name not in defaults:
            continue  # older versions of torch do not have it
        value = getattr(module, name)
        if name == "bias":
            value = value is not None
        if isinstance(value, tuple):
            value = list(value)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, _PLAIN) for each in values):
            return None
        if type(value) is not type(defaults[name].default) or value != defaults[name].default:
            arguments[name] = value
    return arguments


def is_plain_class(word: object) -> bool:
    return isinstance(word, str) and word in _CLASSES


def made_plain(word: str, arguments: object) -> nn.Module:
    """The module of torch that a word and arguments of a file stand for.

    Raises
    ------
    ValueError
        If there is no such class in the table, or it does not take the arguments; says which.
    """
    if not is_plain_class(word):
        raise ValueError(f"a {word!r}, which is not a module of torch that files can describe")
    made = _CLASSES[word]
    if not isinstance(arguments, Mapping) or not set(arguments) <= set(_ARGUMENTS[made]):
        raise ValueError(f"a {word} with arguments {arguments!r}, which it does not have")
    given = {}
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, _PLAIN) for each in values):
            raise ValueError(f"a {word} with {name}={value!r}, which is not plain")
        given[name] = tuple(value) if isinstance(value, list) else value
    try:
        return made(**given)
    except Exception as error:
        raise ValueError(f"a {word} with arguments {arguments!r}: {error}") from error
