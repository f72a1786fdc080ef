"""Networks of the fewest weights: outputs that nothing uses are gone, and promises are kept."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ddlr
import doors
from ddlr import LowRankLinear, SolverStatus
from ddlr.calls import as_batches
from ddlr.hooks import is_sole_consumer
from ddlr.layers import numerical_rank
from ddlr.trials import agree

WITHIN = 1 + 1e-3


def used(weight: Tensor) -> Tensor:
    return (weight != 0).any(dim=0)


def compress(model, calibration, tolerance, **options) -> ddlr.CompressionResult:
    return doors.compress(
        model, calibration, method="fewest_weights", relative_tolerance=tolerance, **options
    )


def kept_outputs(layer: nn.Module) -> Tensor:
    return (layer.weight != 0).any(dim=1) | (layer.bias != 0)


@pytest.mark.parametrize("order", ["parallel", "cascade"])
@pytest.mark.parametrize("refit", ["none", "layer"])
@pytest.mark.parametrize("tolerance", [0.1, 0.4])
def test_outputs_that_nothing_uses_are_gone_and_the_others_keep_the_promise(
    order, refit, tolerance, network, digits, captured
):
    result = compress(network, captured, tolerance, order=order, refit=refit)
    assert sum(report.outputs_dropped for report in result.layers) > 30
    assert result.layers[-1].outputs_dropped == 0
    stored = [result.model.get_submodule(report.name) for report in result.layers]
    wanted = got = digits.calibration(300, seed=0).flatten(1)
    for place, (report, layer) in enumerate(zip(result.layers, stored, strict=True)):
        original = network.get_submodule(report.name)
        inputs = wanted if order == "parallel" else got
        wanted, got, produced = original(wanted), layer(got), layer(inputs)
        if report.activation == "relu":
            wanted, got, produced = wanted.relu(), got.relu(), produced.relu()

        kept = kept_outputs(layer)
        dropped = wanted.any(dim=0) & ~kept
        assert int(dropped.sum()) == report.outputs_dropped
        if place < len(stored) - 1:
            assert not stored[place + 1].weight[:, dropped].any()
        missed = (produced - wanted)[:, kept].norm().item()
        # Relative to the outputs that the bound is about; in cascade some of them turn out unread.
        promised = missed / report.relative_error_read
        assert report.relative_error_read <= report.relative_bound * WITHIN
        assert wanted[:, kept].norm() <= promised * WITHIN and promised <= wanted.norm() * WITHIN
        if order == "parallel":
            assert promised == pytest.approx(wanted[:, kept].norm().item(), rel=1e-3)
        assert report.relative_tolerance == tolerance
        if order == "parallel":
            assert report.relative_bound == tolerance
        else:  # the outputs that are left make up for the others
            assert tolerance <= report.relative_bound < 2.5 * tolerance

        columns, rows = int(used(layer.weight).sum()), int((layer.weight != 0).any(dim=1).sum())
        if isinstance(layer, LowRankLinear):
            assert report.form == "low_rank"
            rank = min(layer.rank, columns, rows)
            assert report.parameters_kept == rank * (columns + rows - rank)
            assert layer[0].weight.shape[0] == layer[1].weight.shape[1] == layer.rank
        else:
            assert report.form == "dense"
            assert report.parameters_kept == columns * rows == int((layer.weight != 0).sum())
        assert report.status is SolverStatus.FITTED


@pytest.mark.parametrize("order", ["parallel", "cascade"])
def test_the_network_does_not_see_what_is_dropped(order, network, digits, captured):
    result = compress(network, captured, 0.2, order=order)
    otherwise = copy.deepcopy(result.model)
    for place, report in enumerate(result.layers[:-1]):
        live = captured.layers[place].live_out
        bias = otherwise.get_submodule(report.name).bias.data
        dropped = live & (bias == 0)
        assert int(dropped.sum()) == report.outputs_dropped > 0
        bias[dropped] = torch.rand(int(dropped.sum()))
    for images in (captured.batches[0].values, digits.held_out.images):
        assert torch.equal(otherwise(images), result.model(images))


def test_a_refit_keeps_inputs_and_sizes_and_lowers_the_errors(network, captured):
    for tolerance in (0.05, 0.1):
        plain, refitted = (
            compress(network, captured, tolerance, refit=refit) for refit in ("none", "layer")
        )
        lower = False
        for before, after in zip(plain.layers, refitted.layers, strict=True):
            one, other = (result.model.get_submodule(before.name) for result in (plain, refitted))
            assert torch.equal(used(one.weight), used(other.weight))
            assert before.form == after.form
            assert before.parameters_kept == after.parameters_kept
            assert before.outputs_dropped == after.outputs_dropped
            if before.form == "low_rank":
                assert one.rank == other.rank == numerical_rank(other.weight)
            assert after.relative_error_read <= before.relative_error_read * WITHIN
            lower |= after.relative_error_read < 0.99 * before.relative_error_read
        assert lower


def test_layers_that_are_kept_may_lose_outputs_and_use_all_inputs(network, digits, captured):
    tolerances = {"fc1": 0.2, "fc2": 0, "fc3": 0.2}
    for order in ("parallel", "cascade"):
        result = compress(network, captured, tolerances, order=order)
        first, middle, last = result.layers
        assert middle.status is SolverStatus.UNCHANGED
        assert first.outputs_dropped == last.outputs_dropped == 0 < middle.outputs_dropped
        stored = result.model.fc2
        kept = kept_outputs(stored)
        seen = captured.layers[1].live_in
        assert torch.equal(stored.weight[kept][:, seen], network.fc2.weight[kept][:, seen])
        assert torch.equal(stored.bias[kept], network.fc2.bias[kept])
        assert not used(result.model.fc3.weight)[~kept].any()
        assert middle.relative_error_read == 0 < middle.relative_error
        assert middle.parameters_kept == int(kept.sum()) * int(seen.sum())
    assert torch.equal(
        compress(network, captured, 0).model(digits.held_out.images),
        network(digits.held_out.images),
    )


def test_where_the_last_layer_is_a_bias_nothing_else_is_left(network, captured):
    for order in ("parallel", "cascade"):
        tolerances = {"fc1": 0.2, "fc2": 0.2, "fc3": 1.0}
        result = compress(network, captured, tolerances, order=order)
        assert [report.parameters_kept for report in result.layers] == [0, 0, 0]
        assert all(report.violation == 0 for report in result.layers)


def test_workers_are_refused_with_the_reason(network, captured):
    with pytest.raises(ValueError, match="workers is 2, but here a layer waits for the next"):
        compress(network, captured, 0.2, workers=2)


class Joined(nn.Module):
    """Two layers, with one between them for those who call it, joined by a function."""

    def __init__(self, path):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.second = (nn.Linear(12, size) for size in (12, 12, 5))
        self.dropout, self.path = nn.Dropout(0.5), path

    def forward(self, x):
        return self.path(self, x)


def skip(net, x):
    hidden = net.first(x).relu()
    return net.second(hidden) + hidden[:, 1:6]


def twice(net, x):
    hidden = net.first(x).relu()
    return net.second(hidden) + net.second(hidden.flip(1))


ALONE = {
    "relu": lambda net, x: net.second(net.first(x).relu()),
    "dropout": lambda net, x: net.second(net.dropout(functional.relu(net.first(x)))),
    "nothing": lambda net, x: net.second(net.first(x)),
    "a reshape": lambda net, x: net.second(net.first(x).relu().view(-1, 3, 4).flatten(1)),
}


OTHERWISE = {
    "a skip": skip,
    "followed twice": twice,
    "called twice": lambda net, x: net.second(net.first(net.first(x).relu()).relu()),
}


# Only the other layer is reached, but by all its inputs from each output.
MIXED = {
    "normalised": lambda net, x: net.second(functional.layer_norm(net.first(x), (12,))),
    "another order": lambda net, x: net.second(net.first(x).relu().roll(1, dims=1)),
    "another layer": lambda net, x: net.second(net.middle(net.first(x).relu()).relu()),
    "another width": lambda net, x: net.second(functional.pad(net.first(x)[:, 2:], (0, 2))),
}


GENERATOR = torch.Generator().manual_seed(0)


# Of rank 4, so that half of the hidden units are as good as all.
INPUTS = torch.randn(200, 4, generator=GENERATOR) @ torch.randn(4, 12, generator=GENERATOR)


@pytest.mark.parametrize("path", [*ALONE, *OTHERWISE])
def test_whether_one_layer_alone_is_reached_is_found_out(path):
    model = Joined({**ALONE, **OTHERWISE}[path])
    assert is_sole_consumer(model, "first", "second", as_batches(INPUTS)) == (path in ALONE)
    assert model.training  # as it was, and without a hook
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("path", [*ALONE, *OTHERWISE, *MIXED])
@pytest.mark.parametrize("order", ["parallel", "cascade"])
def test_outputs_are_dropped_only_where_the_next_layer_is_their_one_use(path, order):
    model = Joined({**ALONE, **OTHERWISE, **MIXED}[path]).eval()
    tolerances = {"first": 0, "second": 0.2}
    result = compress(model, INPUTS, tolerances, layers=["first", "second"], order=order)
    first, second = result.layers
    assert (first.outputs_dropped > 0) == (path in ALONE)
    assert second.relative_error_read <= 0.2 * WITHIN
    # The first layer makes no error, so what the network loses is what the second one may.
    wanted = model(INPUTS)
    assert (result.model(INPUTS) - wanted).norm() <= 2 * 0.2 * wanted.norm()
    if path not in ALONE:
        for mine, theirs in zip(
            result.model.first.parameters(), model.first.parameters(), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_who_reads_a_layer_is_tried_out_once_for_all_compressions(network, captured, monkeypatch):
    passes = []

    def counted(*traces):
        passes.append(traces)
        return agree(*traces)

    monkeypatch.setattr(ddlr.hooks, "agree", counted)
    afresh = dataclasses.replace(captured)  # of which nothing was tried out
    counts = []
    for tolerance in (0.3, 0.4):
        result = compress(network, afresh, tolerance, order="cascade")
        assert sum(report.outputs_dropped for report in result.layers) > 0
        counts.append(len(passes))
    assert counts[0] == counts[1] > 0


def test_batches_without_samples_show_nothing():
    model = Joined(skip).eval()
    result = compress(model, [INPUTS[:0], INPUTS], 0.2, layers=["first", "second"])
    assert [report.outputs_dropped for report in result.layers] == [0, 0]
