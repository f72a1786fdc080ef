"""Networks as people have them: what is taken, what is left and why, and what is said of it."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import ddlr
import nettrim

torch.manual_seed(0)
INPUTS = torch.randn(300, 12)
TOKENS = INPUTS.view(60, 5, 12)


def compress(model, calibration=INPUTS, **options):
    options = {"method": "lowest_rank", "relative_tolerance": 0.2, **options}
    return ddlr.compress(model, calibration, **options)


def quietly(call, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


class Net(nn.Module):
    """Two layers, `first` and `second`, in a forward pass that is given, beside other modules."""

    def __init__(self, run=None, **others):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 6)
        self.run = run or (lambda net, x: net.second(net.first(x).relu()))
        for name, module in others.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


# --- left as they are ------------------------------------------------------------------------


class Experts(nn.Module):
    """Sends each sample to an expert by the sign of its first value; the third gets none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        chosen, sums = (x[:, 0] > 0).long(), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                sums = sums.index_add(0, rows, expert(x[rows]))
        return self.out(sums)


@pytest.mark.parametrize("door", [ddlr.compress, nettrim.prune])
def test_a_layer_that_is_never_called_is_reported_and_only_an_error_if_named(door):
    model = Experts()
    with pytest.warns(UserWarning, match=r"layer 'experts.2' was not called") as warned:
        result = door(model, INPUTS, relative_tolerance=0.3)
    assert len(warned) == 1
    [skipped] = result.skipped
    assert (skipped.name, skipped.status, skipped.parameters) == ("experts.2", "not_called", 144)
    assert skipped.share == pytest.approx(144 / (3 * 144 + 48))
    assert [report.name for report in result.layers] == ["experts.0", "experts.1", "out"]
    assert torch.equal(result.model.experts[2].weight, model.experts[2].weight)
    with pytest.warns(UserWarning, match="was not called"):
        assert len(door(model, INPUTS, relative_tolerance=0.3, layers="experts.*").layers) == 2
    with pytest.raises(ValueError, match=r"layer 'experts.2' was not called"):
        door(model, INPUTS, relative_tolerance=0.3, layers=["experts.2", "out"])


def test_an_expert_that_only_a_later_batch_reaches_is_compressed():
    ordered = INPUTS[INPUTS[:, 0].argsort()]
    with pytest.warns(UserWarning, match="was not called"):
        result = compress(Experts(), ordered.split(100), relative_tolerance=0.3)
    assert [report.name for report in result.layers] == ["experts.0", "out", "experts.1"]
    tied = Experts()
    tied.reads = tied.experts[1].weight  # a second name for the weight, on no layer
    with pytest.warns(UserWarning, match="'experts.1' shares its weight with 'reads'"):
        result = compress(tied, ordered.split(100), relative_tolerance=0.3)
    assert [report.name for report in result.layers] == ["experts.0", "out"]


def test_packed_projections_are_listed_with_their_share():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval()
    result = quietly(compress, model, TOKENS)
    skipped = {each.name: each for each in result.skipped}
    assert {name: str(each.status) for name, each in skipped.items()} == {
        "self_attn.out_proj": "not_called",
        "self_attn.in_proj_weight": "packed",
    }
    whole = 2 * 12 * 24 + 4 * 12 * 12
    assert skipped["self_attn.in_proj_weight"].share == pytest.approx(3 * 144 / whole)
    assert sum(each.share for each in result.skipped) == pytest.approx(4 * 144 / whole)


@pytest.mark.parametrize("cell", [nn.LSTM(12, 8, batch_first=True), nn.GRUCell(12, 8)])
def test_recurrent_weights_are_listed_and_stay(cell):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = cell, nn.Linear(8, 4)

        def forward(self, x):
            if isinstance(self.cell, nn.LSTM):
                return self.head(self.cell(x)[0].relu())
            state = None
            for step in x.unbind(dim=1):
                state = self.cell(step, state)
            return self.head(state.relu())

    model = Recurrent()
    result = compress(model, TOKENS)
    assert [report.name for report in result.layers] == ["head"]
    assert {str(each.status) for each in result.skipped} == {"packed"}
    assert {each.name.split(".")[0] for each in result.skipped} == {"cell"}
    assert result.model(TOKENS).shape == model(TOKENS).shape


