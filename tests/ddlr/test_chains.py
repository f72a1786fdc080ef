"""A fused network gives the outputs of the layers, with fewer multiplications, or is left alone."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from ddlr import compact
from ddlr.chains import LinearChain, fuse_chains
from ddlr.layers import LowRankLinear
from doors import compress, magnitude, prune

WIDTHS = (20, 14, 11, 6)


def made(activation: nn.Module | None = None, *, rank: int | None = 3) -> nn.Sequential:
    """Three layers, where the first reads half of its inputs, and the second 8 of its 14."""
    torch.manual_seed(0)
    activation = activation or nn.ReLU()
    layers = [nn.Linear(before, after) for before, after in pairwise(WIDTHS)]
    with torch.no_grad():
        layers[0].weight[:, ::2] = 0
        layers[1].weight[:, 8:] = 0
        # An output that is 0 before its activation, whatever goes in, and is read by the next.
        layers[0].weight[3], layers[0].bias[3] = 0, 0
    if rank is not None:
        layers[:2] = [
            LowRankLinear.from_weight(layer.weight.detach(), layer.bias.detach(), rank)
            for layer in layers[:2]
        ]
    return nn.Sequential(
        *(layers[0], activation, nn.Dropout(0.5), layers[1], nn.Tanh(), nn.Identity(), layers[2])
    ).eval()


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 20, generator=torch.Generator().manual_seed(1))


def check_equal(fused: nn.Module, model: nn.Module, batch: torch.Tensor) -> None:
    with torch.inference_mode():
        wanted = model(batch)
        torch.testing.assert_close(fused(batch), wanted, rtol=1e-5, atol=1e-6)
    assert fused(batch).is_contiguous()


def weights(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for name, tensor in model.state_dict().items() if "weight" in name]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.LeakyReLU(0.2), nn.GELU()])
@pytest.mark.parametrize("rank", [3, None])
def test_a_chain_gives_the_outputs_of_its_layers(activation, rank):
    model = made(activation, rank=rank)
    for given in (model, compact(model)):
        fused = fuse_chains(given)
        assert [type(part) for part in fused] == [LinearChain]
        for shape in ((1,), (7,), (0,), (), (2, 3), (2, 3, 4)):
            check_equal(fused, model, inputs(*shape))


def test_what_the_next_layer_does_not_read_is_not_computed():
    # Of the 8 outputs that are read, one is 0, and ReLU leaves it at 0; a sigmoid does not.
    for activation, read in ((nn.ReLU(), 7), (nn.Sigmoid(), 8)):
        fused = fuse_chains(made(activation))
        assert weights(fused) == [(3, 20), (read, 3), (3, read), (11, 3), (6, 11)]


def test_few_inputs_are_picked_and_many_are_read_all():
    model = made()
    with torch.no_grad():
        model[0][0].weight[:, 2:] = 0
    fused = fuse_chains(model)
    assert fused[0].inputs.tolist() == [1]
    assert weights(fused)[0] == (7, 1)  # which is less than factors of rank 3 have
    check_equal(fused, model, inputs(5))
    assert fuse_chains(made())[0].inputs is None


@pytest.mark.parametrize("method", [compress, prune, magnitude])
def test_networks_of_all_methods(network, digits, method):
    result = method(network, digits.calibration(200, seed=0), relative_tolerance=0.4)
    fused = fuse_chains(result.model)
    images = digits.calibration(50, seed=1)
    with torch.inference_mode():
        torch.testing.assert_close(fused(images), result.model(images), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(each, LinearChain) for each in fused.modules()) == 1


def test_the_model_is_untouched_and_the_chain_is_its_own():
    model = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse_chains(model)
    check_equal(fused, model, inputs(5))
    batch = inputs(5)
    fused(batch)
    torch.testing.assert_close(batch, inputs(5), rtol=0, atol=0)
    wanted = fused(batch)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(fused(batch), wanted, rtol=0, atol=0)
    assert before.keys() == model.state_dict().keys()


def test_an_activation_right_behind_another_is_kept():
    torch.manual_seed(0)
    layer = LowRankLinear.from_weight(torch.randn(9, 20), torch.randn(9), rank=2)
    model = nn.Sequential(layer, nn.ReLU(), nn.Sigmoid(), nn.Flatten()).eval()
    fused = fuse_chains(model)
    assert [type(part) for part in fused] == [LinearChain, nn.Flatten]
    check_equal(fused, model, inputs(5))


def test_layers_that_are_dense_and_whole_stay():
    model = nn.Sequential(nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 4))
    assert [type(part) for part in fuse_chains(model)] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_chain_ends_where_something_else_reads_or_follows():
    shared = made()
    model = nn.ModuleDict({"sequence": shared, "again": shared[3]})
    hooked = made()
    hooked[3].register_forward_hook(lambda *_: None)
    softmax = made()
    softmax[4] = nn.Softmax(dim=-1)  # over all features
    norm = made()
    norm[4] = nn.BatchNorm1d(11).eval()
    for sequence, kinds in (
        (fuse_chains(model)["sequence"], [LinearChain, LowRankLinear, nn.Tanh]),
        (fuse_chains(hooked), [LinearChain, LowRankLinear, nn.Tanh]),
        (fuse_chains(softmax), [LinearChain, nn.Softmax]),
        (fuse_chains(norm), [LinearChain, nn.BatchNorm1d]),
    ):
        assert [type(part) for part in sequence][: len(kinds)] == kinds
    for whole in (hooked, softmax, norm, shared):
        check_equal(fuse_chains(whole), whole, inputs(5))
    # Its outputs are all there, although the next layer does not read them.
    assert weights(fuse_chains(hooked))[1] == (14, 3)


def test_an_activation_may_stand_in_several_places():
    relu = nn.ReLU()
    model = made(relu)
    model[4] = relu
    fused = fuse_chains(model)
    assert [type(part) for part in fused] == [LinearChain]
    check_equal(fused, model, inputs(5))


class Sum(nn.Sequential):
    """Reads what each module gives, not the last alone."""

    def forward(self, values):
        total = 0
        for module in self:
            values = module(values)
            total = total + values.sum()
        return total


def test_a_sequential_with_a_call_of_its_own_is_left_alone():
    model = Sum(*made())
    fused = fuse_chains(model)
    assert not any(isinstance(each, LinearChain) for each in fused.modules())
    assert fused(inputs(4)) == model.eval()(inputs(4))


def test_chains_inside_a_network_are_fused_in_place():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.head = nn.Linear(20, 20), made()

        def forward(self, values):
            return self.head(self.before(values).relu())

    model = Network().eval()
    fused = fuse_chains(model)
    assert type(fused.before) is nn.Linear
    assert [type(part) for part in fused.head] == [LinearChain]
    check_equal(fused, model, inputs(5))


def test_layers_without_weights_or_outputs_that_are_read():
    model = made(rank=None)
    with torch.no_grad():
        model[3].weight.zero_()
    check_equal(fuse_chains(model), model, inputs(5))
    with torch.no_grad():
        model[6].bias.zero_()
        model[0].weight.zero_()
    check_equal(fuse_chains(model), model, inputs(5))


def test_a_chain_is_exported_traced_and_moved():
    model = made()
    fused = fuse_chains(model)
    exported = torch.export.export(
        fused, (inputs(3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    check_equal(exported.module(), model, inputs(8))
    check_equal(torch.jit.trace(fused, inputs(3)), model, inputs(8))
    doubled = fused.double()
    assert {tensor.dtype for tensor in doubled(inputs(3).double()).split(1)} == {torch.float64}
