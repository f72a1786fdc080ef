"""A compressed network comes back from its file as it was, and from a damaged file not at all."""

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ddlr
import nettrim
from ddlr import LowRankLinear, SelectedLinear, files
from ddlr.files import read_info
from ddlr.sizes import layer_size
from experiments.networks import mlp_digits


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return list(mine) == list(its) and all(
        mine[name].dtype == its[name].dtype and torch.equal(mine[name], its[name]) for name in mine
    )


@pytest.fixture(scope="module", params=["nuclear", "fewest_weights", "nettrim"])
def result(request, network, digits):
    calibration = digits.calibration(200, seed=0)
    if request.param == "nettrim":
        return nettrim.prune(network, calibration, relative_tolerance=0.3)
    return ddlr.compress(network, calibration, relative_tolerance=0.3, method=request.param)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("compact", [True, False])
def test_a_network_comes_back_as_it_was(result, digits, path, compact):
    ddlr.save(result, path, compact=compact)
    expected = ddlr.compact(result.model) if compact else result.model
    fresh = mlp_digits()
    before = values(fresh)
    with torch.device("meta"):
        on_meta = mlp_digits()
    for loaded in (ddlr.load(path), ddlr.load(path, fresh), ddlr.load(path, on_meta)):
        assert same(loaded, expected) and not loaded.training
        assert torch.equal(loaded(digits.test.images), expected(digits.test.images))
    assert list(values(fresh)) == list(before)
    assert all(torch.equal(each, before[name]) for name, each in values(fresh).items())


def test_a_state_dict_loads_into_another_copy_of_the_same_structure(result, path):
    ddlr.save(result, path)
    one, other = ddlr.load(path), ddlr.load(path)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(one.state_dict())
    assert same(other, one)


def test_a_file_says_what_is_in_it(result, path):
    ddlr.save(result, path)
    info = read_info(path)
    assert info.bytes == path.stat().st_size and info.goal is None
    for report, layer in zip(result.layers, info.layers, strict=True):
        assert (layer["name"], layer["form"]) == (report.name, report.form)
        assert layer["parameters_kept"] == report.parameters_kept
        assert layer["relative_error"] == pytest.approx(report.relative_error, rel=1e-5)
    ddlr.save(result.model, path)
    assert read_info(path).layers == ()


def test_a_goal_is_in_the_file(network, digits, path):
    result = ddlr.compress(network, digits.calibration(200, seed=0), kept_fraction=0.4)
    ddlr.save(result, path)
    assert read_info(path).goal["name"] == "kept_fraction" and read_info(path).goal["met"] is True


def sparse_network(density: float) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100))
    for layer in (model[0], model[2]):
        kept = torch.rand(layer.weight.shape, generator=generator) < density
        kept[:, ::5] = False
        layer.weight.data *= kept
    return model


def low_rank_network() -> nn.Sequential:
    model = nn.Sequential(LowRankLinear(784, 300, 30), nn.ReLU(), LowRankLinear(300, 100, 20))
    model[0][0].weight.data[:, ::3] = 0
    model[0][1].weight.data[7] = model[0][1].bias.data[7] = 0
    return model


