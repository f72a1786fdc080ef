"""Compressed networks leave the library: ONNX, torch.export, tracing, compilation, quantisation."""

import copy
import sys
import warnings

import onnxruntime
import pytest
import torch
from torch import nn

import ddlr
import nettrim
from ddlr import (
    LowRankLinear,
    PivotedLinear,
    SelectedLinear,
    SparseFactors,
    SparseLinear,
    SparsePlusLowRank,
    export,
)


def run(path, **inputs: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {name: each.numpy() for name, each in inputs.items()}
    return [torch.from_numpy(each) for each in session.run(None, given)]


def chosen(number: int, of: int) -> torch.Tensor:
    return torch.randperm(of, generator=torch.Generator().manual_seed(0)) < number


def selected(inner: nn.Module, in_features: int, out_features: int) -> SelectedLinear:
    inputs, outputs = (
        chosen(inner.in_features, in_features),
        chosen(inner.out_features, out_features),
    )
    return SelectedLinear(inner, inputs, outputs)


def sparse(in_features: int, out_features: int) -> SparseLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.9] = 0
    return SparseLinear.from_weight(weight, torch.arange(float(out_features)))


def zeroed(layer: nn.Linear) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape, generator=generator) < 0.7] = 0
    return layer


# Indices of one byte and of two.
FORMS = {
    "low rank": LowRankLinear(20, 30, 4),
    "rank 0": LowRankLinear(20, 30, 0),
    "pivoted": PivotedLinear(20, 30, 4),
    "sparse": sparse(20, 30),
    "selected": selected(nn.Linear(11, 9, bias=False), 20, 30),
    "selected low rank": selected(LowRankLinear(40, 30, 4), 300, 400),
    "sum": SparsePlusLowRank(zeroed(nn.Linear(20, 30, bias=False)), LowRankLinear(20, 30, 4)),
    "sum that runs sparse": SparsePlusLowRank(sparse(20, 30), PivotedLinear(20, 30, 4)),
    "factors": SparseFactors(zeroed(nn.Linear(20, 9, bias=False)), zeroed(nn.Linear(9, 30))),
    "factors that run sparse": SparseFactors(sparse(20, 9), sparse(9, 30)),
}


@pytest.fixture(params=FORMS)
def form(request) -> nn.Module:
    layer = copy.deepcopy(FORMS[request.param])
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(layer.out_features, 3)).eval()


