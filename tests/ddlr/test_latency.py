"""A compressed layer is kept where it is faster at every batch size, by a clock that is made up."""

import pytest
import torch
from torch import nn

from ddlr import latency
from ddlr.latency import Latency, as_rule, fastest_times, rows_of
from ddlr.layers import LowRankLinear, store_linear
from doors import activation_svd, compress, magnitude, prune


class Clock:
    """A clock that goes on by what calls of the forms of a layer are said to cost."""

    def __init__(self, **costs):
        self.now, self.calls, self.costs = 0.0, [], costs

    def __call__(self) -> float:
        return self.now

    def spend(self, name: str, rows: int) -> None:
        cost = self.costs[name]
        self.calls.append((name, rows))
        self.now += cost(rows) if callable(cost) else cost


class Spending(nn.Linear):
    """A layer that takes its time by a clock."""

    def __init__(self, name: str, clock: Clock):
        super().__init__(12, 9)
        self.name, self.clock = name, clock

    def forward(self, inputs):
        self.clock.spend(self.name, len(inputs))
        return super().forward(inputs)


@pytest.fixture
def keeps(monkeypatch):
    """Whether a rule keeps a layer, both forms of which have a cost by a clock."""
    monkeypatch.setattr(latency, "compact", lambda layer: layer)

    def decide(clock: Clock, **rule) -> bool:
        forms = Spending("compressed", clock), Spending("dense", clock)
        return Latency(clock=clock, **rule).keeps(*forms, INPUTS)

    return decide


INPUTS = torch.rand(40, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("compressed", "kept"), [(0.5, True), (0.94, True), (0.96, False), (1.0, False), (3.0, False)]
)
def test_a_layer_is_kept_where_it_is_faster_by_the_margin(keeps, compressed, kept):
    assert keeps(Clock(dense=1.0, compressed=compressed), margin=0.05) is kept


@pytest.mark.parametrize(
    ("sizes", "kept"), [((1,), False), ((256,), True), ((256, 1), False), ((32, 256), True)]
)
def test_it_has_to_be_faster_at_every_batch_size(keeps, sizes, kept):
    clock = Clock(dense=lambda rows: 1.0 + rows, compressed=lambda rows: 3.0 + 0.1 * rows)
    assert keeps(clock, batch_sizes=sizes) is kept
    assert {rows for _, rows in clock.calls} <= set(sizes)


@pytest.mark.parametrize("slow", ["dense", "compressed"])
def test_noise_that_hits_most_timings_of_one_form_decides_nothing(keeps, slow):
    for costs, kept in (
        ({"dense": 1.0, "compressed": 0.8}, True),
        ({"dense": 0.8, "compressed": 1.0}, False),
    ):
        quiet, count = costs[slow], iter(range(10**6))
        noisy = {slow: lambda rows: quiet * (1 if next(count) % 4 == 0 else 10)}  # noqa: B023
        assert keeps(Clock(**costs | noisy)) is kept


def test_forms_are_timed_in_turn():
    clock = Clock(dense=1.0, compressed=2.0)
    forms = [lambda x, name=name: clock.spend(name, len(x)) for name in ("dense", "compressed")]
    times = fastest_times(forms, INPUTS, rounds=4, clock=clock)
    assert times == [1.0, 2.0]
    timed = [name for name, _ in clock.calls[-8:]]
    # Each round begins with another one, and has both.
    assert timed == 2 * ["dense", "compressed", "compressed", "dense"]


def test_a_fast_function_is_called_repeatedly_in_one_timing():
    clock = Clock(dense=1e-6)
    fastest_times([lambda x: clock.spend("dense", 1)], None, rounds=2, seconds=1e-3, clock=clock)
    assert 2000 <= len(clock.calls) <= 2010
    frozen = Clock(dense=0.0)
    spend = [lambda x: frozen.spend("dense", 1)]
    assert fastest_times(spend, None, rounds=1, clock=frozen) == [0.0]
    assert len(frozen.calls) <= 1002


