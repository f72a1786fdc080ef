"""Capture records what layers see, finds a following ReLU on the data, and cleans up."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from ddlr import capture
from ddlr.hooks import run_batches


class Functional(nn.Module):
    """Two layers, with whatever is given in between and at the end."""

    def __init__(self, between, end=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.between, self.end = between, end

    def forward(self, x):
        return self.end(self.second(self.between(self.first(x))))


BATCH = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))


def activations(model: nn.Module) -> tuple[str, str]:
    with capture(model, ["first", "second"]) as records:
        run_batches(model, BATCH.split(8))
    return records["first"].activation, records["second"].activation


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (functional.relu, "relu"),
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: x.relu_(), "relu"),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), "relu"),
        (lambda x: x.relu().view(-1, 2, 3).flatten(1), "relu"),
        (lambda x: x, "none"),
        (nn.GELU(), "none"),
        (nn.LeakyReLU(), "none"),
        (lambda x: nn.functional.pad(x.relu()[:, 1:], (0, 1)), "relu"),
        (nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()), "none"),
        (lambda x: x.abs(), "none"),
    ],
)
def test_relu_is_found_whatever_form_it_has(between, expected):
    assert activations(Functional(between)) == (expected, "none")


def test_relu_at_the_end_of_the_network_is_found():
    assert activations(Functional(nn.ReLU(), end=functional.relu)) == ("relu", "relu")


def test_outputs_that_are_never_negative_are_taken_as_having_no_activation():
    model = Functional(nn.ReLU())
    model.first.bias.data.fill_(100.0)
    assert activations(model) == ("none", "none")


def test_records_inputs_and_outputs_of_all_batches():
    model = Functional(nn.ReLU(inplace=True))
    with capture(model, ["second"]) as records:
        run_batches(model, BATCH.split(8))
    hidden = model.first(BATCH).relu()
    assert torch.allclose(records["second"].inputs, hidden)
    assert torch.allclose(records["second"].outputs, model.second(hidden))


def test_leading_dimensions_are_samples():
    model = Functional(nn.ReLU())
    with capture(model, ["first"]) as records:
        run_batches(model, [BATCH.view(4, 5, 6)])
    assert records["first"].inputs.shape == (20, 6)


def test_hooks_are_removed_also_after_an_error_and_the_mode_is_kept():
    model = Functional(nn.ReLU())
    model.train()
    model.second.eval()
    with pytest.raises(RuntimeError), capture(model, ["first"]):
        run_batches(model, [torch.randn(3, 5)])
    assert model.training
    assert not model.second.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_unknown_layer_empty_and_labelled_batches_are_refused():
    model = Functional(nn.ReLU())
    with pytest.raises(ValueError, match="no layer 'third'"), capture(model, ["third"]):
        pass
    with pytest.raises(ValueError, match="calibration set is empty"):
        run_batches(model, [])
    with pytest.raises(ValueError, match="calibration set is empty"):
        run_batches(model, [torch.zeros(0, 6)])
    with pytest.raises(TypeError, match="take the labels off"):
        run_batches(model, [(BATCH, torch.zeros(20))])
