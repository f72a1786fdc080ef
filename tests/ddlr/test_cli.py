"""The command `ddlr`: from files to a file, with words and an exit status for what is wrong."""

import json
import logging
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import ddlr
from ddlr.cli import DONE, NOT_MET, WRONG, main
from ddlr.cli_inputs import as_calibration, as_held_out, method_of, methods, read_samples
from ddlr.cli_tables import goal_line, layer_table, size_line
from ddlr.goals import Option
from experiments.networks import mlp_digits
from nettrim.pruning import L1

FACTORY = ["--factory", "experiments.networks:mlp_digits"]
COMPRESS = ["compress", "model.safetensors", *FACTORY, "--calibration", "samples.npz"]
TO_TOLERANCE = [*COMPRESS, "--relative-tolerance", "0.3", "--out", "small.safetensors"]


@pytest.fixture
def folder(network, digits, tmp_path, monkeypatch):
    """A folder with what a user has, which is the current one."""
    monkeypatch.chdir(tmp_path)
    save_model(network, "model.safetensors")
    # As numpy has them: in double precision.
    np.savez("samples.npz", inputs=digits.calibration(200, seed=0).double().numpy())
    held_out = digits.held_out
    np.savez("held_out.npz", inputs=held_out.images.numpy(), labels=held_out.labels.numpy())
    return tmp_path


def error_of(capsys, arguments, status=WRONG) -> str:
    assert main(arguments) == status
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_a_network_is_compressed_and_written(folder, network, digits, capsys):
    assert main([*TO_TOLERANCE, "--method", "lowest_rank"]) == DONE
    said = capsys.readouterr()
    calibration = digits.calibration(200, seed=0)
    expected = ddlr.compress(network, calibration, relative_tolerance=0.3, method="lowest_rank")
    loaded = ddlr.load("small.safetensors")
    images = digits.test.images
    assert torch.allclose(loaded(images), expected.model(images), atol=1e-4)
    table = said.out.splitlines()
    assert [line.split()[0] for line in table[1:-2]] == [each.name for each in expected.layers]
    kept = sum(each.parameters_kept for each in expected.layers)
    assert table[-2].split()[:2] == ["all", str(kept)]
    assert said.err == ""  # progress is for terminals


def only_as_they_are(model, captured, *_arguments, **_keywords) -> dict:
    """For each layer no other choice than to leave it."""
    return {each.name: [Option(0.0, each.weight.numel(), 0.0)] for each in captured.layers}


def test_a_goal_is_met_or_the_status_says_that_it_is_not(folder, capsys, monkeypatch):
    goal = ["--max-accuracy-drop", "1", "--held-out", "held_out.npz", "--json"]
    assert main([*COMPRESS, *goal, "--out", "small.safetensors", "--refit", "layer"]) == DONE
    made = json.loads(capsys.readouterr().out)
    assert made["goal"]["name"] == "max_accuracy_drop" and made["goal"]["met"] is True
    assert made["bytes"] == (folder / "small.safetensors").stat().st_size < made["bytes_before"]
    monkeypatch.setattr("ddlr.goal_search.layer_options", only_as_they_are)
    assert main([*COMPRESS, "--max-parameters", "1", "--out", "tiny.safetensors"]) == NOT_MET
    said = capsys.readouterr()
    assert "goal NOT met: max_parameters 1" in said.out
    assert "ddlr compress: max_parameters=1 can not be met" in said.err


def test_a_failed_solve_is_a_status_and_no_file(folder, capsys, monkeypatch):
    def fails(*arguments, **keywords):
        raise ddlr.ConvergenceError("layer 'fc1': the iteration limit was reached", None)

    monkeypatch.setattr("ddlr.cli.compress_network", fails)
    assert "layer 'fc1'" in error_of(capsys, TO_TOLERANCE, NOT_MET)
    assert not (folder / "small.safetensors").exists()


def test_sparse_layers_come_from_the_package_that_has_them(folder, digits):
    """If this fails in a clone, its entry points are old: pip install -e . makes them anew."""
    assert method_of("nettrim") is L1 and set(methods()) > {"nuclear", "nettrim"}
    assert main([*TO_TOLERANCE, "--method", "nettrim", "--constraint", "hinge"]) == DONE
    forms = {each["form"] for each in ddlr.files.read_info("small.safetensors").layers}
    assert "sparse" in forms