def test_layers_are_timed_in_evaluation_mode_and_left_in_their_own():
    seen = []
    module = nn.Sequential(nn.Linear(12, 9)).train()
    module.register_forward_hook(lambda m, *_: seen.append((m.training, torch.is_grad_enabled())))
    fastest_times([module], INPUTS, rounds=1)
    assert set(seen) == {(False, False)}
    assert module.training and module[0].training


def test_a_layer_that_is_deployed_as_a_dense_one_is_kept_untimed():
    torch.manual_seed(0)
    clock = Clock(dense=1.0)
    dense = Spending("dense", clock)
    pruned = store_linear(dense.weight * (torch.rand(9, 12) < 0.9), dense.bias)
    assert Latency(clock=clock).keeps(pruned, dense, INPUTS)
    assert not clock.calls
    smaller = LowRankLinear.from_weight(dense.weight.detach(), dense.bias.detach(), rank=2)
    assert Latency(clock=clock).keeps(smaller, dense, INPUTS)  # which takes no time by this clock
    assert clock.calls


def test_batches_larger_than_the_samples_repeat_them():
    rows = rows_of(INPUTS[:3], 7)
    torch.testing.assert_close(rows, INPUTS[[0, 1, 2, 0, 1, 2, 0]], rtol=0, atol=0)
    with pytest.raises(ValueError, match="inputs has no rows"):
        rows_of(INPUTS[:0], 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_sizes": ()}, "batch_sizes is empty"),
        ({"batch_sizes": (0,)}, "batch_sizes is 0"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"margin": 1}, "margin is 1"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Latency(**given)


def test_the_words_of_the_setting():
    assert as_rule("parameters") is None
    assert as_rule("latency") == Latency()
    rule = Latency(batch_sizes=[32])
    assert as_rule(rule) is rule
    with pytest.raises(ValueError, match="break_even is 'speed'; choose one of"):
        as_rule("speed")


class Told(Latency):
    """A rule that is told what to keep, and remembers what it was asked."""

    def __new__(cls, answers):
        return super().__new__(cls)

    def __init__(self, answers):
        super().__init__()
        object.__setattr__(self, "answers", answers)
        object.__setattr__(self, "asked", [])

    def keeps(self, layer, dense, inputs):
        self.asked.append((type(layer), tuple(dense.weight.shape), len(inputs)))
        return self.answers[len(self.asked) - 1]


@pytest.mark.parametrize("method", [compress, activation_svd, prune, magnitude])
def test_a_layer_that_is_not_faster_stays_as_it_was_by_every_method(network, digits, method):
    calibration = digits.calibration(200, seed=0)
    by_size = method(network, calibration, relative_tolerance=0.3)
    rule = Told([True, False, True])
    result = method(network, calibration, relative_tolerance=0.3, break_even=rule)
    assert [shape for _, shape, _ in rule.asked] == [(48, 64), (32, 48), (10, 32)]
    assert {rows for *_, rows in rule.asked} == {200}
    for index, name in enumerate(("fc1", "fc2", "fc3")):
        kept = (by_size.model if rule.answers[index] else network).get_submodule(name)
        layer = result.model.get_submodule(name)
        # Dead weights are zero: on dark pixels, and of what a pruned neighbour does not read.
        live = (layer.weight != 0) & (kept.weight != 0)
        assert live.double().mean() > 0.1
        assert torch.equal(layer.weight[live], kept.weight[live])
        assert type(layer) is type(kept)
    errors = [layer.relative_error_read for layer in result.layers]
    assert errors[1] <= 1e-6 < errors[0]


def test_parameters_alone_count_unless_asked_for(network, digits, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setattr(latency, "fastest_times", refuse)
    calibration = digits.calibration(200, seed=0)
    compress(network, calibration, relative_tolerance=0.3)
    with pytest.raises(AssertionError, match="timed"):
        compress(network, calibration, relative_tolerance=0.3, break_even="latency")
    with pytest.raises(ValueError, match="break_even is 'time'"):
        compress(network, calibration, relative_tolerance=0.3, break_even="time")
