"""The judge measures all samples, in evaluation mode, on the modules as they stand."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ddlr
import doors
from ddlr import LowRankLinear
from doors import svd
from experiments.data import Split
from experiments.metrics import (
    accuracy,
    judge_dense,
    layer_errors,
    output_measures,
    predict,
    size_measures,
)

HIDDEN = "1"


def network() -> nn.Sequential:
    """With dropout, which evaluation leaves out, on images of shape (1, 2, 3)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))


def images(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, 1, 2, 3, generator=torch.Generator().manual_seed(seed))


def relative_error(produced: Tensor, wanted: Tensor) -> float:
    return ((produced - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("samples", [1, 1000, 2300])
def test_predictions_are_those_of_evaluation_for_every_sample_and_the_mode_comes_back(
    samples, training
):
    model = network().train(training)
    inputs = images(samples)
    found = predict(model, inputs)
    assert all(module.training == training for module in model.modules())
    assert torch.allclose(found, copy.deepcopy(model).eval()(inputs), atol=1e-6)


def test_the_mode_comes_back_also_where_the_network_fails():
    model = network().train()
    with pytest.raises(RuntimeError):
        predict(model, torch.zeros(3, 1, 2, 2))
    assert model.training


def test_accuracy_is_the_percentage_of_all_samples_whose_class_is_right():
    model, inputs = network().train(), images(2300)
    labels = predict(model, inputs).argmax(dim=1)
    assert accuracy(model, Split(inputs, labels)) == 100
    wrong = labels.clone()
    wrong[-23:] = (wrong[-23:] + 1) % 4  # in the last batch alone
    assert accuracy(model, Split(inputs, wrong)) == pytest.approx(99)


def test_sizes_are_read_off_the_layers_and_shares_are_of_the_dense_ones():
    original, compressed = network(), network()
    with torch.no_grad():
        original[1].weight[2] = 0  # of the dense network all weights count
        compressed[4].weight[:, [0, 5]] = 0
    compressed[1] = LowRankLinear.from_weight(compressed[1].weight, compressed[1].bias, rank=2)
    found = size_measures(original, compressed, [HIDDEN, "4"])
    kept = 2 * (6 + 8 - 2) + 6 * 4
    assert found == {
        "parameters_dense": 48 + 32,
        "parameters_kept": kept,
        "kept_fraction": kept / 80,
        "bytes_dense": 4 * 80,
        # Which of the eight inputs are left, and which outputs are pivots, as bits.
        "bytes_stored": 4 * kept + 1 + 1,
    }
    assert size_measures(original, compressed, ["4"])["kept_fraction"] == 24 / 32


@pytest.fixture(scope="module")
def judged():
    """A network, what it is judged by, and a compression of it; of samples in three batches."""
    model = network().train()
    captured = ddlr.capture_layers(model, images(300, seed=1))
    splits = [Split(images(2300, seed), torch.zeros(2300).long()) for seed in (2, 3)]
    compressed = svd(model, captured, relative_tolerance=0.8)
    return model.eval(), judge_dense(model, captured, *splits), compressed


def test_errors_of_outputs_are_of_the_samples_that_they_are_named_for(judged):
    model, dense, compressed = judged
    found = output_measures(dense, compressed)
    small = compressed.model.eval()
    for name, inputs in (("", images(300, seed=1)), ("_held_out", images(2300, seed=3))):
        wanted = relative_error(small(inputs), model(inputs))
        assert found[f"output_error{name}"] == pytest.approx(wanted, rel=1e-5)
        assert wanted > 0.1
    assert found["output_error"] != pytest.approx(found["output_error_held_out"], rel=1e-3)


def test_errors_of_layers_are_on_all_held_out_samples_and_the_original_inputs(judged):
    model, dense, compressed = judged
    found = layer_errors(dense, compressed)
    inputs, stored = images(2300, seed=3).flatten(1), compressed.model
    hidden = model[1](inputs).relu()
    wanted = relative_error(stored[1](inputs).relu(), hidden)
    assert found[HIDDEN] == pytest.approx(wanted, rel=1e-5)
    assert found["4"] == pytest.approx(
        relative_error(stored[4](hidden), model[4](hidden)), rel=1e-5
    )


def test_of_a_layer_with_dropped_outputs_the_error_is_of_the_others_alone():
    """Relative to what these others are in the original network."""
    model = network()
    captured = ddlr.capture_layers(model, images(300, seed=1))
    split = Split(images(300, seed=2), torch.zeros(300).long())
    dense = judge_dense(model, captured, split, split)
    small = doors.compress(model, captured, method="fewest_weights", relative_tolerance=0.5)
    stored = small.model[1]
    given = (stored.weight != 0).any(dim=1) | (stored.bias != 0)
    assert int((~given).sum()) == small.layers[0].outputs_dropped > 0
    inputs = split.images.flatten(1)
    produced, wanted = (layer(inputs).relu()[:, given] for layer in (stored, model[1]))
    expected = relative_error(produced, wanted)
    assert layer_errors(dense, small)[HIDDEN] == pytest.approx(expected, rel=1e-5)


def test_accuracies_of_the_dense_network_are_of_test_and_held_out_samples():
    model, inputs = network(), images(40)
    captured = ddlr.capture_layers(model, inputs)
    right = predict(model, inputs).argmax(dim=1)
    wrong = (right + 1) % 4
    dense = judge_dense(model, captured, Split(inputs, right), Split(inputs, wrong))
    assert (dense.accuracy, dense.accuracy_held_out) == (100, 0)


def test_an_error_relative_to_nothing_is_no_number(judged):
    """Where every output of a layer is off on all held-out samples."""
    compressed = judged[-1]
    model = network()
    with torch.no_grad():
        model[1].bias -= 100
    captured = ddlr.capture_layers(model, images(30))
    split = Split(images(30), torch.zeros(30).long())
    found = layer_errors(judge_dense(model, captured, split, split), compressed)
    assert found[HIDDEN] != found[HIDDEN]