class Adapted(nn.Module):
    """A layer of an adapter library: the base layer and two thin ones beside it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.down = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.up = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.up["default"](self.down["default"](x))


def test_layers_of_an_adapter_are_left_with_what_to_do():
    model = Net()
    model.first = Adapted(model.first)
    with pytest.warns(UserWarning, match="merge it first"):
        result = compress(model)
    assert [report.name for report in result.layers] == ["second"]
    assert {each.name for each in result.skipped} == {
        *("first.base_layer", "first.down.default", "first.up.default"),
    }
    with pytest.raises(ValueError, match=r"'first.base_layer' belongs to an adapter, a Adapted"):
        compress(model, layers=["first.base_layer"])


def test_an_embedding_tied_to_the_head_stays_tied():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body = nn.Embedding(20, 12), nn.Linear(12, 12)
            self.head = nn.Linear(12, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.body(self.table(tokens)).relu())

    model = Language()
    tokens = torch.randint(0, 20, (40, 6))
    with pytest.warns(UserWarning, match="'head' shares its weight with 'table.weight'"):
        result = compress(model, tokens)
    assert result.model.head.weight is result.model.table.weight
    assert [each.name for each in result.skipped] == ["head"]
    with pytest.raises(ValueError, match="shares its weight"):
        compress(model, tokens, layers=["head"])


# --- taken -----------------------------------------------------------------------------------


def test_separate_projections_of_attention_are_compressed():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.query, self.key, self.value, self.out = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x):
            q, k, v = self.query(x), self.key(x), self.value(x)
            return self.out(functional.scaled_dot_product_attention(q, k, v))

    result = compress(Attention(), TOKENS)
    assert [report.name for report in result.layers] == ["query", "key", "value", "out"]
    assert {report.activation for report in result.layers} == {"none"}
    assert not result.skipped and result.model(TOKENS).shape == (60, 5, 12)


def test_a_module_that_is_used_several_times_is_calibrated_on_all_its_calls():
    model = Net(lambda net, x: net.second(net.first(x).relu()) - net.second(net.first(-x).relu()))
    captured = ddlr.capture_layers(model, INPUTS)
    assert [len(layer.inputs) for layer in captured.layers] == [600, 600]
    result = compress(model, captured)
    with torch.no_grad():
        both = torch.cat([INPUTS, -INPUTS])
        wanted = model.first(both).relu()
        error = (result.model.first(both).relu() - wanted).norm() / wanted.norm()
    assert error <= 0.2 * 1.001


@pytest.mark.parametrize("dimensions", [(300,), (60, 5), (5, 6, 10), (2, 5, 6, 5)])
def test_leading_dimensions_may_be_of_any_number(dimensions):
    flat = compress(Net())
    shaped = compress(Net(), INPUTS.view(*dimensions, 12))
    for one, other in zip(flat.model.parameters(), shaped.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


class Conv1D(nn.Module):
    """As in GPT-2: the weight is stored as (in_features, out_features)."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(0.3 * torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(
            *x.shape[:-1], self.nf
        )


Conv1D.__module__ = "transformers.pytorch_utils"


@pytest.mark.parametrize("method", ["nuclear", "lowest_rank", "fewest_weights", "nettrim"])
@pytest.mark.parametrize("order", ["parallel", "cascade"])
def test_a_transposed_layer_is_one_like_any_other(method, order):
    torch.manual_seed(0)
    transposed = Net(first=Conv1D(16, 12), second=Conv1D(6, 16))
    plain = Net()
    with torch.no_grad():
        for name in ("first", "second"):
            here, there = transposed.get_submodule(name), plain.get_submodule(name)
            there.weight.copy_(here.weight.T)
            there.bias.copy_(here.bias)
    door = nettrim.prune if method == "nettrim" else ddlr.compress
    options = {"relative_tolerance": 0.4, "order": order}
    if method != "nettrim":
        options["method"] = method
    one, other = (door(model, TOKENS, **options) for model in (transposed, plain))
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert mine.form == theirs.form and mine.activation == theirs.activation
        assert mine.parameters_kept == theirs.parameters_kept
        assert mine.relative_error == pytest.approx(theirs.relative_error, rel=1e-2)
    assert torch.allclose(one.model(TOKENS), other.model(TOKENS), atol=1e-3)
    kept = door(transposed, TOKENS, relative_tolerance=0.0)
    assert torch.equal(kept.model(TOKENS), transposed(TOKENS))


