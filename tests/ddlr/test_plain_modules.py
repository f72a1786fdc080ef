"""Modules of torch are made again from plain words, and nothing else is."""

import inspect

import pytest
import torch
from torch import nn

from ddlr.plain_modules import _ARGUMENTS, made_plain, plain_arguments

# What only sets first values, or says where they are, has an old name or is modules itself.
NO_STRUCTURE = {
    "modules",
    "device",
    "dtype",
    "init",
    "_weight",
    "_freeze",
    "min_value",
    "max_value",
}

UNUSUAL = [
    nn.Linear(3, 4, bias=False),
    nn.Bilinear(3, 4, 5, bias=False),
    nn.Embedding(7, 3, padding_idx=2, max_norm=1.5),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False),
    nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="reflect"),
    nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
    nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False),
    nn.InstanceNorm1d(4, affine=True),
    nn.GroupNorm(2, 4, affine=False),
    nn.LayerNorm((3, 4), eps=1e-3, bias=False),
    nn.Flatten(2),
    nn.Unflatten(1, (2, 3)),
    nn.Dropout(0.2),
    nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True),
    nn.AvgPool2d((2, 3), count_include_pad=False),
    nn.AdaptiveAvgPool2d((None, 2)),
    nn.ZeroPad2d((1, 2, 3, 4)),
    nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True),
    nn.PReLU(3),
    nn.LeakyReLU(0.3),
    nn.GELU("tanh"),
    nn.Softmax(dim=-1),
    nn.Hardtanh(-2.0, 3.0),
]


@pytest.mark.parametrize("module", UNUSUAL, ids=lambda each: type(each).__name__)
def test_a_module_is_made_again(module):
    again = made_plain(type(module).__name__, plain_arguments(module))
    assert type(again) is type(module) and repr(again) == repr(module)
    shapes = [
        {key: one.shape for key, one in each.state_dict().items()} for each in (again, module)
    ]
    assert shapes[0] == shapes[1]
    for name in _ARGUMENTS[type(module)]:
        mine, other = (getattr(each, name, None) for each in (again, module))
        assert mine is other or isinstance(mine, torch.Tensor) or mine == other, name


@pytest.mark.parametrize("made", _ARGUMENTS, ids=lambda each: each.__name__)
def test_the_table_has_all_arguments_of_a_class(made):
    """One that is left out would come back as its default, without a word."""
    takes = inspect.signature(made).parameters.values()
    names = {each.name for each in takes if each.kind is each.POSITIONAL_OR_KEYWORD}
    assert names - NO_STRUCTURE - set(_ARGUMENTS[made]) == set()


def test_what_is_not_in_the_table_is_not_described():
    class Mine(nn.Linear):
        pass

    assert plain_arguments(Mine(2, 3)) is None
    assert plain_arguments(nn.LSTM(2, 3)) is None
    dropout = nn.Dropout()
    dropout.p = torch.tensor(0.5)
    assert plain_arguments(dropout) is None


@pytest.mark.parametrize(
    ("word", "arguments", "message"),
    [
        ("system", {}, "not a module of torch"),
        ("torch.nn.Linear", {}, "not a module of torch"),
        (["Linear"], {}, "not a module of torch"),
        ("Linear", {"in_features": 3, "device": "cpu"}, "does not have"),
        ("Linear", [3, 4], "does not have"),
        ("Linear", {"in_features": 3}, "missing"),
        ("Linear", {"in_features": {"a": 1}, "out_features": 2}, "not plain"),
        ("ReLU", {"inplace": [[1]]}, "not plain"),
    ],
    ids=str,
)
def test_other_words_and_arguments_of_a_file_are_refused(word, arguments, message):
    with pytest.raises(ValueError, match=message):
        made_plain(word, arguments)