def test_the_command_runs_as_a_module_and_shows_what_is_in_a_file(folder, network, digits):
    result = ddlr.compress(network, digits.calibration(200, seed=0), relative_tolerance=0.3)
    ddlr.save(result, "small.safetensors")

    def run(*arguments):
        command = [sys.executable, "-m", "ddlr", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    said = run("info", "small.safetensors")
    assert said.returncode == DONE and said.stderr == ""
    assert all(each.name in said.stdout for each in result.layers)
    missing = run("info", "other.safetensors")
    assert missing.returncode == WRONG
    assert missing.stderr == "ddlr info: other.safetensors: there is no such file\n"


def test_info_as_json_and_of_a_network_without_reports(folder, network, capsys):
    ddlr.save(network, "small.safetensors")
    assert main(["info", "small.safetensors"]) == DONE
    assert "no reports" in capsys.readouterr().out
    assert main(["info", "small.safetensors", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["layers"] == []


def test_a_file_is_exported(folder, network, digits, capsys):
    ddlr.save(network, "small.safetensors")
    export = ["export", "small.safetensors", "--example", "samples.npz", "--onnx", "small.onnx"]
    assert main([*export, *FACTORY]) == DONE
    session = onnxruntime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
    images = digits.test.images[:3]
    found = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
    assert torch.allclose(found, network(images), rtol=1e-4, atol=1e-4)
    assert (
        "there already; --force replaces it" in (capsys.readouterr(), error_of(capsys, export))[1]
    )


def test_networks_without_a_known_class_need_the_factory(folder, capsys):
    (folder / "mine_alone.py").write_text(
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(64, 10)\n"
        "    def forward(self, inputs):\n"
        "        return self.layer(inputs.flatten(1))\n"
        "def wrong():\n"
        "    raise OSError('no such disk')\n"
    )
    sys.path[:] = [each for each in sys.path if each != str(folder)]
    from_here = ["--factory", "mine_alone:Mine"]
    from ddlr.cli_inputs import built

    save_model(built("mine_alone:Mine"), "mine.safetensors")
    compress = ["compress", "mine.safetensors", "--calibration", "samples.npz", "--out", "a.st"]
    assert main([*compress, *from_here, "--kept-fraction", "0.5"]) == DONE
    capsys.readouterr()
    export = ["export", "a.st", "--onnx", "a.onnx", "--example", "samples.npz"]
    assert "is a Mine, whose class is not in the file" in error_of(capsys, export)
    wrong = ["--factory", "mine_alone:wrong"]
    assert "mine_alone:wrong raised OSError('no such disk')" in error_of(capsys, [*export, *wrong])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--factory", "mlp_digits"], "--factory is 'mlp_digits'; it must be package.module:func"),
        (["--factory", "no_such_package:build"], "--factory: no_such_package can not be imported"),
        (["--factory", "torch.nn:no_such"], "--factory: torch.nn has no function 'no_such'"),
        (["--factory", "builtins:dict"], "--factory: builtins:dict gave a dict, no nn.Module"),
        (["--factory", "torch.nn:ReLU"], "model.safetensors: its weights are not those of"),
        (["--calibration", "no.npz"], "--calibration no.npz: there is no such file"),
        (["--calibration", "model.safetensors"], "model.safetensors: it must be an .npz file"),
        (["--calibration", "pickled.npz"], "--calibration pickled.npz: it must be an .npz file"),
        (["--calibration", "labels.npz"], "--calibration labels.npz: it must have an array 'inp"),
        (["--calibration", "uneven.npz"], "{'inputs': 3, 'labels': 2}"),
        (["--calibration", "words.npz"], "array 'inputs' is not of numbers"),
        (["--calibration", "narrow.npz"], "does not take inputs of shapes {'inputs': (3, 5)}"),
        (["--out", "model.safetensors"], "--out model.safetensors: it is there already; --force"),
        (["--out", "."], "--out .: it is there already"),
        (["--out", "no/small.safetensors"], "--out no/small.safetensors: there is no folder no"),
        (["--held-out", "held_out.npz"], "--held-out is for a goal"),
        (["--layer", "fc9"], "fc9"),
        (["--relative-tolerance", "-1"], "relative_tolerance is -1.0"),
        (["--method", "lowest_rank", "--constraint", "hinge"], "has no such option"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(folder, capsys, changed, message):
    np.savez("pickled.npz", inputs=np.array([{"a": 1}], dtype=object))
    np.savez("labels.npz", labels=np.arange(3))
    np.savez("uneven.npz", inputs=np.ones((3, 64)), labels=np.arange(2))
    np.savez("words.npz", inputs=np.array(["a", "b"]))
    np.savez("narrow.npz", inputs=np.ones((3, 5)))
    said = error_of(capsys, [*TO_TOLERANCE, *changed])
    assert said.startswith("ddlr compress: ") and message in said
    assert not (folder / "small.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        ([*COMPRESS, "--out", "a"], "one of the arguments --max-accuracy-drop"),
        ([*TO_TOLERANCE, "--kept-fraction", "1"], "not allowed with"),
        ([*TO_TOLERANCE, "--method", "magic"], "invalid choice: 'magic'"),
        ([*TO_TOLERANCE, "--ref", "layer"], "unrecognized arguments: --ref"),
    ],
    ids=["nothing", "no goal", "two goals", "method", "abbreviation"],
)
def test_wrong_usage_is_refused(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == WRONG and message in capsys.readouterr().err


def test_goals_on_held_out_samples_need_them(folder, capsys):
    goal = [*COMPRESS, "--out", "a", "--min-agreement", "0.99"]
    assert "--min-agreement is measured on held-out samples" in error_of(capsys, goal)


def test_an_older_file_is_replaced_only_by_force(folder, capsys):
    (folder / "small.safetensors").write_bytes(b"before")
    assert "--force" in error_of(capsys, TO_TOLERANCE)
    assert (folder / "small.safetensors").read_bytes() == b"before"
    assert main([*TO_TOLERANCE, "--force"]) == DONE
    ddlr.load("small.safetensors")


def test_on_a_terminal_there_is_a_line_for_each_layer(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(TO_TOLERANCE) == DONE
    lines = capsys.readouterr().err.splitlines()
    names = [name for name, each in mlp_digits().named_modules() if isinstance(each, nn.Linear)]
    assert [line.split(": ")[1] for line in lines] == names
    assert logging.getLogger("ddlr").handlers == []


def test_help_has_an_example_that_is_understood(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0
    assert "numpy.savez(" in text and "ddlr compress model.safetensors --factory" in text


class Scaled(nn.Linear):
    def forward(self, tokens, scale):
        assert tokens.ndim == 1
        return super().forward(scale)


def test_several_arrays_are_keyword_arguments_in_batches(tmp_path):
    path = tmp_path / "tokens.npz"
    np.savez(path, tokens=np.arange(2500), scale=np.ones((2500, 2)), labels=np.arange(2500))
    inputs, labels = read_samples(path, "--held-out", Scaled(2, 2).half())
    assert set(inputs) == {"tokens", "scale"}
    assert (inputs["tokens"].dtype, inputs["scale"].dtype) == (torch.int64, torch.float16)
    batches = as_calibration(inputs)
    assert [len(each["tokens"]) for each in batches] == [1000, 1000, 500]
    for (values, some), start in zip(as_held_out(inputs, labels), (0, 1000, 2000), strict=True):
        assert values["tokens"][0] == some[0] == start
    assert len(as_held_out(inputs, None)) == 3


def test_tables_and_sizes_are_as_people_read_them():
    layer = {
        "name": "fc1", "in_features": 20, "out_features": 10, "form": "low_rank", "rank": 2,
        "parameters_kept": 60, "parameters_dense": 200, "relative_error_read": None,
        "status": "converged",
    }  # fmt: skip
    table = layer_table([layer, layer]).splitlines()
    assert table[1].split() == ["fc1", "20", "10", "low_rank", "2", "60", "30.0", "%", "converged"]
    assert table[-1].split() == ["all", "120", "30.0", "%"]
    goal = {"name": "min_agreement", "wanted": 0.9, "measured": 0.95, "interval": None, "met": True}
    assert goal_line(goal) == "goal met: min_agreement 0.9, measured 0.95"
    assert "between 0.9 and 1" in goal_line({**goal, "interval": [0.9, 1.0]})
    assert [size_line(each) for each in (999, 1500, 2_000_000)] == ["999 bytes", "1.5 kB", "2.0 MB"]
