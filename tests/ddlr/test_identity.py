"""Networks as people have them: who holds a layer, who reads its weight, what stays untouched."""

import copy
import functools
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import ddlr
import doors
import nettrim
from ddlr.layers import replace_layer

INPUTS = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
INPUTS = INPUTS @ torch.diag(torch.logspace(0, -1.5, 16))
METHODS = {
    "lowest_rank": functools.partial(doors.compress, method="lowest_rank"),
    "fewest_weights": functools.partial(doors.compress, method="fewest_weights"),
    "prune": doors.prune,
}


class Net(nn.Module):
    """Two layers and a forward pass that is given."""

    def __init__(self, forward=None, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 5)
        self.run = forward or (lambda net, x: net.second(net.first(x).relu()))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.run(self, x)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))


def compress(model, calibration=INPUTS, *, relative_tolerance=0.2, **options):
    options = {"method": "lowest_rank", **options}
    return doors.compress(model, calibration, relative_tolerance=relative_tolerance, **options)


@torch.no_grad()
def moved(model: nn.Module, other: nn.Module, inputs=INPUTS) -> float:
    wanted = model.eval()(inputs.clone())
    return ((other.eval()(inputs.clone()) - wanted).norm() / wanted.norm()).item()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- what reads a layer ----------------------------------------------------------------------


def all_batches_but_the_first(net, x):
    hidden = net.first(x)
    return net.second(hidden.relu()) + (x[:, :1] > 0) * hidden[:, :5]


READ_RAW = {
    "beside the ReLU": lambda net, x: net.second(net.first(x).relu()) + net.first(x)[:, :5],
    "on some samples": all_batches_but_the_first,
    "in another output": lambda net, x: [net.second((h := net.first(x)).relu()), {"raw": h}],
    "drawn at random": lambda net, x: net.second((net.first(x) + torch.randn(24)).relu()),
    "numpy's": lambda net, x: net.second(net.first(x).relu() * float(np.random.rand())),
    "Python's": lambda net, x: net.second(net.first(x).relu() * random.random()),
}


@pytest.mark.parametrize("path", READ_RAW)
def test_a_layer_that_is_read_raw_anywhere_has_no_relu(path):
    sorted_by_first = INPUTS[INPUTS[:, 0].argsort()]
    captured = ddlr.capture_layers(Net(READ_RAW[path]), sorted_by_first.split(50))
    assert [layer.activation for layer in captured.layers] == ["none", "none"]
    believed = ddlr.capture_layers(Net(READ_RAW[path]), INPUTS, activations={"first": "relu"})
    assert [layer.activation for layer in believed.layers] == ["relu", "none"]


def test_only_the_last_or_only_the_first_batch_may_tell():
    for batches in (INPUTS[INPUTS[:, 0].argsort()], INPUTS[INPUTS[:, 0].argsort().flip(0)]):
        for model in (Net(all_batches_but_the_first), Net()):
            captured = ddlr.capture_layers(model, batches.split(50))
            wanted = "none" if model.run is all_batches_but_the_first else "relu"
            assert captured.layers[0].activation == wanted


@pytest.mark.parametrize(
    "between",
    [
        lambda h: functional.max_pool1d(h[:, None], 2)[:, 0].repeat(1, 2).relu(),
        lambda h: functional.dropout(h.relu(), 0.5, training=False).view(-1, 4, 6).flatten(1),
        functional.relu6,
    ],
)
def test_a_relu_is_found_behind_pooling_and_reshaping(between):
    model = Net(lambda net, x: {"logits": net.second(between(net.first(x)))})
    captured = ddlr.capture_layers(model, INPUTS)
    assert [layer.activation for layer in captured.layers] == ["relu", "none"]


def test_outputs_that_are_too_coarse_to_tell_are_no_relu():
    model = Net(lambda net, x: net.second(net.first(x).relu() + 1).add(5).argmax(dim=1))
    captured = ddlr.capture_layers(model, INPUTS)
    assert [layer.activation for layer in captured.layers] == ["relu", "none"]


