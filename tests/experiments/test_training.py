"""Training is decided by its seed, also where it was interrupted."""

import subprocess
import sys

import pytest
import torch

from experiments import training
from experiments.networks import mlp_digits, vgg_small
from experiments.training import train

RECIPE = {"epochs": 4, "batch_size": 64, "learning_rate": 5e-3, "weight_decay": 1e-2}


def trained(digits, seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Dropout(0.2), mlp_digits())
    train(network, digits, **RECIPE, seed=seed, device=torch.device("cpu"), **options)
    return network


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_an_interrupted_training_goes_on_to_the_same_network(digits, tmp_path, monkeypatch):
    whole = trained(digits)
    assert same(whole, trained(digits))
    assert not same(whole, trained(digits, seed=1))

    state, measured = tmp_path / "state.pt", training.accuracy

    def interrupt_after_two_epochs(*arguments):
        if state.is_file() and torch.load(state, weights_only=True)["epochs"] == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(training, "accuracy", interrupt_after_two_epochs)
    with pytest.raises(KeyboardInterrupt):
        trained(digits, resume=state)
    monkeypatch.setattr(training, "accuracy", measured)
    assert same(whole, trained(digits, resume=state))
    assert not state.exists()


def test_an_image_is_shifted_by_at_most_four_pixels_and_mirrored_at_times():
    image = torch.arange(1.0, 1025).reshape(1, 32, 32).expand(3, 32, 32)
    padded = torch.nn.functional.pad(image, [4, 4, 4, 4])
    possible = {
        (down, right, mirrored): (padded.flip(-1) if mirrored else padded)[
            :, down : down + 32, right : right + 32
        ]
        for down in range(9)
        for right in range(9)
        for mirrored in (False, True)
    }
    change = training._augmentation()
    torch.manual_seed(0)
    seen = set()
    for _ in range(200):
        changed = change(image)
        found = [key for key, value in possible.items() if torch.equal(changed, value)]
        assert len(found) == 1
        seen.add(found[0])
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(9))


def test_a_data_set_that_does_not_fit_is_refused(digits):
    with pytest.raises(ValueError, match="does not take images of shape"):
        train(vgg_small(), digits, **RECIPE, seed=0, device=torch.device("cpu"))


@pytest.mark.slow
def test_augmentation_is_at_hand_in_a_process_that_has_not_imported_torchvision():
    code = "from experiments.training import _augmentation; _augmentation()"
    subprocess.run([sys.executable, "-c", code], check=True)
