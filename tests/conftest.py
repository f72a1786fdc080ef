"""What the tests share. Nothing here is downloaded."""

import pytest

from experiments.data import Dataset, load_dataset


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits", "unused", held_out=200)