def test_outputs_read_by_something_else_on_later_samples_are_not_dropped():
    def forward(net, x):
        hidden = net.first(x).relu()
        return net.second(hidden) + (x[:, :1] > 0) * hidden[:, :5]

    model = Net(forward)
    with torch.no_grad():
        model.second.weight[:, ::2] = 0
    sorted_by_first = INPUTS[INPUTS[:, 0].argsort()]
    for calibration in (sorted_by_first, sorted_by_first.split(40)):
        result = compress(model, calibration, relative_tolerance=0.1, method="fewest_weights")
        assert [report.outputs_dropped for report in result.layers] == [0, 0]
        assert moved(model, result.model) < 0.3


def test_a_silent_path_keeps_outputs_from_being_dropped():
    model = Net(lambda net, x: net.second(h := net.first(x).relu()) + (h - 50).relu()[:, :5])
    with torch.no_grad():
        model.second.weight[:, ::2] = 0
    result = compress(model, relative_tolerance=0.1, method="fewest_weights")
    assert [report.outputs_dropped for report in result.layers] == [0, 0]


# --- the owner's things ----------------------------------------------------------------------


class Counting(nn.Module):
    """Draws random numbers, counts and remembers its passes, and writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.layers, self.passes, self.seen, self.last = mlp(), 0, [], None
        self.register_buffer("count", torch.zeros(1))
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        self.passes += 1
        self.count += 1
        self.seen.append(len(x))
        torch.rand(1), np.random.rand(), random.random(), torch.rand(1, generator=self.generator)
        self.last = self.layers(x.mul_(2))
        return self.last


class Frozen(nn.Sequential):
    """Keeps its normalisation in evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


class Merging(nn.Linear):
    """Adds an adapter to its weight for evaluation, and takes it off again with rounding errors."""

    def __init__(self):
        super().__init__(16, 24)
        self.adapter, self.merged = nn.Parameter(torch.randn(24, 16)), False

    def train(self, mode=True):
        super().train(mode)
        if mode is self.merged:
            self.weight.data += (-1 if mode else 1) * self.adapter.data
            self.merged = not mode
        return self

    def forward(self, x):
        weight = self.weight if self.merged else self.weight + self.adapter
        return functional.linear(x, weight, self.bias)


class Normalising(Net):
    def forward(self, x):
        self.second.weight.data = functional.normalize(self.second.weight.data)
        return self.second(self.first(x).relu())


