"""Fine-tuning leaves zeros alone and says what it gained, on real digits."""

import subprocess
import sys

import pandas as pd
import torch
from torch import nn

from experiments import finetune
from experiments.configuration import REPOSITORY
from experiments.networks import mlp_digits
from experiments.training import train
from patience import PATIENCE


def test_zeros_stay_zero_and_the_rest_is_trained(digits):
    torch.manual_seed(0)
    network = mlp_digits()
    with torch.no_grad():
        network.fc1.weight.mul_(torch.rand_like(network.fc1.weight) < 0.3)
    before = network.fc1.weight.detach().clone()
    finetune._hold_zeros(network.fc1.weight)
    recipe = {"epochs": 2, "batch_size": 64, "learning_rate": 1e-2, "weight_decay": 0.1}
    train(nn.Sequential(network), digits, **recipe, seed=0, device=torch.device("cpu"))
    after = network.fc1.weight.detach()
    assert torch.equal(after[before == 0], before[before == 0])
    assert (after[before != 0] != before[before != 0]).all()


def test_the_table_sets_accuracy_before_beside_after(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.finetune", "dataset=digits", "model=mlp_digits"),
            *("method=nettrim", "relative_tolerances=[0.3,0.5]", "calibration_samples=300"),
            *("training.epochs=30", "training.batch_size=32", "device=cpu"),
            *(f"results_dir={tmp_path}", f"output_dir={tmp_path}/outputs"),
            f"checkpoint_dir={REPOSITORY}/results/checkpoints",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "finetune.csv")
    assert list(table["relative_tolerance"]) == [0.3, 0.5]
    assert (table["refit"] == "finetuned").all()
    assert (table["accuracy"] > table["accuracy_pruned"]).all()
    assert table["kept_fraction"].between(0.01, 0.5).all()
    assert (table["accuracy_drop"] + table["accuracy"] - table["accuracy_dense"]).abs().max() < 1e-5