def test_a_compressed_network_is_compressed_again():
    model = Net()
    once = compress(model, relative_tolerance=0.1)
    for network in (once.model, ddlr.compact(once.model)):
        same = quietly(compress, network, relative_tolerance=0.0)
        assert torch.equal(same.model(INPUTS), network(INPUTS))
        again = quietly(compress, network, relative_tolerance=0.5)
        assert [report.name for report in again.layers] == ["first", "second"]
        for report, before in zip(again.layers, once.layers, strict=True):
            assert report.parameters_kept <= before.parameters_kept
        with torch.no_grad():
            hidden = network.first(INPUTS).relu()
            error = (again.model.first(INPUTS).relu() - hidden).norm() / hidden.norm()
        assert error <= 0.5 * 1.001
        # One that would not be smaller stays in the form that it has.
        tight = quietly(compress, network, relative_tolerance=1e-6)
        for report in tight.layers:
            assert report.parameters_kept <= report.parameters_dense
        assert torch.allclose(tight.model(INPUTS), network(INPUTS), atol=1e-4)


# --- wrappers --------------------------------------------------------------------------------


def test_a_data_parallel_wrapper_is_passed_through():
    wrapped = compress(nn.DataParallel(Net()))
    plain = compress(Net())
    assert [report.name for report in wrapped.layers] == ["module.first", "module.second"]
    assert torch.equal(wrapped.model(INPUTS), plain.model(INPUTS))


def test_a_module_that_holds_a_trainer_with_a_lock_is_refused_by_name():
    class Trainer:
        def __init__(self):
            self.lock = threading.Lock()

    model = Net()
    model.trainer = Trainer()
    with pytest.raises(ValueError, match=r"attribute 'trainer' of the model.*can not be copied"):
        compress(model)
    model.trainer = None
    assert compress(model).layers


def test_another_precision_is_kept():
    for dtype in (torch.float64, torch.bfloat16):
        result = compress(Net().to(dtype), INPUTS.to(dtype))
        assert {each.dtype for each in result.model.parameters()} == {dtype}
        assert result.model(INPUTS.to(dtype)).dtype == dtype


# --- warnings --------------------------------------------------------------------------------


def test_too_few_samples_are_warned_of_once():
    model = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 4))
    with pytest.warns(UserWarning, match="layer '0' has 3 samples for 512 inputs") as warned:
        compress(model, torch.randn(3, 512))
    assert len(warned) == 1 and "2 other layers" in str(warned[0].message)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(Net())


# --- cost ------------------------------------------------------------------------------------


def passes_of(model, monkeypatch, **options) -> tuple[int, int]:
    """How often a capture runs a network on whole batches, and calls a layer's product on them."""
    whole, products = [], []
    linear = functional.linear

    def counted(inputs, *rest):
        if inputs.shape[0] == 100:
            products.append(inputs)
        return linear(inputs, *rest)

    forward = type(model).forward

    def run(self, x):
        if len(x) == 100:
            whole.append(x)
        return forward(self, x)

    monkeypatch.setattr(functional, "linear", counted)
    monkeypatch.setattr(type(model), "forward", run)
    ddlr.capture_layers(model, INPUTS.split(100), **options)
    monkeypatch.undo()
    return len(whole), len(products)


def test_a_capture_costs_few_passes_whatever_the_number_of_layers(monkeypatch):
    class Deep(nn.Module):
        def __init__(self, activation):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(8))
            self.activation = activation

        def forward(self, x):
            for layer in self.layers:
                x = self.activation(layer(x))
            return x

    # Three batches: a pass to record, one with stand-ins, which calls no layer, and one more
    # where all layers have a ReLU.
    smooth = passes_of(Deep(functional.gelu), monkeypatch)
    assert smooth[0] <= 6 and smooth[1] <= 2 * 3 * 8  # the product, and the check of it
    relu = passes_of(Deep(functional.relu), monkeypatch)
    assert relu[0] <= 9 + 8
    names = {
        layer.name: layer.activation
        for layer in ddlr.capture_layers(Deep(functional.relu), INPUTS).layers
    }
    assert set(names.values()) == {"relu"}


def test_passes_that_differ_are_no_reason_to_refuse():
    model = Net(lambda net, x: net.second(net.first(x).relu() + 0.1 * torch.randn(16)))
    result = compress(model, INPUTS.split(100))
    assert len(result.layers) == 2 and not result.skipped
    # What a stand-in shows is not asked of a network whose passes differ.
    drawn = torch.Generator().manual_seed(0)
    noisy = Net(lambda net, x: net.second(net.first(x).relu() + torch.randn(16, generator=drawn)))
    assert len(compress(noisy).layers) == 2
