"""Layers are chosen by name, glob or predicate, and left out in the same ways."""

import pytest
import torch
from torch import nn

from ddlr.selection import select_layers


def network() -> nn.Module:
    block = lambda: nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})  # noqa: E731
    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "head": nn.Linear(4, 2)})
    model["again"] = model["head"]
    model["norm"] = nn.LayerNorm(4)
    return model


ALL = [
    *("blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value"),
    "head",
]


@pytest.mark.parametrize(
    ("layers", "exclude", "names", "explicit"),
    [
        (None, None, ALL, []),
        ("all", None, ALL, []),
        (None, "head", ALL[:4], []),
        ("blocks.*", None, ALL[:4], []),
        (["*.query", "head"], None, [ALL[0], ALL[2], "head"], ["head"]),
        ("*", ["*.value", "head"], [ALL[0], ALL[2]], []),
        ("again", None, ["head"], ["head"]),
        (lambda name, layer: layer.out_features == 2, None, ["head"], []),
        (None, lambda name, layer: name.startswith("blocks"), ["head"], []),
        (["head", "blocks.0.query"], "head", ["blocks.0.query"], ["blocks.0.query"]),
    ],
)
def test_layers_are_chosen(layers, exclude, names, explicit):
    selection = select_layers(network(), layers, exclude)
    assert list(selection.names) == names
    assert selection.explicit == set(explicit)


@pytest.mark.parametrize(
    ("layers", "exclude", "message"),
    [
        ("body.*", None, r"layer 'body.\*', named in layers, matches no layer"),
        (["neck"], None, "layer 'neck', named in layers, is no layer"),
        (["norm"], None, "layer 'norm', named in layers, is a LayerNorm, and no linear layer"),
        (["head", "again"], None, "'head' and 'again', which are one layer under two names"),
        (["head", "head"], None, "has 'head' twice"),
        ([], None, "layers is empty"),
        ([0], None, "layers has 0"),
        (3, None, "layers is 3"),
        (lambda name, layer: False, None, "a function that chooses none"),
        (None, "*", "exclude leaves no layer"),
        (None, "neck", "layer 'neck', named in exclude"),
    ],
)
def test_what_chooses_nothing_is_refused(layers, exclude, message):
    with pytest.raises(ValueError, match=message):
        select_layers(network(), layers, exclude)


def test_a_quantised_layer_is_refused_with_what_to_do():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="quantised; compress first"):
        select_layers(quantised, ["0"])
    with pytest.raises(ValueError, match="no fully connected layer"):
        select_layers(quantised)