@pytest.fixture
def inputs(form) -> torch.Tensor:
    return torch.randn(5, form[0].in_features, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "small.onnx"


def test_every_form_runs_as_onnx_on_any_number_of_samples(form, inputs, path):
    ddlr.to_onnx(form, inputs[:1], path)
    for some in (inputs[:1], inputs[:2], inputs):
        assert torch.allclose(run(path, input=some)[0], form(some), atol=1e-5)
    assert list(path.parent.iterdir()) == [path]


def test_every_form_is_exported_by_torch(form, inputs):
    program = torch.export.export(
        form, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    assert torch.allclose(program(inputs[:3]), form(inputs[:3]), atol=1e-6)


def test_every_form_is_traced_and_compiled(form, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(form, inputs[:2])
    # Whose product is none that is compiled.
    whole = not any(isinstance(each, SparseLinear) for each in form.modules())
    torch._dynamo.reset()  # what other tests compiled, or were refused, counts no more
    compiled = torch.compile(form, backend="aot_eager", fullgraph=whole)
    for run_form in (traced, compiled):
        assert torch.allclose(run_form(inputs), form(inputs), atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("compact", [True, False])
def test_a_compressed_network_is_quantised(network, digits, compact):
    result = ddlr.compress(
        network, digits.calibration(200, seed=0), relative_tolerance=0.3, method="fewest_weights"
    )
    model = ddlr.compact(result.model) if compact else result.model
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(each) is nn.Linear for each in quantised.modules())
    images = digits.test.images
    # Eight bits a value change the dense network's answer on 0.3 % of these images.
    agree = (quantised(images).argmax(1) == model(images).argmax(1)).double().mean()
    assert agree > 0.95


def test_a_result_is_exported(network, digits, path):
    result = nettrim.prune(network, digits.calibration(200, seed=0), relative_tolerance=0.3)
    ddlr.to_onnx(result, digits.test.images[:4], path)
    images = digits.test.images[:100]
    assert torch.allclose(run(path, input=images)[0], result.model(images), rtol=1e-4, atol=1e-4)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens, scale, shift=None):
        hidden = self.dropout(self.layer(self.embedding(tokens))) * scale
        return {"first": hidden if shift is None else hidden + shift, "second": hidden.sum(dim=1)}


TOKENS, SCALE = torch.arange(12).reshape(3, 4) % 9, torch.rand(3, 1, 1)


@pytest.mark.parametrize(
    ("example", "names", "forward"),
    [
        ((TOKENS, SCALE), ("input_0", "input_1"), None),
        ({"tokens": TOKENS, "scale": SCALE}, ("tokens", "scale"), None),
        ({"scale": SCALE, "tokens": TOKENS, "shift": None}, None, None),
        (
            {"ids": TOKENS, "factor": SCALE},
            ("ids", "factor"),
            lambda model, batch: model(batch["ids"], batch["factor"]),
        ),
    ],
    ids=["positional", "keywords", "a keyword that is None", "forward"],
)
def test_networks_of_several_inputs_and_outputs(example, names, forward, path):
    model = TwoInputs()
    ddlr.to_onnx(model, example, path, forward=forward)
    assert model.training
    model.eval()
    if names is not None:
        tokens, scale = TOKENS[:2] + 1, SCALE[:2] + 1
        found = run(path, **dict(zip(names, (tokens, scale), strict=True)))
        for one, other in zip(found, model(tokens, scale).values(), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


class OfFour(nn.Module):
    def forward(self, inputs):
        return inputs.reshape(4, -1).sum(dim=1)


def test_a_network_for_one_number_of_samples_is_refused_or_fixed(path):
    with pytest.raises(RuntimeError, match=r"OfFour can not be .*say dynamic_batch=False"):
        ddlr.to_onnx(OfFour(), torch.rand(4, 3), path)
    assert list(path.parent.iterdir()) == []
    ddlr.to_onnx(OfFour(), torch.rand(4, 3), path, dynamic_batch=False)
    assert torch.allclose(run(path, input=torch.ones(4, 3))[0], torch.full((4,), 3.0))


def test_a_file_that_gives_something_else_is_not_kept(monkeypatch, path):
    path.write_bytes(b"before")
    exported = torch.onnx.export

    def other(called, *arguments, **keywords):
        called = copy.deepcopy(called)
        called.model.bias.data += 1e-3
        return exported(called, *arguments, **keywords)

    monkeypatch.setattr(torch.onnx, "export", other)
    with pytest.raises(RuntimeError, match="output 0 of the exported network differs by 0"):
        ddlr.to_onnx(nn.Linear(3, 2), torch.rand(4, 3), path)
    assert path.read_bytes() == b"before" and list(path.parent.iterdir()) == [path]
    ddlr.to_onnx(nn.Linear(3, 2), torch.rand(4, 3), path, check=False)


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.2, -4.0], 0.05),
        ([0.0, 0.0], [0.5, 0.0], 0.5),
        ([float("nan"), 1.0, float("inf")], [float("nan"), 1.0, float("inf")], 0.0),
        ([1.0, 1.0], [float("nan"), 1.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_differences_are_relative_to_the_largest_output(one, other, difference):
    found = export._relative_difference(torch.tensor(one), torch.tensor(other))
    assert found == pytest.approx(difference)


def test_packages_that_are_missing_are_named(monkeypatch, path):
    monkeypatch.setattr(export, "find_spec", lambda name: None if "onnx" in name else sys)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        ddlr.to_onnx(nn.Linear(3, 2), torch.rand(4, 3), path)
    with pytest.raises(ImportError, match=r"pip install onnx onnxscript$"):
        ddlr.to_onnx(nn.Linear(3, 2), torch.rand(4, 3), path, check=False)


def test_examples_and_folders_that_are_of_no_use_are_named(path):
    with pytest.raises(TypeError, match="example is a dict without a tensor"):
        ddlr.to_onnx(nn.Linear(3, 2), {"a": 1}, path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ddlr.to_onnx(nn.Linear(3, 2), torch.rand(4, 3), path / "missing" / "small.onnx")
