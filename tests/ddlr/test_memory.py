"""Activations are kept in memory within a limit, in files beyond it, and shared where equal."""

import tempfile

import pytest
import torch
from torch import nn

import ddlr
from ddlr.capturing import capture_lazily
from ddlr.memory import Memory, free_memory


def test_tensors_are_in_memory_up_to_the_limit():
    memory = Memory(limit=4000)
    like = torch.zeros(1)
    first = memory.empty((10, 50), like)
    assert memory.used == 2000
    second = memory.kept(torch.arange(600.0).view(20, 30))
    assert memory.used == 2000  # in a file
    assert torch.equal(second, torch.arange(600.0).view(20, 30))
    del first
    assert memory.used == 0
    third = memory.empty((10, 50), like)
    assert memory.used == third.numel() * 4


def test_files_are_gone_with_their_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory = Memory(limit=0)
    tensor = memory.kept(torch.ones(100, 100))
    assert tensor.sum() == 10000
    del tensor
    assert not list(tmp_path.iterdir())


def test_parts_are_joined_in_their_order_and_let_go_of():
    memory = Memory()
    parts = [memory.kept(torch.full((2, 3), float(value))) for value in range(4)]
    joined = memory.joined(parts)
    assert parts == [] and joined[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert memory.used == joined.numel() * 4


def test_what_is_free_is_known_here():
    assert free_memory() > 2**20
    assert Memory().limit == pytest.approx(free_memory() // 4, rel=0.5)


@pytest.mark.parametrize("method", ["nuclear", "lowest_rank", "fewest_weights"])
def test_a_limit_changes_nothing_but_where_activations_are(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    inputs = torch.randn(300, 20)
    results = [
        ddlr.compress(
            model,
            inputs.split(100),
            relative_tolerance=0.3,
            method=method,
            settings=ddlr.Settings(memory_limit=limit),
        )
        for limit in (None, 0, 30_000)
    ]
    for other in results[1:]:
        for one, two in zip(results[0].model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(one, two)
    with pytest.raises(ValueError, match="memory_limit"):
        ddlr.capture_layers(model, inputs, memory_limit=-1)


class Attention(nn.Module):
    """Three projections of one input, and a fourth of another with the same values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.other = (nn.Linear(12, 12) for _ in range(4))
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        scores = (self.query(x) @ self.key(x).transpose(-1, -2)).softmax(dim=-1)
        mixed = scores @ self.value(x)
        x.mul_(2.0)  # in place, between two layers that are given the same tensor
        return self.out(mixed + self.other(x))


def test_layers_that_are_given_the_same_tensor_share_inputs_and_eigenvectors():
    captured = ddlr.capture_layers(Attention(), torch.randn(50, 6, 12))
    layers = {layer.name: layer for layer in captured.layers}
    for name in ("key", "value"):
        assert layers[name].inputs is layers["query"].inputs
        assert layers[name].live_inputs is layers["query"].live_inputs
    assert torch.equal(layers["other"].inputs, 2 * layers["query"].inputs)


def test_a_single_compression_shares_them_too_and_lets_go_of_them():
    model, inputs = Attention(), torch.randn(50, 6, 12)
    captured = capture_lazily(model, inputs)
    walked = {layer.name: layer for layer in captured.for_solving()}
    assert walked["key"].shared is walked["query"].shared
    assert walked["other"].shared is not walked["query"].shared
    lazily = ddlr.compress(model, inputs, relative_tolerance=0.2, method="lowest_rank")
    again = ddlr.compress(
        model, ddlr.capture_layers(model, inputs), relative_tolerance=0.2, method="lowest_rank"
    )
    for one, two in zip(lazily.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("method", ["lowest_rank", "fewest_weights"])
def test_centred_inputs_are_held_of_one_layer_at_a_time_and_eigenvectors_of_all(method):
    torch.manual_seed(0)
    layers = [each for _ in range(4) for each in (nn.Linear(12, 12), nn.ReLU())]
    model, inputs = nn.Sequential(*layers), torch.randn(100, 12)
    captured = ddlr.capture_layers(model, inputs)
    ddlr.compress(model, captured, method=method, kept_fraction=0.5, tolerances=(0.1, 0.3, 0.5))
    held = [layer for layer in captured.layers if "centred" in vars(layer.shared)]
    assert len(held) <= 1
    assert all(layer.shared.eigen is not None for layer in captured.layers if layer not in held)
