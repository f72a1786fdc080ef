"""A sparse layer computes what its weight says, and stores its nonzeros alone."""

import copy

import pytest
import torch
from torch import nn

from ddlr import SparseLinear
from ddlr.sizes import csr_bytes


def sparse_weight(rows: int = 30, columns: int = 300, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight * (torch.rand(rows, columns, generator=generator) < 0.1)
    weight[3] = 0
    return weight.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "within"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 1, 4), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_its_weight(shape, dtype, within, bias):
    weight = sparse_weight(dtype=dtype)
    shift = torch.arange(30.0, dtype=dtype) / 30 if bias else None
    layer = SparseLinear.from_weight(weight, shift)
    inputs = torch.rand(*shape, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = layer(inputs)
    expected = nn.functional.linear(
        inputs.double(), weight.double(), shift.double() if bias else None
    )
    assert outputs.dtype == dtype and outputs.shape == (*shape, 30)
    assert torch.allclose(outputs.double(), expected, atol=within * 10)
    assert torch.equal(layer.weight, weight)
    dense = layer.dense()
    assert type(dense) is nn.Linear and torch.equal(dense.weight, weight)
    assert (dense.bias is None) == (not bias)


def test_its_state_dict_takes_the_bytes_of_csr():
    weight = sparse_weight()
    layer = SparseLinear.from_weight(weight, None)
    state = layer.state_dict()
    assert sorted(state) == ["columns", "starts", "values"]
    stored = sum(tensor.nbytes for tensor in state.values())
    assert stored == csr_bytes(int((weight != 0).sum()), *weight.shape)


def test_it_is_saved_loaded_copied_and_moved(tmp_path):
    weight = sparse_weight()
    one = SparseLinear.from_weight(weight, torch.ones(30))
    other = SparseLinear(300, 30, one.nonzeros)
    inputs = torch.rand(4, 300)
    torch.save(one.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    torch.save(nn.Sequential(one), tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    for each in (other, whole, copy.deepcopy(one)):
        assert torch.equal(each(inputs), one(inputs))
    moved = copy.deepcopy(one).double()
    assert moved(inputs.double()).dtype == torch.float64
    assert torch.allclose(moved(inputs.double()).float(), one(inputs), atol=1e-5)
    with torch.no_grad():
        one.values.mul_(2)  # seen by the next product
    assert torch.allclose(one(inputs) - 1, 2 * (other(inputs) - 1), atol=1e-5)


@pytest.mark.parametrize("samples", [1, 4])
def test_gradients_are_those_of_the_linear_layer(samples):
    layer = SparseLinear.from_weight(sparse_weight(), torch.ones(30))
    linear = layer.dense()
    one, other = (torch.rand(samples, 300).requires_grad_() for _ in range(2))
    other.data.copy_(one.data)
    for module, inputs in ((layer, one), (linear, other)):
        module(inputs).square().sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-4)
    assert torch.allclose(layer.values.grad, linear.weight.grad[layer.weight != 0], atol=1e-3)
    assert torch.allclose(layer.bias.grad, linear.bias.grad, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("columns", 0, 300, "columns must be below in_features, 300"),
        ("starts", -1, 7, "starts must rise from 0 to the number of nonzeros"),
        ("starts", 0, 1, "starts must rise from 0 to the number of nonzeros"),
    ],
)
def test_indices_outside_the_weight_are_refused(name, place, value, message):
    layer = SparseLinear.from_weight(sparse_weight(), None)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    state[name][place] = value
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


def test_a_new_one_is_zero_and_may_have_no_nonzeros():
    assert not SparseLinear(5, 4, 7)(torch.rand(2, 5)).any()
    empty = SparseLinear.from_weight(torch.zeros(4, 5), torch.ones(4))
    assert torch.equal(empty(torch.rand(2, 5)), torch.ones(2, 4))
