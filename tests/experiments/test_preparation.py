"""What runs begin from comes back from the disk as it would be computed."""

import torch

import ddlr
from experiments.networks import mlp_digits
from experiments.runs.preparation import load_captured, store_captured


def test_an_entry_comes_back_bit_for_bit_and_in_the_same_layout(tmp_path):
    model = mlp_digits()
    captured = ddlr.capture_layers(model, torch.rand(50, 64))
    store_captured(tmp_path / "a.safetensors", captured, limit_gib=1)
    inputs = captured.batches[0].values
    loaded = load_captured(tmp_path / "a.safetensors", model, inputs, torch.device("cpu"))
    for mine, theirs in zip(captured.layers, loaded.layers, strict=True):
        assert (mine.name, mine.activation) == (theirs.name, theirs.activation)
        for one, other in zip(
            (mine.inputs, mine.targets, mine.weight, mine.bias, *mine.live_inputs.eigen),
            (theirs.inputs, theirs.targets, theirs.weight, theirs.bias, *theirs.live_inputs.eigen),
            strict=True,
        ):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
