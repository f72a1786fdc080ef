"""Data and qualities of networks that others trained."""

import types

import numpy as np
import pytest
import torch

from experiments.real.encoder import missing_correlation, sentences, similarity_correlation
from experiments.real.faces import windows
from experiments.real.network import draw, variance_explained


def test_sentences_are_english_and_none_occurs_twice():
    text = sentences()
    assert len(text) > 2000
    assert len({each.lower() for each in text}) > 0.99 * len(text)
    assert len(set(text)) == len(text)
    assert all(30 <= len(each) <= 300 for each in text)
    assert sum(" the " in f" {each.lower()} " for each in text) > len(text) / 2


def test_sets_are_disjoint_and_too_many_samples_are_refused():
    sets = draw(100, (50, 20, 30), seed=0)
    assert [len(each) for each in sets] == [50, 20, 30]
    assert sorted(index for each in sets for index in each) == list(range(100))
    assert draw(100, (50, 20, 30), seed=0) == sets != draw(100, (50, 20, 30), seed=1)
    with pytest.raises(ValueError, match=r"50 \+ 60 samples are asked for, but there are 100"):
        draw(100, (50, 60), seed=0)


def test_similarities_do_not_depend_on_scale_or_rotation():
    embedded = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    assert similarity_correlation(embedded, 3 * embedded @ rotation) == pytest.approx(1, abs=1e-6)
    assert missing_correlation(embedded, embedded).item() == pytest.approx(0, abs=1e-12)
    other = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    assert abs(similarity_correlation(embedded, other)) < 0.2


def test_variance_explained_is_that_of_regression():
    outputs = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 10.0, 0.1]
    )
    assert variance_explained(outputs, outputs) == 1
    mean = outputs.mean(dim=0).expand_as(outputs)
    assert variance_explained(outputs, mean) == pytest.approx(0, abs=1e-6)
    halfway = (outputs + mean) / 2
    assert variance_explained(outputs, halfway) == pytest.approx(0.75, abs=1e-6)


def test_windows_of_a_strip_show_that_strip_alone(monkeypatch):
    photograph = np.zeros((60, 100, 3), dtype=np.uint8)
    photograph[:, 50:] = 255
    images = types.SimpleNamespace(images=[photograph])
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: images)
    left, right = (windows(strip, 24, 50, seed=0) for strip in ((0.0, 0.5), (0.5, 1.0)))
    assert left.shape == right.shape == (50, 3, 24, 24)
    assert (left == left.min()).all()
    assert (right == right.max()).all()
    assert -1 <= left.min() < right.max() <= 1
