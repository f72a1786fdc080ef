"""Values read off a curve lie on it, and nothing is read outside it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report.curves import size_at_drop

curves = st.lists(
    st.tuples(st.integers(1, 100), st.integers(-4, 40)),
    min_size=1,
    max_size=8,
    unique_by=lambda point: point[0],
).map(lambda points: [(size / 100, drop / 10) for size, drop in points])


@given(curves, st.floats(-0.5, 4.0), st.randoms())
def test_the_size_at_a_drop_is_where_the_curve_first_comes_down_to_it(points, drop, random):
    random.shuffle(points)
    sizes, drops = (np.array(column) for column in zip(*points, strict=True))
    found = size_at_drop(sizes, drops, drop)
    within = sizes[drops <= drop]
    if not len(within):
        assert np.isnan(found)
        return
    assert found <= within.min() * (1 + 1e-12)
    if sizes.min() in within:
        assert found == sizes.min()
        return
    # Between the smallest within the drop and its smaller neighbour, where the drop is as asked.
    order = np.argsort(sizes)
    assert np.interp(np.log(found), np.log(sizes[order]), drops[order]) == pytest.approx(drop)
    assert found >= sizes[sizes < within.min()].max() * (1 - 1e-12)
    assert (drops[sizes < found * (1 - 1e-12)] > drop).all()


@pytest.mark.parametrize("drop", [0.5, 1.0])
def test_a_point_at_the_drop_is_within_it_and_a_later_rise_is_not_looked_at(drop):
    sizes = np.array([0.1, 0.2, 0.4, 0.8])
    assert size_at_drop(sizes, np.array([3.0, drop, drop + 1, 0.0]), drop) == 0.2


def test_a_size_at_a_drop_lies_on_the_curve():
    sizes, drops = np.array([0.4, 0.1, 0.2]), np.array([0.0, 2.0, 1.0])
    assert size_at_drop(sizes, drops, 1.0) == 0.2
    assert size_at_drop(sizes, drops, 1.5) == pytest.approx(np.sqrt(0.1 * 0.2))
    assert size_at_drop(sizes, drops, 3.0) == 0.1
    assert np.isnan(size_at_drop(sizes, drops, -0.1))


def test_nothing_is_interpolated_towards_a_network_without_weights():
    sizes, drops = np.array([0.0, 0.02, 0.04]), np.array([88.0, 0.9, 0.3])
    assert size_at_drop(sizes, drops, 1.0) == 0.02
    assert 0.02 < size_at_drop(sizes, drops, 0.5) < 0.04
