"""What no output depends on is removed from every method's network, and counts for none."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import ddlr
import doors
from ddlr import unread_outputs
from ddlr.calls import as_batches
from ddlr.dead_weights import remove_dead_weights

METHODS = {
    "nuclear": lambda *given, **options: doors.compress(*given, **options),
    "lowest_rank": lambda *given, **options: doors.compress(
        *given, method="lowest_rank", **options
    ),
    "fewest_weights": lambda *given, **options: doors.compress(
        *given, method="fewest_weights", **options
    ),
    "nettrim": doors.prune,
    "magnitude": doors.magnitude,
    "magnitude_global": doors.magnitude_global,
    "svd": doors.svd,
    "activation_svd": doors.activation_svd,
}


def network(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def weights(model: nn.Module) -> int:
    return sum(
        int((module.weight != 0).sum())
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )


def test_units_that_nothing_reads_go_and_take_those_before_them_along():
    model, inputs = network(6, 5, 4, 3), torch.randn(50, 6)
    with torch.no_grad():
        model[4].weight[:, 0] = 0  # the last layer does not read unit 0 of the second
        model[2].weight[1:, 2] = 0  # which alone reads unit 2 of the first
        before = model(inputs)
        unread = remove_dead_weights(model, [("0", "2"), ("2", "4")], as_batches(inputs))
        assert torch.equal(model(inputs), before)
    assert unread["0"].tolist() == [False, False, True, False, False]
    assert unread["2"].tolist() == [True, False, False, False]
    assert not model[0].weight[2].any() and not model[0].bias[2]
    assert weights(model) == 4 * 6 + 3 * 4 + 3 * 3


@pytest.mark.parametrize("value", [0.7, -0.7])
def test_constant_units_go_into_the_next_bias(value):
    model, inputs = network(6, 5, 4, 3), torch.randn(50, 6)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, value
        before = model(inputs)
        shift = model[2].weight[:, 1] * max(value, 0)
        bias = model[2].bias.clone()
        remove_dead_weights(model, [("0", "2"), ("2", "4")], as_batches(inputs))
        assert torch.allclose(model(inputs), before, atol=1e-6)
    assert not model[2].weight[:, 1].any()
    assert torch.allclose(model[2].bias, bias + shift)
    assert model[0].bias[1] == torch.tensor(value)  # nothing reads it, and it is no weight


def test_without_a_bias_to_take_it_only_a_constant_of_zero_goes():
    model, inputs = network(6, 5, 4), torch.randn(50, 6)
    with torch.no_grad():
        model[2] = nn.Linear(5, 4, bias=False)
        model[0].weight[:2] = 0
        model[0].bias[:2] = torch.tensor([0.5, -0.5])
        before = model(inputs)
        remove_dead_weights(model, [("0", "2")], as_batches(inputs))
        assert torch.equal(model(inputs), before)
    assert model[2].weight[:, 0].any() and not model[2].weight[:, 1].any()


def test_one_removal_leads_to_the_next_through_low_rank_layers_too():
    model, inputs = network(6, 5, 4, 3), torch.randn(50, 6)
    with torch.no_grad():
        model[2].weight[:, 1:] = 0
        model[2].weight[1:] = 0  # unit 0 of the second reads unit 0 of the first, all others none
        model[4].weight[:, 0] = 0  # and it is not read
        for place in (0, 2, 4):
            weight, bias = model[place].weight, model[place].bias
            model[place] = ddlr.LowRankLinear.from_weight(weight, bias)
        before = model(inputs)
        remove_dead_weights(model, [("0", "2"), ("2", "4")], as_batches(inputs))
        assert torch.allclose(model(inputs), before, atol=1e-6)
        assert not any(model[place].weight.any() for place in (0, 2, 4))


def half_read_network() -> tuple[nn.Sequential, torch.Tensor]:
    model = network(20, 30, 24, 5)
    with torch.no_grad():
        for place in (0, 2, 4):  # so that biases do not outweigh them
            model[place].weight *= 2
        model[2].weight *= torch.rand(30) < 0.5
        model[4].weight *= torch.rand(24) < 0.5
    return model, torch.randn(400, 20) @ torch.diag(torch.logspace(0, -1, 20))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_counted_is_what_the_outputs_need_and_these_stay(method, monkeypatch):
    model, inputs = half_read_network()
    result = METHODS[method](model, inputs, relative_tolerance=0.1)
    first, second, third = (result.model[place].weight for place in (0, 2, 4))
    assert not first[~(second != 0).any(dim=0)].any()
    assert not second[~(third != 0).any(dim=0)].any()
    kept = [report.parameters_kept for report in result.layers]
    assert kept == [ddlr.sizes.layer_size(result.model[place]).parameters for place in (0, 2, 4)]

    monkeypatch.setattr(unread_outputs, "remove_dead_weights", lambda model, pairs, batches: {})
    whole = METHODS[method](model, inputs, relative_tolerance=0.1)
    with torch.no_grad():
        assert torch.allclose(result.model(inputs), whole.model(inputs), atol=1e-5)
    assert sum(kept) <= sum(report.parameters_kept for report in whole.layers)
    if method in ("nuclear", "nettrim", "magnitude", "svd"):
        assert sum(kept) < sum(report.parameters_kept for report in whole.layers)


def test_a_layer_that_something_else_reads_keeps_all_of_it():
    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(20, 30), nn.Linear(30, 5), nn.Linear(30, 5)
            with torch.no_grad():
                self.b.weight[:, :15] = 0

        def forward(self, inputs):
            hidden = self.a(inputs).relu()
            return self.b(hidden) + self.c(hidden)

    torch.manual_seed(0)
    model, inputs = TwoReaders(), torch.randn(300, 20)
    result = doors.prune(model, inputs, relative_tolerance=0.1)
    assert not result.unread["a"].any()
    with torch.no_grad():
        error = (result.model(inputs) - model(inputs)).norm() / model(inputs).norm()
    assert error < 0.3


@pytest.mark.parametrize(("method", "tolerance"), [("magnitude", 0.1), ("fewest_weights", 0.1)])
def test_the_report_has_the_error_of_what_is_read_and_of_all(method, tolerance):
    model, inputs = half_read_network()
    result = METHODS[method](model, inputs, relative_tolerance=tolerance)
    original, unread = model[:2](inputs), result.unread["0"]
    got = result.model[:2](inputs)
    report = result.layers[0]
    assert report.outputs_dropped == int(unread.sum()) > 2
    missed = (got - original).norm() / original.norm()
    assert report.relative_error == pytest.approx(missed.item(), rel=1e-4)
    assert report.relative_error > 0.3  # nothing is promised of it
    promised = original[:, ~unread] if method == "fewest_weights" else original
    missed = (got - original)[:, ~unread].norm() / promised.norm()
    assert report.relative_error_read == pytest.approx(missed.item(), rel=1e-4)
    assert 0 < report.relative_error_read <= tolerance * (1 + 1e-6)


@pytest.mark.parametrize("cascade_bound", ["tolerance", "inherited"])
def test_the_bounds_of_a_cascade_are_those_of_its_rule(cascade_bound, monkeypatch):
    # The original weights read units that the compressed ones do not.
    monkeypatch.setattr(unread_outputs, "remove_dead_weights", lambda model, pairs, batches: {})
    torch.manual_seed(1)
    model = network(20, 30, 24, 5)
    inputs = torch.randn(400, 20) @ torch.diag(torch.logspace(0, -1, 20))
    result = doors.prune(
        model,
        inputs,
        relative_tolerance=0.1,
        order="cascade",
        cascade_bound=cascade_bound,
        constraint="hinge",
    )
    assert [report.relative_tolerance for report in result.layers] == [0.1] * 3
    assert result.layers[0].relative_bound == 0.1
    for place, report in zip((2, 4), result.layers[1:], strict=True):
        compressed, original = result.model[:place](inputs), model[: place + 1](inputs)
        made = model[place](compressed)
        if place == 2:
            made = torch.where(original > 0, made, made.relu())
            original = original.relu()
        inherited = 1.1**0.5 * ((made - original).norm() / original.norm()).item()
        bound = inherited if cascade_bound == "inherited" else max(0.1, inherited)
        assert report.relative_bound == pytest.approx(bound, rel=1e-4)
        assert report.relative_error_read <= report.relative_bound * (1 + 1e-6)


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="cascade_bound is 'theirs'"):
        doors.prune(
            network(4, 3), torch.randn(9, 4), relative_tolerance=0.1, cascade_bound="theirs"
        )