OWNED = {
    "counting": Counting,
    "batch norm": lambda: nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU()),
    "frozen": lambda: Frozen(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5)),
    "merging": lambda: nn.Sequential(Merging(), nn.ReLU(), nn.Linear(24, 5)),
    "normalising": Normalising,
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(16, 24)), nn.ReLU(), nn.Linear(24, 5)
    ),
    "old spectral norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(16, 24)), nn.ReLU(), nn.Linear(24, 5)
    ),
    "evaluated in part": lambda: nn.Sequential(nn.Linear(16, 24).eval(), nn.ReLU()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", OWNED)
def test_all_that_is_the_owners_stays_as_it_was(kind, method):
    torch.manual_seed(0)
    model, inputs = OWNED[kind](), INPUTS.clone()
    model.register_forward_hook(lambda *_: None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = {name: copy.copy(value) for name, value in vars(model).items() if name[0] != "_"}
    random_states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    for order in ("parallel", "cascade"):
        result = METHODS[method](model, inputs, relative_tolerance=0.2, order=order)
    ddlr.compact(result.model)

    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(inputs, INPUTS)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert str(np.random.get_state()) == random_states[2]
    assert len(model._forward_hooks) == 1 and not model._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()
    for name, value in attributes.items():
        if not isinstance(value, torch.Generator):
            assert vars(model)[name] == value
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loader_that_shuffles_leaves_the_random_state():
    loader = torch.utils.data.DataLoader(list(INPUTS), batch_size=50, shuffle=True)
    model, before = mlp(), torch.get_rng_state()
    compress(model, loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_the_copy_inherits_modes_requires_grad_and_hooks(method):
    model = mlp()
    model[0].requires_grad_(False).eval()
    model[2].bias.requires_grad_(False)
    calls = []
    model[0].register_forward_pre_hook(lambda module, given: (given[0] * 3 + 1,))
    model[0].register_forward_hook(lambda module, given, output: 2 * output - 1)
    model[2].register_forward_hook(
        lambda module, given, keywords, output: calls.append(module), with_kwargs=True
    )
    model[2].register_full_backward_hook(lambda module, *_: calls.append("backward"))
    result = METHODS[method](model, INPUTS, relative_tolerance=0.3)
    assert {report.form for report in result.layers} & {"low_rank", "sparse"}
    assert moved(model, result.model) < 0.5
    assert not any(parameter.requires_grad for parameter in result.model[0].parameters())
    for name, parameter in result.model[2].named_parameters():
        assert parameter.requires_grad == ("bias" not in name)
    calls.clear()
    result.model(INPUTS).sum().backward()
    assert calls == [result.model[2], "backward"]
    result = METHODS[method](model.train(), INPUTS, relative_tolerance=0.1)
    assert all(module.training for module in result.model.modules())
    for report in result.layers:
        assert report.relative_error_read <= 0.1 * (1 + 1e-3)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_and_inference_mode(kind):
    result = compress(mlp().to(kind), INPUTS.to(kind), order="cascade")
    assert {parameter.dtype for parameter in result.model.parameters()} == {kind}
    with torch.inference_mode():
        model = mlp()
    assert moved(model, compress(model).model) < 0.25


# --- order and identity ----------------------------------------------------------------------


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.middle, self.stem = nn.Linear(24, 5), nn.Linear(24, 24), nn.Linear(16, 24)

    def forward(self, x):
        return self.head(self.middle(self.stem(x).relu()).relu())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [None, ["head", "stem", "middle"], {"middle", "head", "stem"}])
def test_layers_are_taken_in_the_order_of_their_calls(method, layers):
    model, names = Backwards(), ["stem", "middle", "head"]
    result = METHODS[method](model, INPUTS, relative_tolerance=0.2, order="cascade", layers=layers)
    captured = ddlr.capture_layers(model, INPUTS, layers=layers)
    assert [report.name for report in result.layers] == names
    assert [layer.name for layer in captured.layers] == names
    assert [layer.name for layer in captured.only(["head", "stem"]).layers] == ["stem", "head"]
    wanted = got = INPUTS
    for report in result.layers:
        wanted = model.get_submodule(report.name)(wanted)
        got = result.model.get_submodule(report.name)(got)
        if report.name != "head":
            wanted, got = wanted.relu(), got.relu()
        error = (got - wanted).norm() / wanted.norm()
        assert report.relative_error == pytest.approx(error.item(), rel=1e-3)


def in_a_list():
    model = Net(lambda net, x: net.steps[1](net.steps[0](x).relu()))
    model.steps = [model.first, model.second]
    return model


def in_a_dict_of_tuples():
    model = Net(lambda net, x: net.second(net.steps["first"][0](x).relu()))
    model.steps = {"first": (model.first, "unused")}
    return model


def in_a_partial():
    model = Net(lambda net, x: net.second(net.step(x).relu()))
    model.step = functools.partial(lambda layer, x: layer(x), model.first)
    return model


def as_a_method():
    model = Net(lambda net, x: net.second(net.step(x).relu()))
    model.step = model.first.__call__
    return model


def in_an_object():
    class Holder:
        pass

    model = Net(lambda net, x: net.second(net.holder.layer(x).relu()))
    model.holder = Holder()
    model.holder.layer = model.first
    return model


@pytest.mark.parametrize(
    "make", [in_a_list, in_a_dict_of_tuples, in_a_partial, as_a_method, in_an_object]
)
@pytest.mark.parametrize("method", METHODS)
def test_what_runs_is_what_the_copy_stores(make, method):
    model = make()
    result = METHODS[method](model, INPUTS, relative_tolerance=0.2)
    assert [report.name for report in result.layers] == ["first", "second"]
    assert moved(model, result.model) < 0.4
    before = result.model(INPUTS)
    with torch.no_grad():
        for parameter in result.model.first.parameters():
            parameter.zero_()
    assert not torch.equal(before, result.model(INPUTS))
    assert moved(model, make()) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_at_two_places_becomes_one_smaller_layer(method):
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(16, 4))
    for layers in (None, ["4", "2"]):
        result = METHODS[method](model, INPUTS, relative_tolerance=0.2, layers=layers)
        assert [report.name for report in result.layers] == ["0", "4"]
        assert result.model[0] is result.model[2]
        assert count(result.model) <= count(model)
    with pytest.raises(ValueError, match="layers has '0' and '2', which are one layer"):
        METHODS[method](model, INPUTS, relative_tolerance=0.2, layers=["0", "2"])
    with pytest.raises(ValueError, match=r"layer '0' is called several times.*'parallel'"):
        METHODS[method](model, INPUTS, relative_tolerance=0.2, order="cascade")


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def tied_to_an_embedding():
    model = Net(
        lambda net, x: net.second(net.first(x).relu() + net.embedding(x[:, 0].gt(0).long())),
        embedding=nn.Embedding(5, 24),
    )
    model.second.weight = model.embedding.weight
    return model


def tied_in_memory():
    model = Net(lambda net, x: net.second(net.first(x).relu()) + net.table[:5, 0])
    model.register_buffer("table", model.second.weight.data.T)
    return model


def in_a_function():
    model = Net()
    kept = model.second
    model.run = lambda net, x: kept(net.first(x).relu())
    return model


def with_forward_replaced():
    model = Net()
    original = model.second.forward
    model.second.forward = lambda x: original(x) + 1
    return model


HELD_ELSEWHERE = {
    "read by a function": lambda: Net(
        lambda net, x: (
            net.second(h := net.first(x).relu()) + functional.linear(h, net.second.weight)
        )
    ),
    "its bias is read": lambda: Net(
        lambda net, x: net.second(net.first(x).relu()) + net.second.bias
    ),
    "never called": lambda: Net(
        lambda net, x: functional.linear(net.first(x).relu(), net.second.weight, net.second.bias)
    ),
    "called by its forward": lambda: Net(lambda net, x: net.second.forward(net.first(x).relu())),
    "a forward of its own": lambda: Net(second=Scaled(24, 5)),
    "forward replaced": with_forward_replaced,
    "tied": tied_to_an_embedding,
    "tied in memory": tied_in_memory,
    "in a function": in_a_function,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", HELD_ELSEWHERE)
def test_a_layer_that_can_not_be_replaced_is_left_with_a_warning_or_refused_by_name(kind, method):
    model = HELD_ELSEWHERE[kind]()
    with pytest.warns(UserWarning, match="left as it is, and not compressed: layer 'second'"):
        result = METHODS[method](model, INPUTS, relative_tolerance=0.1)
    assert [report.name for report in result.layers] == ["first"]
    assert count(result.model) <= count(model)
    assert moved(model, result.model) < 0.3
    assert torch.equal(result.model.second.weight, model.second.weight)
    with pytest.raises(ValueError, match=r"layer 'second'.*can be compressed are \['first'\]"):
        METHODS[method](model, INPUTS, relative_tolerance=0.1, layers=["first", "second"])


@pytest.mark.parametrize(
    "call",
    [
        lambda model: ddlr.compress(model, INPUTS, relative_tolerance=0.1),
        lambda model: ddlr.compress(model, INPUTS, max_output_error=0.1, tolerances=[0.1]),
        lambda model: nettrim.prune(model, INPUTS, relative_tolerance=0.1),
        lambda model: ddlr.capture_layers(model, INPUTS),
    ],
    ids=["compress", "to a goal", "prune", "capture"],
)
def test_a_warning_points_at_the_line_of_the_caller(call):
    with pytest.warns(UserWarning, match="left as it is") as warned:
        call(tied_in_memory())
    assert [each.filename for each in warned] == [__file__]


def test_layers_that_share_a_weight_are_left_and_still_share_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    model[2].weight = model[0].weight
    with pytest.warns(UserWarning, match="layer '0' shares its weight with '2.weight'"):
        result = compress(model)
    assert result.model[0].weight is result.model[2].weight
    assert [report.name for report in result.layers] == ["3"]


def computed(change):
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        change(model[0])
    return model


COMPUTED = {
    "pruned": lambda: computed(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
    "weight norm": lambda: computed(parametrizations.weight_norm),
    "old weight norm": lambda: computed(nn.utils.weight_norm),
    "old spectral norm": lambda: computed(nn.utils.spectral_norm),
    "orthogonal": lambda: computed(parametrizations.orthogonal),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("tolerance", [0, 0.01, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_computed_from_others_are_taken_as_they_are(kind, tolerance, method):
    model = COMPUTED[kind]()
    model(INPUTS).sum().backward()
    for calibration in (INPUTS, ddlr.capture_layers(model, INPUTS)):
        result = METHODS[method](model, calibration, relative_tolerance=tolerance)
        assert moved(model, result.model) <= 2.5 * tolerance
        report, stored = result.layers[0], result.model[0]
        with torch.no_grad():
            wanted = model.eval()[0](INPUTS).relu()
            error = (stored.eval()(INPUTS).relu() - wanted).norm() / wanted.norm()
        if not report.outputs_dropped:
            assert report.relative_error == pytest.approx(error.item(), abs=1e-5)


def test_tensors_with_a_graph_do_not_keep_a_model_from_being_copied():
    model = Counting()
    model(INPUTS.clone()).sum().backward()
    kept, gradients = model.last, [parameter.grad.clone() for parameter in model.parameters()]
    result = compress(model)
    assert model.last is kept and kept.requires_grad
    assert all(map(torch.equal, gradients, (each.grad for each in model.parameters())))
    assert moved(model, result.model) < 0.25


def test_what_can_not_be_copied_is_named():
    model = Net(lock=open(__file__))
    with pytest.raises(ValueError, match=r"attribute 'lock' of the model.*can not be copied"):
        compress(model)
    model.lock.close()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["first", "first"], "layers has 'first' twice"),
        ([], "layers is empty"),
        ([0], "layers has 0; it must be"),
        (3, "layers is 3; it must be a sequence of names"),
        (["third"], "layer 'third', named in layers, is no layer"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_layers_are_named_one_by_one(layers, message, method):
    with pytest.raises(ValueError, match=message):
        METHODS[method](Net(), INPUTS, relative_tolerance=0.2, layers=layers)
    captured = ddlr.capture_layers(Net(), INPUTS)
    with pytest.raises(ValueError):
        METHODS[method](Net(), captured, relative_tolerance=0.2, layers=layers)


def test_layers_may_be_an_iterator_and_called_by_keyword():
    model = Net(lambda net, x: net.second(input=net.first(input=x).relu()))
    result = compress(model, layers=(name for name in ("second", "first")))
    assert [report.name for report in result.layers] == ["first", "second"]
    assert compress(model, method="fewest_weights").layers[0].activation == "relu"


def test_networks_that_are_compiled_or_have_no_values_are_refused():
    whole = torch.compile(mlp(), backend="eager")
    whole(INPUTS)
    with pytest.raises(ValueError, match=r"torch.compile.*model\._orig_mod"):
        compress(whole)
    part = nn.Sequential(torch.compile(mlp(), backend="eager"), nn.Linear(5, 5))
    with pytest.raises(ValueError, match=r"module '0' was compiled.*model\.0\._orig_mod"):
        compress(part)
    assert [report.name for report in compress(part, layers=["1"]).layers] == ["1"]
    by_method = mlp()
    by_method.compile(backend="eager")
    with pytest.raises(ValueError, match="compile"):
        compress(by_method)
    with pytest.raises(ValueError, match="layer '0' is not initialised yet"):
        compress(nn.Sequential(nn.LazyLinear(24), nn.ReLU(), nn.Linear(24, 5)))
    with pytest.raises(ValueError, match="meta device"):
        compress(mlp().to("meta"))


# --- samples that go elsewhere ---------------------------------------------------------------


class Experts(nn.Module):
    """Sends each sample to one of some experts, by what a first layer makes of it."""

    def __init__(self, capacity: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.router, self.last = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 5)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.capacity = capacity
        with torch.no_grad():
            self.router.weight.mul_(4)

    def forward(self, x):
        x = self.first(x).relu()
        scores, sums = self.router(x), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if self.capacity:  # as many for each
                rows = scores[:, index].topk(self.capacity).indices
            else:
                rows = (scores.argmax(dim=1) == index).nonzero()[:, 0]
            if len(rows):
                sums = sums.index_add(0, rows, expert(x[rows]).relu())
        return self.last(sums)


@pytest.mark.parametrize("capacity", [None, 50, 200])
@pytest.mark.parametrize("method", METHODS)
def test_experts_are_compressed_in_parallel_and_refused_in_cascade(capacity, method):
    model = Experts(capacity)
    tolerances = {"relative_tolerance": 0.3}
    result = METHODS[method](model, INPUTS, **tolerances)
    assert len(result.layers) == 7
    captured = ddlr.capture_layers(model, INPUTS)
    for calibration in (INPUTS, captured):
        with pytest.raises(ValueError, match=r"layer 'experts.\d'.*order='parallel'"):
            METHODS[method](model, calibration, **tolerances, order="cascade")


def test_a_layer_called_twice_on_compressed_inputs_goes_in_cascade():
    def siamese(net, x):
        return net.second(net.first(x).relu()) + net.second(net.first(-x).relu())

    model = Net(siamese)
    result = compress(model, order="cascade")
    with torch.no_grad():
        halves = [(net(INPUTS), net(-INPUTS)) for net in (model.first, result.model.first)]
        wanted = torch.cat([model.second(half.relu()) for half in halves[0]])
        got = torch.cat([result.model.second(half.relu()) for half in halves[1]])
    error = ((got - wanted).norm() / wanted.norm()).item()
    assert result.layers[1].relative_error == pytest.approx(error, rel=1e-3)


# --- captures that fit -----------------------------------------------------------------------


def changed(change):
    def make():
        model = mlp()
        with torch.no_grad():
            change(model)
        return model

    return make


OTHERS = {
    "a layer before": changed(lambda model: model[0].weight.mul_(1.01)),
    "a bias before": changed(lambda model: model[0].bias.add_(0.01)),
    "the activation": changed(lambda model: model.__setitem__(1, nn.GELU())),
    "another network": lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), mlp()[2]),
    "another width": lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)),
    "other inputs": lambda: nn.Sequential(nn.Linear(9, 24), nn.ReLU(), mlp()[2]),
    "more in between": lambda: nn.Sequential(mlp()[0], mlp()[1:2].append(nn.Tanh()), mlp()[2]),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_capture_of_another_network_is_refused(kind, method):
    captured = ddlr.capture_layers(mlp(), INPUTS, layers=["2"])
    with pytest.raises(ValueError, match=r"capture"):
        METHODS[method](OTHERS[kind](), captured, relative_tolerance=0.2)


def test_a_capture_is_refused_once_the_same_network_is_trained_or_its_inputs_change():
    model, inputs = mlp(), INPUTS.clone()
    captured = ddlr.capture_layers(model, inputs)
    compress(model, captured)
    with torch.no_grad():
        model[0].weight.add_(0.01)
    with pytest.raises(ValueError, match="layer '0' was captured with other weights"):
        compress(model, captured)
    model, inputs = mlp(), INPUTS.clone()
    captured = ddlr.capture_layers(model, inputs)
    inputs.add_(1)
    with pytest.raises(ValueError, match="layer '0' was captured on other inputs"):
        compress(model, captured)


def test_a_capture_is_refused_where_the_layer_is_read_in_another_way():
    captured = ddlr.capture_layers(mlp(), INPUTS, layers=["0"])
    given = ddlr.capture_layers(mlp(), INPUTS, layers=["0"], activations={"0": "relu"})
    other = mlp()
    other[1] = nn.LeakyReLU()
    with pytest.raises(ValueError, match="layer '0' was captured with a ReLU behind it"):
        compress(other, captured)
    compress(other, given)  # what the caller says is believed
    later = mlp()
    with torch.no_grad():
        later[2].weight.mul_(2)  # which the layer is not reached by
    assert compress(later, captured).layers[0].activation == "relu"


# --- torch's transformer layers --------------------------------------------------------------


def encoder(**options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **options).eval()


TOKENS = INPUTS.view(40, 5, 16)


def test_attention_is_left_as_it_is_and_the_layers_beside_it_are_compressed():
    model = encoder()
    with pytest.warns(UserWarning, match="layer 'layers.0.self_attn.out_proj', 'layers.1"):
        result = compress(model, TOKENS, relative_tolerance=0.3)
    names = [f"layers.{index}.linear{number}" for index in (0, 1) for number in (1, 2)]
    assert [report.name for report in result.layers] == names
    with pytest.raises(ValueError, match=r"layer 'layers.0.self_attn.out_proj' was not called"):
        compress(model, TOKENS, layers=["layers.0.self_attn.out_proj", names[0]])
    assert moved(model, result.model, TOKENS) < 0.3


@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_does_not_go_around_compressed_layers(padded, monkeypatch):
    model = encoder()
    names = [f"layers.{index}.linear{number}" for index in (0, 1) for number in (1, 2)]
    result = compress(model, TOKENS, relative_tolerance=0.4, method="fewest_weights", layers=names)
    small = ddlr.compact(result.model)
    options = {"src_key_padding_mask": torch.arange(5).expand(40, 5) > 3} if padded else {}
    for each in (result.model, small):
        # Not by hooks, which take the fast path away.
        called, forward = [], nn.Module.__call__

        def note(module, *given, called=called, forward=forward, **keywords):
            called.append(module)
            return forward(module, *given, **keywords)

        monkeypatch.setattr(nn.Module, "__call__", note)
        with torch.no_grad():
            outputs = each(TOKENS, **options)
        monkeypatch.undo()
        assert all(each.get_submodule(name) in called for name in names)
        with torch.no_grad():
            assert torch.allclose(outputs, result.model(TOKENS, **options), atol=1e-5)
    if not padded:
        assert moved(model, small, TOKENS) < 0.5


def test_a_compact_layer_has_the_weight_and_bias_of_a_linear_one():
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[:, [0, 3]] = 0
        layer.weight[2] = 0
        layer.bias[2] = 0
    model = nn.Sequential(layer, nn.Linear(5, 2))
    layer.eval().requires_grad_(False)
    small = ddlr.compact(model)
    assert isinstance(small[0], ddlr.SelectedLinear)
    assert torch.equal(small[0].weight, layer.weight) and torch.equal(small[0].bias, layer.bias)
    assert not small[0].training and not small[0].weight.requires_grad
    model.tied = nn.Linear(6, 5)
    model.tied.weight = layer.weight
    assert isinstance(ddlr.compact(model)[0], nn.Linear)  # else it would be stored twice


def test_a_layer_is_replaced_under_all_its_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "more": nn.ModuleList([shared])})
    new = nn.Linear(4, 4)
    assert replace_layer(model, "one", new) is model
    assert model["one"] is new and model["more"][0] is new
    assert replace_layer(shared, "", new) is new
