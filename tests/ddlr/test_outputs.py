"""What a network's outputs are: what goals measure, what refits train to, what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ddlr
import doors
from ddlr.allocate import frontier, layer_options
from ddlr.goals import Option
from ddlr.outputs import divergence, relative_error
from ddlr.walk import WalkSettings
from doors import svd
from experiments.methods.closed_forms import SVD

TOLERANCES = (0.05, 0.1, 0.2, 0.4, 0.8)
GENERATOR = torch.Generator().manual_seed(0)
INPUTS, HELD_OUT = (torch.randn(count, 16, generator=GENERATOR) for count in (400, 300))
TOKENS, HELD_OUT_TOKENS = (torch.randn(count, 6, 16, generator=GENERATOR) for count in (60, 50))
UNEQUAL = [torch.randn(20, length, 16, generator=GENERATOR) for length in (4, 6, 9)]
DIRECTIONS = torch.randn(16, 8, generator=GENERATOR)


class Wrapped(nn.Module):
    """A network with something done to its outputs."""

    def __init__(self, network: nn.Module, wrap):
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, inputs):
        return self.wrap(self.network(inputs))


def trained(outputs: int, loss) -> nn.Module:
    torch.manual_seed(0)
    hidden = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    network = nn.Sequential(*hidden, nn.Linear(32, outputs))
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        loss(network(INPUTS)).backward()
        optimiser.step()
    return network


@pytest.fixture(scope="module")
def regression() -> nn.Module:
    """Two numbers that differ by little, and are large."""
    total = (INPUTS @ DIRECTIONS).relu().sum(dim=1, keepdim=True)
    wanted = torch.cat([total, total + 0.05 * INPUTS[:, :1]], dim=1)
    return trained(2, lambda outputs: functional.mse_loss(outputs, wanted))


@pytest.fixture(scope="module")
def single() -> nn.Module:
    """One number."""
    wanted = INPUTS @ DIRECTIONS[:, :1]
    return trained(1, lambda outputs: functional.mse_loss(outputs, wanted))


def answers(inputs: Tensor) -> Tensor:
    return inputs @ DIRECTIONS[:, 0] > 0


@pytest.fixture(scope="module")
def binary() -> nn.Module:
    wanted = answers(INPUTS).float()[:, None]
    return trained(1, lambda out: functional.binary_cross_entropy_with_logits(out, wanted))


def classes_of(inputs: Tensor) -> Tensor:
    return (inputs @ DIRECTIONS[:, :5]).argmax(dim=-1)


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return trained(5, lambda out: functional.cross_entropy(out, classes_of(INPUTS)))


def compress(network, calibration=INPUTS, **options):
    return doors.compress(network, calibration, **{"method": "lowest_rank", **options})


def kept(result) -> int:
    return sum(report.parameters_kept for report in result.layers)


@torch.no_grad()
def error_of(network, model, inputs=INPUTS) -> float:
    return ((model(inputs) - network(inputs)).norm() / network(inputs).norm()).item()


# Real numbers


def budget_of_half(network) -> dict:
    return {"max_parameters": sum(p.numel() for p in network.parameters() if p.ndim > 1) // 2}


@pytest.mark.parametrize("kind", ["kept_fraction", "max_parameters", "vector"])
def test_a_budget_makes_sense_for_a_single_number(kind, single):
    network = Wrapped(single, lambda out: out[:, 0]) if kind == "vector" else single
    goal = budget_of_half(single) if kind == "max_parameters" else {"kept_fraction": 0.5}
    result = compress(network, **goal)
    assert result.goal.met
    assert error_of(network, result.model) < 0.2
    assert result.goal.output_error == pytest.approx(error_of(network, result.model), rel=1e-4)


def test_an_output_error_is_met_by_what_the_network_gives(single):
    result = compress(single, max_output_error=0.1)
    assert result.goal.met
    assert 0.03 < error_of(single, result.model) <= 0.1
    exact = compress(single, max_output_error=0)
    assert exact.goal.met and error_of(single, exact.model) == 0


def test_layers_are_weighed_by_the_error_of_the_values(regression):
    """Not by a divergence of classes, which only sees the small difference of the two."""
    captured = ddlr.capture_layers(regression, INPUTS)
    options = layer_options(regression, captured, SVD, WalkSettings(), TOLERANCES)
    for name, choices in options.items():
        assert choices[0].divergence == 0
        for option in choices[1:]:
            alone = svd(regression, captured.only([name]), relative_tolerance=option.tolerance)
            assert option.divergence == pytest.approx(
                error_of(regression, alone.model) ** 2, rel=1e-3
            )


@pytest.mark.parametrize("prune", [compress, doors.prune], ids=["ddlr", "nettrim"])
def test_a_refit_by_values_moves_them_closer(prune, regression):
    options = {"relative_tolerance": 0.1}
    before = prune(regression, INPUTS, refit="layer", **options)
    after = prune(regression, INPUTS, refit="network", output="values", **options)
    assert error_of(regression, after.model) < error_of(regression, before.model)
    with pytest.raises(ValueError, match=r'a refit of the network .*output="classes"'):
        prune(regression, INPUTS, refit="network", **options)
    with pytest.raises(ValueError, match="output is 'numbers'; choose one of"):
        prune(regression, INPUTS, output="numbers", **options)


def test_a_budget_does_not_say_what_a_refit_trains_towards(regression):
    with pytest.raises(ValueError, match='say what that is: output="classes"'):
        compress(regression, kept_fraction=0.5, refit="network")
    result = compress(regression, max_output_error=0.05, refit="network")  # this does
    assert result.goal.met
    assert kept(result) <= kept(compress(regression, max_output_error=0.05, refit="layer"))


def test_a_refit_leaves_what_is_equal_already(regression):
    same = ddlr.refit_network(regression, regression, INPUTS, ["0", "2"], output="values")
    for mine, theirs in zip(same.parameters(), regression.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# A function


def of_the_difference(original: Tensor, outputs: Tensor) -> Tensor:
    """As if nothing but the small difference of the two outputs were asked for."""
    return (original.diff(dim=1) - outputs.diff(dim=1)).square().mean()


@torch.no_grad()
def test_a_function_decides_what_a_layer_is_worth(regression):
    captured = ddlr.capture_layers(regression, INPUTS)
    options = layer_options(
        regression, captured, SVD, WalkSettings(), TOLERANCES, output=of_the_difference
    )
    for name, choices in options.items():
        for option in choices[1:]:
            alone = svd(regression, captured.only([name]), relative_tolerance=option.tolerance)
            value = of_the_difference(regression(INPUTS), alone.model(INPUTS)).item()
            assert option.divergence == pytest.approx(value, rel=1e-3)


def test_a_function_is_what_a_refit_trains_towards(regression):
    goal = {"kept_fraction": 0.5, "output": of_the_difference}
    before, after = (compress(regression, **goal, refit=refit) for refit in ("layer", "network"))
    assert kept(before) == kept(after)
    with torch.no_grad():
        apart, closer = (
            of_the_difference(regression(INPUTS), each.model(INPUTS)) for each in (before, after)
        )
    assert closer < 0.8 * apart


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: functional.cosine_similarity(a, b).mean(), "not 0 for equal outputs"),
        (lambda a, b: -(a - b).square().mean(), "must not be negative"),
        (lambda a, b: (a - b).mean() * math.nan, "they must be|finite"),
    ],
)
def test_a_function_that_measures_no_distance_is_refused(function, message, regression):
    with pytest.raises(ValueError, match=message):
        compress(regression, kept_fraction=0.5, output=function)


def test_a_refit_needs_a_function_with_a_gradient(regression):
    options = {"relative_tolerance": 0.2, "refit": "network"}
    with pytest.raises(ValueError, match="a tensor of one number"):
        compress(regression, output=lambda a, b: (a - b).square().mean().item(), **options)
    rounded = Wrapped(regression, lambda out: out.detach())
    with pytest.raises(ValueError, match="the network's output has no gradient"):
        compress(rounded, output="values", **options)


# Answers of yes and no


def test_binary_goals_are_measured_at_0(binary):
    labels = answers(HELD_OUT)
    for given in (labels.long(), labels, labels.float()[:, None], labels.long().tolist()):
        result = compress(
            binary, max_accuracy_drop=2.0, held_out=(HELD_OUT, given), output="binary"
        )
        before, after = (
            ((model(HELD_OUT)[:, 0] > 0) == labels).double().mean().item()
            for model in (binary, result.model)
        )
        assert before > 0.9
        assert result.goal.measured == pytest.approx(100 * (before - after)) and result.goal.met
        assert 100 * (before - after) <= 2.0
    result = compress(binary, min_agreement=0.97, held_out=HELD_OUT, output="binary")
    same = (binary(HELD_OUT) > 0) == (result.model(HELD_OUT) > 0)
    assert result.goal.measured == pytest.approx(same.double().mean().item()) and result.goal.met
    assert kept(result) < 800  # of 1568


def test_several_answers_each_count(classifier):
    wanted = classifier(HELD_OUT) > 0
    result = compress(classifier, max_accuracy_drop=5, held_out=(HELD_OUT, wanted), output="binary")
    missed = 100 * ((result.model(HELD_OUT) > 0) != wanted).double().mean().item()
    assert result.goal.measured == pytest.approx(missed) and 0 < missed <= 5


def test_the_binary_divergence_is_that_of_two_classes():
    one, other = torch.randn(2, 50, 3, generator=GENERATOR)
    as_classes = [torch.stack([torch.zeros_like(each), each], dim=-1) for each in (one, other)]
    assert divergence(one, other, "binary") == pytest.approx(
        divergence(*as_classes, "classes"), rel=1e-4
    )


def test_a_single_output_is_never_taken_for_classes(binary):
    goals = ({"max_accuracy_drop": 1}, {"min_agreement": 0.9})
    held_out = (HELD_OUT, answers(HELD_OUT).long())
    for network in (binary, Wrapped(binary, lambda out: out[:, 0])):
        for goal in goals:
            with pytest.raises(ValueError, match=r'is not certain .* say output="binary"'):
                compress(network, **goal, held_out=held_out)
            with pytest.raises(ValueError, match='a single logit is output="binary"'):
                compress(network, **goal, held_out=held_out, output="classes")
            for output in ("values", divergence):
                with pytest.raises(ValueError, match="counts predictions, of which"):
                    compress(network, **goal, held_out=held_out, output=output)


@pytest.mark.parametrize("wrap", [torch.sigmoid, torch.exp], ids=["sigmoid", "exp"])
def test_probabilities_are_no_logits(wrap, binary):
    with pytest.raises(ValueError, match="must be logits"):
        compress(Wrapped(binary, wrap), min_agreement=0.9, held_out=HELD_OUT, output="binary")


# Classes that are left out


def masked(value: float):
    def wrap(out: Tensor) -> Tensor:
        out = out.clone()
        out[..., 4] = value
        return out

    return wrap


def added(value: float):
    return lambda out: out + torch.tensor([0, 0, 0, 0, value])


LOW = torch.finfo(torch.float32).min
MASKS = [masked(-math.inf), masked(-1e9), masked(LOW), masked(-1e4), added(-1e4), added(LOW)]


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS, ids=["inf", "1e9", "min", "1e4", "+1e4", "+min"])
def test_a_masked_class_adds_nothing(mask, classifier):
    four = Wrapped(classifier, lambda out: out[:, :4])
    five = Wrapped(classifier, mask)
    goals = (
        {"kept_fraction": 0.5},
        {"max_output_error": 0.2},
        {"min_agreement": 0.9, "held_out": HELD_OUT},
        {"relative_tolerance": 0.3, "refit": "network", "output": "classes"},
        {"relative_tolerance": 0.3, "refit": "network", "output": "values"},
    )
    for goal in goals:
        one, other = (compress(network, **goal) for network in (four, five))
        assert kept(one) == kept(other)
        with torch.no_grad():
            torch.testing.assert_close(
                one.model(HELD_OUT), other.model(HELD_OUT)[:, :4], rtol=1e-2, atol=1e-2
            )
        if one.goal:
            assert one.goal.met == other.goal.met
            assert other.goal.measured == pytest.approx(one.goal.measured, rel=1e-4)


def test_numbers_that_are_low_are_numbers():
    """Not masks, since others are not far from them."""
    values = torch.linspace(-3e4, 10, 50)[:, None]
    moved = values * 1.1
    assert relative_error(values, moved) == pytest.approx(0.1, rel=1e-3)
    assert divergence(values, moved, "values") == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (masked(math.nan), "the network's output has 400 values that are nan or infinite"),
        (masked(math.inf), "the network's output has 400 values that are nan or infinite"),
        (lambda out: out * 0 - math.inf, "the network's output is -inf throughout"),
        (lambda out: out * 0, "the network's output is 0 throughout"),
        (lambda out: out.mean(), r"the network's output is of shape \(\)"),
        (lambda out: out.to(torch.complex64), "it must be real"),
        (lambda out: (out, out), "the network's output is a tuple.*forward="),
        (lambda out: {"logits": out}, "the network's output is a dict.*forward="),
        (
            lambda out: out.masked_fill(out < out.topk(2).values[:, -1:], -math.inf),
            "the network's output is masked .* at other places",
        ),
    ],
)
def test_outputs_that_can_not_be_compared_are_refused(wrap, message, classifier):
    network = Wrapped(classifier, wrap)
    for options in (
        {"kept_fraction": 0.5},
        {"relative_tolerance": 0.3, "refit": "network", "output": "values"},
    ):
        with pytest.raises(ValueError, match=message):
            compress(network, **options)
    result = compress(network, relative_tolerance=0.3)  # needs no outputs
    captured = ddlr.capture_layers(network, INPUTS)
    assert math.isnan(ddlr.output_bound(network, result, captured))


def test_a_sample_without_any_class_is_refused(classifier):
    network = Wrapped(classifier, lambda out: torch.where(out[:, :1] > 0, -math.inf, out))
    for options in (
        {"kept_fraction": 0.5, "output": "classes"},
        {"min_agreement": 0.9, "held_out": HELD_OUT, "output": "classes"},
    ):
        with pytest.raises(ValueError, match="-inf for all classes of a sample"):
            compress(network, **options)


def test_a_layer_is_not_compressed_to_where_outputs_are_not_finite(classifier, caplog):
    def wrap(out: Tensor) -> Tensor:
        return out / (out.std(dim=0, keepdim=True) > 0.5)  # nan or infinite without variation

    network = Wrapped(classifier, wrap)
    captured = ddlr.capture_layers(network, INPUTS)
    options = layer_options(network, captured, SVD, WalkSettings(), (0.1, 5.0))
    assert [option.tolerance for option in options["network.4"]] == [0.0, 0.1]
    assert "at a tolerance of 5: the network's output" in caplog.text
    result = svd(network, captured, kept_fraction=0.7, tolerances=(0.3, 5))
    assert result.model(INPUTS).isfinite().all()


# Tokens, and batches of unequal length


def test_predictions_of_tokens_each_count(classifier):
    result = compress(
        classifier, TOKENS, min_agreement=0.9, held_out=HELD_OUT_TOKENS, output="classes"
    )
    same = classifier(HELD_OUT_TOKENS).argmax(-1) == result.model(HELD_OUT_TOKENS).argmax(-1)
    assert result.goal.measured == pytest.approx(same.double().mean().item())
    assert result.goal.met and kept(result) < 1600
    labels = classes_of(HELD_OUT_TOKENS)
    result = compress(classifier, TOKENS, max_accuracy_drop=3, held_out=(HELD_OUT_TOKENS, labels))
    right = [model(HELD_OUT_TOKENS).argmax(-1) == labels for model in (classifier, result.model)]
    drop = 100 * (right[0].double().mean() - right[1].double().mean()).item()
    assert result.goal.measured == pytest.approx(drop)
    assert result.goal.met and drop <= 3


def test_an_interval_counts_samples_and_not_their_tokens(classifier):
    """Tokens that are all alike say no more than one."""
    once = HELD_OUT[:60]
    labels = classes_of(once)
    network = Wrapped(classifier, lambda out: out)
    goals = ({"max_accuracy_drop": 5}, {"min_agreement": 0.9})
    for goal in goals:
        reports = [
            compress(network, calibration, held_out=held_out, output="classes", **goal).goal
            for calibration, held_out in (
                (INPUTS, (once, labels)),
                (
                    INPUTS[:, None].expand(-1, 7, -1),
                    (once[:, None].expand(-1, 7, -1), labels[:, None].expand(-1, 7)),
                ),
            )
        ]
        assert reports[0].measured == pytest.approx(reports[1].measured)
        assert reports[0].interval == pytest.approx(reports[1].interval)


@pytest.mark.parametrize("said", [None, "classes"])
def test_classes_along_another_dimension_are_refused(said, classifier):
    network = Wrapped(classifier, lambda out: out.movedim(-1, 1))
    held_out = (HELD_OUT_TOKENS, classes_of(HELD_OUT_TOKENS))
    with pytest.raises(ValueError, match=r"held_out .* returns output.movedim\(1, -1\)"):
        compress(network, TOKENS, max_accuracy_drop=1, held_out=held_out, output=said)


def test_what_may_be_along_two_dimensions_has_to_be_said(classifier):
    tokens, labels = HELD_OUT_TOKENS[:, :5], classes_of(HELD_OUT_TOKENS[:, :5])
    goal = {"max_accuracy_drop": 3, "held_out": (tokens, labels)}
    with pytest.raises(ValueError, match="is not certain"):
        compress(classifier, TOKENS[:, :5], **goal)
    assert compress(classifier, TOKENS[:, :5], **goal, output="classes").goal.met
    with pytest.raises(ValueError, match="is not certain"):
        compress(classifier, TOKENS, min_agreement=0.9, held_out=HELD_OUT_TOKENS)
    maps = Wrapped(classifier, lambda out: out[:, :, None])
    with pytest.raises(ValueError, match=r"\(samples, classes\) or \(samples, tokens, classes\)"):
        compress(maps, TOKENS, min_agreement=0.9, held_out=HELD_OUT_TOKENS, output="classes")


@pytest.mark.slow
def test_batches_of_unequal_length_are_compared_one_by_one(classifier):
    rows = torch.cat([batch.flatten(0, 1) for batch in UNEQUAL])
    goals = (
        {"kept_fraction": 0.5},
        {"max_output_error": 0.2},
        {"kept_fraction": 0.5, "output": "classes"},
    )
    for goal in goals:
        one, other = (compress(classifier, each, **goal) for each in (UNEQUAL, rows))
        assert kept(one) == kept(other)
        assert one.goal.measured == pytest.approx(other.goal.measured, rel=1e-4)
    held_out = [(batch, classes_of(batch)) for batch in UNEQUAL]
    result = compress(classifier, UNEQUAL, max_accuracy_drop=4, held_out=held_out)
    right = [
        torch.cat([(model(x).argmax(-1) == y).flatten() for x, y in held_out]).double().mean()
        for model in (classifier, result.model)
    ]
    assert result.goal.measured == pytest.approx(100 * (right[0] - right[1]).item())
    for output in ("classes", "values", "binary"):
        options = {"relative_tolerance": 0.2, "output": output}
        before = compress(classifier, UNEQUAL, refit="layer", **options)
        after = compress(classifier, UNEQUAL, refit="network", **options)
        apart, closer = (
            divergence(
                [classifier(batch) for batch in UNEQUAL],
                [result.model(batch) for batch in UNEQUAL],
                output,
            )
            for result in (before, after)
        )
        assert closer < 0.8 * apart


def test_batches_change_nothing_in_a_refit_where_they_fit_together(classifier):
    compressed = compress(classifier, INPUTS, relative_tolerance=0.2).model
    layers = ["0", "2", "4"]
    one, other = (
        ddlr.refit_network(classifier, compressed, each, layers, output="classes")
        for each in (INPUTS, INPUTS.split(70))
    )
    assert not torch.equal(one[0].weight, compressed[0].weight)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# Held-out samples


def loader(inputs: Tensor, labels: Tensor):
    data = torch.utils.data.TensorDataset(inputs, labels)
    return torch.utils.data.DataLoader(data, batch_size=70)


def held_out_forms(labels: Tensor) -> dict:
    batches = [HELD_OUT.split(70), labels.split(70)]
    return {
        "a list": (HELD_OUT, labels.tolist()),
        "an array": (HELD_OUT, labels.numpy()),
        "a column": (HELD_OUT, labels[:, None]),
        "small": (HELD_OUT, labels.to(torch.uint8)),
        "batches": list(zip(*batches, strict=True)),
        "a generator": (pair for pair in zip(*batches, strict=True)),
        "a loader": loader(HELD_OUT, labels),
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", held_out_forms(torch.zeros(300).long()))
def test_held_out_samples_of_many_forms_measure_the_same(form, classifier):
    labels = classes_of(HELD_OUT)
    plain = compress(classifier, max_accuracy_drop=2, held_out=(HELD_OUT, labels)).goal
    given = compress(classifier, max_accuracy_drop=2, held_out=held_out_forms(labels)[form]).goal
    assert (given.measured, given.interval, given.tried) == (
        *(plain.measured, plain.interval, plain.tried),
    )


def test_batches_of_inputs_are_enough_for_agreement(classifier):
    plain, batches = (
        compress(classifier, min_agreement=0.9, held_out=held_out).goal
        for held_out in (HELD_OUT, list(HELD_OUT.split(70)))
    )
    assert plain == batches


def refused_forms() -> dict:
    labels = classes_of(HELD_OUT)
    return {
        "one-hot": (HELD_OUT, functional.one_hot(labels, 5)),
        "real labels": (HELD_OUT, labels.float()),
        "from 1": (HELD_OUT, labels + 1),
        "ignored": (HELD_OUT, torch.where(labels == 0, -100, labels)),
        "too few": (HELD_OUT, labels[1:]),
        "words": (HELD_OUT, ["a"] * 300),
        "one label": (HELD_OUT, 3),
        "no labels": (HELD_OUT, None),
        "an array": HELD_OUT.numpy(),
        "arrays": (HELD_OUT.numpy(), labels.numpy()),
        "a list for a pair": [HELD_OUT, labels],
        "two batches": HELD_OUT.split(150),
        "four batches": HELD_OUT.split(75),
        "samples": torch.utils.data.TensorDataset(HELD_OUT, labels),
        "a dict": {"inputs": HELD_OUT, "labels": labels},
        "a word": "test",
        "a number": 3,
        "nothing": (HELD_OUT[:0], labels[:0]),
        "no batches": [],
        "double": (HELD_OUT.double(), labels),
        "too wide": (torch.zeros(300, 17), labels),
        "nan": (HELD_OUT * math.nan, labels),
    }


@pytest.mark.parametrize("form", refused_forms())
def test_held_out_samples_that_are_none_are_refused_by_name(form, classifier):
    with pytest.raises((ValueError, TypeError), match="held_out"):
        compress(classifier, max_accuracy_drop=2, held_out=refused_forms()[form])


# The frontier


def test_the_network_as_it_is_comes_last():
    """Also where a smaller one equals it, or is better by rounding."""
    for effect in (0.0, -1e-9):
        options = {
            "one": [Option(0.0, 100, 0.0), Option(0.1, 90, effect), Option(0.5, 10, 0.3)],
            "two": [Option(0.0, 50, 0.0), Option(0.2, 20, 0.1)],
        }
        found = frontier(options)
        assert found[-1].tolerances == {"one": 0.0, "two": 0.0}
        assert (found[-1].parameters, found[-1].divergence) == (150, 0.0)
        sizes = [each.parameters for each in found]
        assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("goal", ["max_output_error", "min_agreement", "max_accuracy_drop"])
@pytest.mark.parametrize("refit", [False, True], ids=["", "refit"])
def test_a_goal_that_the_network_as_it_is_meets_is_met(goal, refit, classifier):
    """Though all layers seem to lose nothing, on the calibration samples."""
    captured = ddlr.capture_layers(classifier, INPUTS)
    options = {
        layer.name: [Option(0.0, layer.weight.numel(), 0.0), Option(0.9, 0, 0.0)]
        for layer in captured.layers
    }
    wanted = 1.0 if goal == "min_agreement" else 0.0
    labels = classifier(HELD_OUT).argmax(1)
    held_out = {} if goal == "max_output_error" else {"held_out": (HELD_OUT, labels)}
    result = svd(
        classifier,
        captured,
        **{goal: wanted},
        **held_out,
        options=options,
        refit="network" if refit else "none",
    )
    assert result.goal.met and result.goal.measured == wanted
    assert error_of(classifier, result.model) == 0


# Numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [np.float32, np.float64, torch.tensor, np.array], ids=["f32", "f64", "0-d", "array"]
)
def test_numbers_of_all_kinds_are_numbers(number, classifier):
    small = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))
    for method in (doors.compress, doors.prune):
        given = method(
            small,
            INPUTS,
            relative_tolerance={"0": number(0.5), "2": 0.25},
            ridge=number(0.5),
            tolerance=number(0.125),
            max_iterations=number(4000.0),
            workers=number(1),
            refit="layer",
        )
        plain = method(
            small,
            INPUTS,
            relative_tolerance={"0": 0.5, "2": 0.25},
            ridge=0.5,
            tolerance=0.125,
            max_iterations=4000,
            refit="layer",
        )
        for mine, theirs in zip(given.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert type(given.layers[0].relative_tolerance) is float
    for goal, wanted in (("kept_fraction", 0.5), ("max_parameters", 800), ("max_output_error", 1)):
        given, plain = (
            svd(classifier, INPUTS, **{goal: value}, tolerances=(0.3, 0.6))
            for value in (number(wanted), wanted)
        )
        assert given.goal == plain.goal
        assert type(given.goal.wanted) in (int, float)


@pytest.mark.parametrize("value", ["0.1", True, np.True_, math.nan, math.inf, -0.1, [0.1]], ids=str)
@pytest.mark.parametrize("argument", ["relative_tolerance", "ridge", "tolerance", "workers"])
def test_what_is_no_number_is_refused_by_name(argument, value, classifier):
    options = {"relative_tolerance": 0.1} | {argument: value}
    for method in (doors.compress, doors.prune):
        with pytest.raises(ValueError, match=f"{argument} is .*; it must be a .*number"):
            method(classifier, INPUTS, **options)