@pytest.mark.parametrize(
    "model",
    [sparse_network(0.1), sparse_network(0.4), low_rank_network()],
    ids=["csr", "bitmap", "low rank"],
)
def test_a_file_is_as_small_as_is_counted(model, path):
    counted = sum(layer_size(model[place]).bytes for place in (0, 2)) + 4 * 400
    ddlr.save(model, path)
    assert path.stat().st_size <= 1.05 * counted
    assert path.stat().st_size < sum(4 * each.numel() for each in model.parameters())
    assert same(ddlr.load(path), ddlr.compact(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_those_that_were_saved(dtype, path):
    model = sparse_network(0.1).to(dtype)
    ddlr.save(model, path, compact=False)
    assert same(ddlr.load(path), model)
    assert same(ddlr.load(path, sparse_network(0.5)), model)


class Tied(nn.Module):
    """Tied embeddings, a buffer that is not saved, one that is, and normalisation."""

    def __init__(self, scale: float = 2.0):
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.register_buffer("offset", torch.arange(8.0))

    def forward(self, tokens):
        hidden = self.norm(self.inner(self.embedding(tokens))) + self.offset
        return self.scale * self.head(hidden)


def test_tied_parameters_are_stored_once_and_tied_again(path):
    model = Tied().eval()
    ddlr.save(model, path)
    assert "head.weight" not in load_file(path) and "embedding.weight" in load_file(path)
    loaded = ddlr.load(path, Tied())
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.head.weight.requires_grad
    tokens = torch.arange(40)
    assert torch.equal(loaded(tokens), model(tokens))
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    assert ddlr.load(path, untied).head.weight.shape == (40, 8)


def test_buffers_that_are_not_saved_are_those_of_the_fresh_instance(path):
    ddlr.save(Tied(), path)
    assert ddlr.load(path, Tied(scale=3.0)).scale == 3
    with torch.device("meta"):
        on_meta = Tied()
    with pytest.raises(ValueError, match="'scale' is not in the file, and on the meta device"):
        ddlr.load(path, on_meta)


def test_a_class_that_is_not_known_is_named(path):
    ddlr.save(Tied(), path)
    with pytest.raises(ValueError, match=rf"{path}: the network itself is a Tied.*load\(path, mod"):
        ddlr.load(path)


def test_another_model_is_refused_with_the_name_of_the_module(result, path):
    ddlr.save(result, path)
    other = mlp_digits()
    name, layer = next((n, m) for n, m in other.named_modules() if isinstance(m, nn.Linear))
    other.set_submodule(name, nn.Linear(layer.in_features + 1, layer.out_features))
    with pytest.raises(ValueError, match=rf"{path}: module '{name}' is"):
        ddlr.load(path, other)
    with pytest.raises(ValueError, match="tensor 'offset': it is missing"):
        model = Tied()
        del model.offset
        ddlr.save(model, path)
        ddlr.load(path, Tied())


def test_what_can_not_be_saved_is_named(path):
    with pytest.raises(TypeError, match="dict can not be saved"):
        ddlr.save({}, path)
    with torch.device("meta"), pytest.raises(ValueError, match=r"'weight' is on the meta device"):
        ddlr.save(nn.Linear(2, 3), path)
    sparse = nn.Linear(2, 3)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    with pytest.raises(ValueError, match=r"'weight' is stored as torch\.sparse_coo"):
        ddlr.save(sparse, path)

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ValueError, match="'_extra_state' in the network's state is a dict"):
        ddlr.save(Extra(2, 3), path)
    assert not path.exists()


def test_a_file_is_whole_or_not_there(path, monkeypatch):
    ddlr.save(nn.Linear(2, 3), path)
    before = path.read_bytes()

    def fails(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        ddlr.save(nn.Linear(3, 4), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    with path.open("rb") as opened:  # who reads the older file goes on to do so
        ddlr.save(nn.Linear(3, 4), path)
        assert opened.read() == before != path.read_bytes()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ddlr.save(nn.Linear(2, 3), path / "missing" / "small.safetensors")


# --- damaged and forged files ----------------------------------------------------------------


def forged(path, change, **metadata) -> None:
    """Write a file anew with other contents, and the hash that belongs to them."""
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        contents = json.loads(opened.metadata()["contents"])
    change(contents, tensors)
    text = json.dumps(contents)
    path.unlink()
    save_file(
        tensors,
        path,
        {
            "format": "ddlr",
            "format_version": "1",
            "contents": text,
            "sha256": files._digest(text, tensors),
            **metadata,
        },
    )


def small() -> nn.Sequential:
    kept = torch.tensor([True, False, False, True, False])
    selected = SelectedLinear(LowRankLinear(2, 3, 1), kept, torch.ones(3, dtype=torch.bool))
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), selected)


def test_a_forged_file_is_as_good_as_another_if_nothing_in_it_is_wrong(path):
    ddlr.save(small(), path)
    forged(path, lambda contents, tensors: None)
    ddlr.load(path, small())


def test_damage_is_found_wherever_it_is(path):
    ddlr.save(small(), path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{path}: it is damaged"):
            ddlr.load(path)
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"{path}: it"):
            ddlr.load(path)


def test_other_files_are_refused(path):
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=rf"{path}: it was not written by ddlr\.save"):
        ddlr.load(path)
    ddlr.save(small(), path)
    forged(path, lambda contents, tensors: None, format_version="2")
    with pytest.raises(ValueError, match=rf"{path}: it has format version 2"):
        ddlr.load(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ddlr.load(path.with_name("other.safetensors"))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ddlr.load(path.parent)


def _set(*places_and_value):
    *places, last, value = places_and_value

    def change(contents, tensors):
        for place in places:
            contents = contents[place]
        contents[last] = value

    return change


def _tensor(name, value):
    return lambda contents, tensors: tensors.update({name: value})


def _removed(name):
    return lambda contents, tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("modules", "1", {"class": "os.system", "arguments": {}}), "not a module of torch"),
        (_set("modules", "1", {"class": "Net"}), "module '1' is a Net"),
        (_set("modules", "1", 3), "not JSON objects"),
        (_set("modules", "1", {"form": "Lambda", "arguments": {}}), "does not know"),
        (_set("modules", "0", "arguments", "in_features", 10**15), "tensor '0.weight': it has sh"),
        (_set("modules", "0", "arguments", "in_features", 10**40), "module '0' is"),
        (
            _set("modules", "2", "arguments", "in_features", 3),
            "2.inputs.stored must name 2 different indices below 3",
        ),
        (_set("modules", "2", "arguments", "inputs", 3), "must name 3 different indices below 5"),
        (_set("modules", "2", "arguments", "in_features", 10**12), "its sizes are [1000000000000,"),
        (_set("sparse", {"1": True}), "module '1' is said to be a sparse layer"),
        (_set("encodings", "0.weight", "pickle"), "does not know the encoding 'pickle'"),
        (_set("encodings", "0.weight", ["csr"]), "small.safetensors: "),
        (_set("encodings", "0.weight", "csr"), "tensor '0.weight': its part"),
        (_set("tied", "0.weight", "2.inputs.stored"), "tensor '0.weight': it has"),
        (_set("tied", "1.inplace", "0.weight"), "'1.inplace' is tied to '0.weight'"),
        (_set("tied", "0.bias", "0.in_features"), "tensor '0.bias': it is missing"),
        (_set("layers", []), "have no 'layers'"),
        (_set("modules", {}), "the network itself is missing"),
        (_tensor("2.inputs.stored", torch.tensor([1], dtype=torch.uint8)), "must name 2 different"),
        (
            _tensor("2.inputs.stored", torch.tensor([33], dtype=torch.uint8)),
            "must name 2 different",
        ),
        (_tensor("2.inputs.stored", torch.tensor([1.0])), "torch.float32 in place of torch.uint8"),
        (_tensor("3.weight", torch.ones(2)), "tensor '3.weight': the network has no place"),
        (_removed("0.bias"), "tensor '0.bias': it is missing"),
    ],
    # By the message: functions have other names in each process.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_forged_structure_is_refused(path, change, message):
    ddlr.save(small(), path)
    forged(path, change)
    with pytest.raises(ValueError, match=rf"{path}: ") as raised:
        ddlr.load(path)
    assert message in str(raised.value)


def test_deep_contents_are_refused(path):
    ddlr.save(small(), path)
    deep = "[" * 100_000 + "]" * 100_000
    tensors = load_file(path)
    digest = files._digest(deep, tensors)
    metadata = {"format": "ddlr", "format_version": "1", "contents": deep, "sha256": digest}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=rf"{path}: "):
        ddlr.load(path)


def test_twelve_lines_train_compress_save_load_and_export(tmp_path):
    """The script compares another process with its own network; here ONNX with what was saved."""
    script = Path(__file__).with_name("digits_as_files.py")
    lines = [each for each in script.read_text().splitlines() if each and each[0] != "#"]
    assert len(lines) <= 12
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    found = torch.from_numpy(session.run(None, {"input": torch.eye(64).numpy()})[0])
    loaded = ddlr.load(tmp_path / "small.safetensors")(torch.eye(64))
    assert torch.allclose(found, loaded, atol=1e-4) and loaded.std() > 0.1
