"""A network's structure is plain data, and a model of another structure is refused by name."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import ddlr
from ddlr import (
    LowRankConvolution,
    LowRankLinear,
    PivotedConvolution,
    SelectedLinear,
    SeparableConvolution,
)
from ddlr.structure import FORMS, fitted, network_of, structure_of


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in model.state_dict().items()}


def selected(inner: nn.Module) -> SelectedLinear:
    return SelectedLinear(inner, mask(4, [0, 2]), mask(6, [1, 4, 5]))


def mask(total: int, chosen: list[int]) -> torch.Tensor:
    return torch.isin(torch.arange(total), torch.tensor(chosen))


def conv_pair(stride: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 2, (3, 1), stride=(stride, 1), padding=(1, 0), bias=False),
        nn.Conv2d(2, 8, (1, 3), stride=(1, stride), padding=(0, 1)),
    )


NETWORKS = {
    "plain": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
    "a layer alone": nn.Linear(4, 6),
    "low rank alone": LowRankLinear(4, 6, 2),
    "rank 0": nn.Sequential(LowRankLinear(4, 6, 0), nn.ReLU()),
    "pivoted": nn.Sequential(ddlr.PivotedLinear(4, 6, 2), nn.ReLU()),
    "pivoted without bias": nn.Sequential(ddlr.PivotedLinear(4, 6, 2, bias=False), nn.ReLU()),
    "selected": nn.Sequential(selected(nn.Linear(2, 3, bias=False)), nn.ReLU()),
    "selected low rank": nn.Sequential(selected(LowRankLinear(2, 3, 1)), nn.ReLU()),
    "sum": nn.Sequential(
        ddlr.SparsePlusLowRank(nn.Linear(4, 6, bias=False), LowRankLinear(4, 6, 2)), nn.ReLU()
    ),
    "sum of a selection": nn.Sequential(
        ddlr.SparsePlusLowRank(selected(nn.Linear(2, 3, bias=False)), ddlr.PivotedLinear(4, 6, 2))
    ),
    "factors": ddlr.SparseFactors(nn.Linear(4, 3, bias=False), nn.Linear(3, 6)),
    "nested": nn.Sequential(nn.Sequential(LowRankLinear(4, 6, 2)), nn.Tanh()),
    "low-rank convolution": nn.Sequential(
        LowRankConvolution(3, 8, 2, (3, 5), stride=(2, 1), padding=(1, 0), padding_mode="reflect"),
        nn.ReLU(),
    ),
    "pivoted convolution": nn.Sequential(PivotedConvolution(3, 8, 2, (3,), stride=2), nn.ReLU()),
    "separable convolution": nn.Sequential(
        SeparableConvolution(3, 8, 2, (3, 5), padding="same", padding_mode="circular"), nn.ReLU()
    ),
    "convolutions": nn.Sequential(conv_pair(), nn.ReLU()),
}


@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
def test_a_network_is_made_again_from_its_structure(model):
    structure = json.loads(json.dumps(structure_of(model)))
    again = network_of(structure)
    assert shapes(again) == shapes(model)
    kinds = [[type(each) for each in one.modules()] for one in (again, model)]
    assert kinds[0] == kinds[1]
    assert all(each.is_meta for each in again.parameters())
    assert structure_of(again) == structure


def test_all_forms_of_compressed_layers_are_described():
    public = [getattr(ddlr, name) for name in ddlr.__all__]
    modules = {each for each in public if isinstance(each, type) and issubclass(each, nn.Module)}
    # A sparse layer stands in a file as an array with zeros.
    assert {form.made for form in FORMS.values()} == modules - {ddlr.SparseLinear}


def test_a_module_with_several_names_stays_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model.insert(2, model[0])
    again = network_of(structure_of(model))
    assert again[2] is again[0] and len(list(again.modules())) == len(list(model.modules()))


class Net(nn.Module):
    def __init__(self, width: int = 6, activation: type = nn.ReLU, stride: int = 2, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
        self.fc1 = nn.Linear(4, width, bias=bias)
        self.activation = activation()
        self.fc2 = nn.Linear(width, 2)
        self.kept = {"again": self.fc1}

    def forward(self, inputs):
        return self.fc2(self.activation(self.fc1(inputs)))


def compressed(stride: int = 2) -> Net:
    model = Net()
    model.conv = conv_pair(stride)
    model.fc1 = LowRankLinear(4, 6, 2)
    model.fc2 = SelectedLinear(nn.Linear(3, 2), mask(6, [0, 1, 5]), mask(2, [0, 1]))
    return model


def test_the_layers_of_a_fresh_instance_are_replaced_wherever_it_holds_them():
    model = fitted(Net(), structure_of(compressed()))
    assert shapes(model) == shapes(compressed())
    assert type(model.fc1) is LowRankLinear and model.kept["again"] is model.fc1


def test_a_layer_with_several_names_is_replaced_under_all_of_them():
    def network(layer: nn.Module) -> nn.Sequential:
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = fitted(
        network(nn.Conv2d(3, 8, 3, stride=2, padding=1)), structure_of(network(conv_pair()))
    )
    assert shapes(model) == shapes(network(conv_pair())) and model[0] is model[2]


@pytest.mark.parametrize(
    "fresh",
    [
        Net(bias=False),
        parametrizations.weight_norm(Net().fc1),
        torch.nn.utils.spectral_norm(Net().fc1),
        LowRankLinear(4, 6, 1),
    ],
    ids=["another bias", "parametrised", "with a hook", "compressed already"],
)
def test_a_linear_layer_takes_the_place_of_others(fresh):
    saved = Net() if isinstance(fresh, Net) else nn.Linear(4, 6)
    assert shapes(fitted(fresh, structure_of(saved))) == shapes(saved)


def test_a_layer_that_is_computed_from_others_stays_so_if_it_was_saved_so():
    for norm in (torch.nn.utils.spectral_norm, parametrizations.weight_norm):
        saved = nn.Sequential(norm(nn.Linear(4, 6)))
        assert shapes(fitted(nn.Sequential(norm(nn.Linear(4, 6))), structure_of(saved))) == shapes(
            saved
        )


def with_more() -> Net:
    model = Net()
    model.more = nn.Dropout()
    return model


def with_one_layer_twice() -> Net:
    model = Net()
    model.more = model.fc2
    return model


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        (Net(width=7), r"'fc1' is a LowRankLinear of 4 inputs and 6 outputs .* 7 outputs"),
        (Net(activation=nn.Tanh), "'activation' is a ReLU in the file, and a Tanh in the model"),
        (Net(stride=1), r"'conv' is a Sequential of .*stride \[2, 2\].*stride \[1, 1\]"),
        (with_more(), "'more' of the model is missing in the file"),
        (with_one_layer_twice(), "'more' of the model is missing in the file"),
        (nn.Sequential(), "the network itself is a Net in the file, and a Sequential"),
    ],
    ids=["width", "activation", "stride", "more", "shared", "another network"],
)
def test_a_model_of_another_structure_is_refused(fresh, message):
    with pytest.raises(ValueError, match=message):
        fitted(fresh, structure_of(compressed()))


@pytest.mark.parametrize(
    ("saved", "fresh", "message"),
    [
        (nn.MaxPool2d(2), nn.MaxPool2d(3), "'0' is a MaxPool2d with kernel_size=2, stride=2 in"),
        (nn.Linear(4, 6), nn.Linear(4, 5), "'0' is a Linear with out_features=6 in the file"),
        (nn.Linear(4, 6), nn.Conv2d(4, 6, 1), "'0' is a Linear of 4 inputs and 6 outputs"),
        (nn.Linear(4, 6), nn.ReLU(), "'0' is a Linear of 4 inputs and 6 outputs in the file"),
    ],
    ids=["pooling", "outputs", "convolution", "no layer"],
)
def test_arguments_and_classes_are_compared(saved, fresh, message):
    with pytest.raises(ValueError, match=message):
        fitted(nn.Sequential(fresh), structure_of(nn.Sequential(saved)))


def test_sharing_is_compared():
    one = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other = nn.Sequential(one[0], one[0])
    with pytest.raises(ValueError, match="'1' is the same as '0' in the file"):
        fitted(one, structure_of(other))
    with pytest.raises(ValueError, match="'1' is one of its own in the file"):
        fitted(other, structure_of(one))


def test_what_a_file_does_not_hold_needs_a_model():
    with pytest.raises(ValueError, match=r"the network itself is a Net, .* load\(path, model\)"):
        network_of(structure_of(Net()))
    hooked = nn.Sequential(nn.ReLU(), nn.Linear(4, 6))
    hooked[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="module '0' had hooks"):
        network_of(structure_of(hooked))


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({}, "the network itself is missing"),
        ({"": {"class": "os", "arguments": {}}}, "not a module of torch"),
        ({"": {"form": "eval", "arguments": {}}}, "a form that this version does not know"),
        ({"": {"form": ["eval"], "arguments": {}}}, "a form that this version does not know"),
        ({"": {"form": "LowRankLinear", "arguments": {"rank": -1}}}, "can not be made"),
        ({"": {"form": "SelectedLinear", "arguments": {"layer": 3}}}, "can not be made"),
        ({"": {"form": "PivotedLinear", "arguments": {"out_features": 10**10}}}, "its sizes are"),
        (
            {"": {"class": "Sequential", "arguments": {}}, "a.b": {"same_as": ""}},
            r"module 'a\.b' is",
        ),
        ({"": {"class": "ReLU", "arguments": {}}, "a": {"same_as": ""}}, "'a' is a part of"),
        ({"": {"class": "Sequential", "arguments": {}}, "a": {"same_as": "b"}}, "'a' is"),
    ],
    ids=str,
)
def test_other_structures_are_refused(structure, message):
    with pytest.raises(ValueError, match=message):
        network_of(structure)
