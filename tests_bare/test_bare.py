"""What `pip install .` alone brings: two libraries that work, and nothing for reproducing.

Run by ``make test-bare`` with the Python of an environment that has the package without extras.
Hence unittest. With ``python -I``, so that the repository is not on the path and what was installed
is what is tested.
"""

import re
import subprocess
import sys
import tempfile
import unittest
from importlib.metadata import distribution, distributions
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import ddlr
import nettrim

DECLARED = {"torch", "numpy", "safetensors"}
OF_THE_ENVIRONMENT = {"pip", "setuptools", "wheel"}
OF_EXPERIMENTS = (
    "cvxpy",
    "experiments",
    "filelock",
    "hydra",
    "joblib",
    "matplotlib",
    "mosek",
    "omegaconf",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "scipy",
    "sklearn",
    "torchvision",
    "tqdm",
    "wandb",
)
OF_TORCH = {"filelock"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> set[str]:
    """The names of what a distribution needs, without its extras."""
    needed = [
        text for text in distribution(name).requires or () if not re.search(r"\bextra\b", text)
    ]
    return {canonical(re.match(r"[\w.-]+", text)[0]) for text in needed}


def small_network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    return model, torch.randn(200, 12)


class TestBareInstallation(unittest.TestCase):
    def test_the_libraries_are_those_that_were_installed(self):
        for library in (ddlr, nettrim):
            self.assertIn("site-packages", library.__file__)

    def test_nothing_is_installed_that_the_libraries_do_not_need(self):
        self.assertEqual(requirements("ddlr"), DECLARED)
        installed = {canonical(each.metadata["Name"]) for each in distributions()}
        needed, unseen = set(), ["ddlr"]
        while unseen:
            name = unseen.pop()
            if name in installed and name not in needed:
                needed.add(name)
                unseen += requirements(name)
        self.assertEqual(installed - needed - OF_THE_ENVIRONMENT, set())

    def test_nothing_of_the_experiments_is_there(self):
        found = {name for name in OF_EXPERIMENTS if find_spec(name) is not None}
        self.assertEqual(found - OF_TORCH, set())

    def test_type_checkers_are_told_that_the_libraries_are_typed(self):
        for library in (ddlr, nettrim):
            self.assertTrue((files(library) / "py.typed").is_file())

    def test_networks_are_compressed(self):
        model, calibration = small_network()
        for compress in (ddlr.compress, nettrim.prune):
            for order in ("parallel", "cascade"):
                result = compress(model, calibration, relative_tolerance=0.3, order=order)
                self.assertEqual(len(result.layers), 3)
                self.assertTrue(all(each.violation <= 0 for each in result.layers))
                self.assertEqual(result.model(calibration).shape, (200, 3))
        result = ddlr.compress(model, calibration, relative_tolerance=0.3, method="fewest_weights")
        self.assertLess(sum(each.parameters_kept for each in result.layers), 240)

    def test_a_compressed_network_is_a_file_that_the_command_reads(self):
        model, calibration = small_network()
        result = nettrim.prune(model, calibration, relative_tolerance=0.3)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            ddlr.save(result, path)
            for loaded in (ddlr.load(path), ddlr.load(path, small_network()[0])):
                self.assertTrue(torch.equal(loaded(calibration), ddlr.load(path)(calibration)))
            command = Path(sys.executable).with_name("ddlr")
            said = subprocess.run([command, "info", path], capture_output=True, text=True)
            self.assertEqual((said.returncode, said.stderr), (0, ""))
            self.assertIn("all", said.stdout)
            with self.assertRaisesRegex(ImportError, "pip install onnx onnxscript onnxruntime"):
                ddlr.to_onnx(result, calibration, Path(folder) / "small.onnx")

    def test_the_command_has_the_methods_of_both_libraries(self):
        command = Path(sys.executable).with_name("ddlr")
        said = subprocess.run([command, "compress", "--help"], capture_output=True, text=True)
        for method in ("nuclear", "lowest_rank", "fewest_weights", "nettrim"):
            self.assertIn(method, said.stdout)

    def test_several_processes_ask_for_joblib_by_name(self):
        model, calibration = small_network()
        settings = ddlr.Settings(workers=2)
        with self.assertRaisesRegex(ImportError, "pip install joblib"):
            ddlr.compress(model, calibration, relative_tolerance=0.3, settings=settings)


if __name__ == "__main__":
    unittest.main()
