"""The smallest form of a layer: its promise, and never larger than either form by itself."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import ddlr
import nettrim
from ddlr import CentredInputs, fewest_weights
from ddlr.constraints import OutputSet
from ddlr.method import LayerProblem
from ddlr.problem import WarmStart
from ddlr.sizes import layer_size
from made_up_quadratics import normal
from nettrim import fewest_nonzeros, smallest_layer
from nettrim.smallest import is_low_rank, refit_smallest, store_smallest


def low_rank_layer():
    """A dense weight of rank 3, of 20 outputs and 12 inputs."""
    return normal(20, 3, seed=2) @ normal(3, 12, seed=3)


def sparse_layer():
    """A weight of full rank with one nonzero input for most outputs."""
    weight = torch.zeros(20, 12, dtype=torch.float64)
    weight[torch.arange(20), torch.arange(20) % 12] = 1 + normal(20, seed=4).abs()
    return weight


def sum_layer():
    """A weight that is the sum of both, the sparse one twice."""
    return low_rank_layer() + 2 * sparse_layer()


def problem_of(weight, *, share=0.05):
    inputs = normal(300, weight.shape[1], seed=1)
    start = WarmStart(weight, normal(len(weight), seed=5))
    targets = (inputs @ start.weight.T + start.bias).relu()
    return inputs, targets, share * targets.norm().item(), start


@pytest.mark.parametrize("minimise", ["parameters", "bytes", "latency"])
@pytest.mark.parametrize(
    ("planted", "form"), [(low_rank_layer, "low_rank"), (sparse_layer, "sparse")]
)
def test_a_planted_form_is_found_within_the_radius(planted, form, minimise):
    inputs, targets, radius, start = problem_of(planted())
    found = smallest_layer(inputs, targets, radius, minimise=minimise, warm_start=start)
    error = OutputSet(targets, radius, "relu", "hinge").violation(
        torch.addmm(found.bias, inputs, found.weight.T)
    )
    assert error <= 1e-6
    stored = store_smallest(found.weight, found.bias, **found.parts or {})
    assert torch.allclose(stored.weight, found.weight, atol=1e-9)
    if minimise != "latency":  # of layers so small, that is chance
        assert layer_size(stored).form == form


@pytest.mark.parametrize("minimise", ["parameters", "bytes"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_it_is_never_larger_than_either_form_by_itself(share, minimise):
    inputs, targets, radius, start = problem_of(sum_layer(), share=share)
    sizes = []
    for solve in (fewest_weights, fewest_nonzeros):
        solved = solve(inputs, targets, radius, warm_start=start)
        sizes.append(getattr(layer_size(store_smallest(solved.weight, solved.bias)), minimise))
    found = smallest_layer(inputs, targets, radius, minimise=minimise, warm_start=start)
    assert found.objective <= min(sizes)
    assert found.parts is not None or found.objective == min(sizes)
    stored = store_smallest(found.weight, found.bias, **found.parts or {})
    assert getattr(layer_size(stored), minimise) == found.objective


@pytest.mark.parametrize("planted", [low_rank_layer, sparse_layer, sum_layer])
def test_a_refit_keeps_the_form_and_its_size_and_lowers_the_error(planted):
    inputs, targets, radius, start = problem_of(planted(), share=0.2)
    found = smallest_layer(inputs, targets, radius, warm_start=start)
    problem = LayerProblem(CentredInputs(inputs), targets, radius, "relu", start.weight, start.bias)
    weight, bias, parts = refit_smallest(problem, found, ridge=1e-2)
    before, after = (
        OutputSet(targets, 0.0, "relu", "hinge").deviation(inputs @ each[0].T + each[1]).norm()
        for each in ((found.weight, found.bias), (weight, bias))
    )
    assert after <= before
    assert (parts is None) == (found.parts is None)
    assert is_low_rank(weight) == is_low_rank(found.weight)
    stored = store_smallest(weight, bias, **parts or {})
    assert layer_size(stored).parameters <= found.objective


@pytest.mark.parametrize(("order", "refit"), [("parallel", "none"), ("cascade", "network")])
@pytest.mark.parametrize(
    ("planted", "form"), [(sparse_layer, "sparse"), (sum_layer, "sparse_low_rank")]
)
def test_a_network_takes_all_forms_and_keeps_its_promises(planted, form, order, refit, tmp_path):
    torch.manual_seed(0)
    layers = OrderedDict(
        fc1=nn.Linear(12, 20), relu1=nn.ReLU(), fc2=nn.Linear(20, 16), relu2=nn.ReLU()
    )
    network = nn.Sequential(layers | {"fc3": nn.Linear(16, 4)})
    with torch.no_grad():
        network.fc1.weight.copy_(planted())
        network.fc2.weight.copy_(normal(16, 2, seed=8) @ normal(2, 20, seed=9))
    inputs = torch.randn(400, 12)
    result = nettrim.prune(
        network,
        inputs,
        method="smallest",
        relative_tolerance=0.05,
        order=order,
        refit=refit,
        output="values",
    )
    forms = {report.name: report.form for report in result.layers}
    assert forms["fc1"] == form
    assert forms["fc2"] in ("low_rank", "sparse_low_rank", "sparse_factors")
    if refit == "none":
        assert all(report.violation <= 1e-6 for report in result.layers)
    for report in result.layers:
        size = layer_size(result.model.get_submodule(report.name))
        assert size.parameters == report.parameters_kept
    compact = ddlr.compact(result.model)
    assert torch.allclose(compact(inputs), result.model(inputs), atol=1e-5)
    ddlr.save(result, tmp_path / "small.safetensors")
    loaded = ddlr.load(tmp_path / "small.safetensors", network)
    assert torch.allclose(loaded(inputs), result.model(inputs), atol=1e-5)


def test_a_measure_that_is_none_is_refused_by_name():
    inputs, targets, radius, start = problem_of(sparse_layer())
    with pytest.raises(ValueError, match="minimise is 'time'"):
        smallest_layer(inputs, targets, radius, minimise="time", warm_start=start)
    with pytest.raises(ValueError, match="'fewest_nonzeros' has no such option"):
        nettrim.prune(
            nn.Linear(3, 2),
            torch.randn(9, 3),
            method="fewest_nonzeros",
            minimise="bytes",
            relative_tolerance=0.1,
        )
