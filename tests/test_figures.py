"""Figures of made-up tables: all of the comparison, a part of it, and what they show."""

import logging

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from experiments.collect import smallest_sizes
from experiments.figures import FIGURES, METHOD_STYLES, frontier, samples
from experiments.plot import draw, save
from experiments.tables import MADE_BY, METHOD_TITLES, at_main_samples
from made_up_tables import NETWORKS, made_up_inference, made_up_spectrum, made_up_tables


def tables(*arguments) -> dict[str, pd.DataFrame]:
    sweeps, layers = made_up_tables(*arguments)
    sweeps["bytes_fraction"] = sweeps["bytes_stored"] / sweeps["bytes_dense"]
    return {"sweeps": sweeps, "layers": layers, "sizes": smallest_sizes(sweeps)}


@pytest.fixture(scope="module")
def whole() -> dict[str, pd.DataFrame]:
    return {**tables(), "inference": made_up_inference(), "spectrum": made_up_spectrum()}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_labelled_panels_and_no_empty_one(name, whole, tmp_path):
    figure = draw(name, whole)
    for axes in figure.axes:
        if axes.axison:
            assert axes.has_data()
            assert axes.get_xlabel() or name == "equal_drop"
    assert figure.axes[0].get_ylabel()
    save(figure, tmp_path / "a.png")
    save(draw(name, whole), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("networks", "methods"),
    [(("mlp_digits",), ("ddlr",)), (("lenet5",), ("nettrim",)), (("vgg_small",), ("svd",))],
)
def test_part_of_the_comparison_is_drawn_too(networks, methods, caplog):
    caplog.set_level(logging.INFO)
    part = tables(networks, methods)
    drawn = {name for name in FIGURES if draw(name, part) is not None}
    assert {"frontier_weights", "frontier_bytes"} <= drawn
    for name in set(FIGURES) - drawn:
        assert f"no {name}.png" in caplog.text
    assert f"no spectrum.png without spectrum.csv; {MADE_BY['spectrum']}" in caplog.text


def test_the_frontier_has_a_panel_a_network_and_the_mean_over_seeds(whole):
    figure = frontier(whole["sweeps"], "weights")
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert len(titles) == len(NETWORKS)
    rows = whole["sweeps"].query("model == 'lenet_300_100' and method == 'svd'")
    (line,) = [
        line for line in figure.axes[0].get_lines() if line.get_label() == METHOD_TITLES["svd"]
    ]
    means = rows.groupby("relative_tolerance")[["kept_fraction", "accuracy"]].mean()
    np.testing.assert_allclose(line.get_xdata(), 100 * means["kept_fraction"])
    np.testing.assert_allclose(line.get_ydata(), means["accuracy"])


def test_the_rivals_are_shown_as_published_and_at_their_best(whole):
    labels = frontier(whole["sweeps"], "bytes").axes[0].get_legend_handles_labels()[1]
    for method in ("DDLR", "Net-Trim"):
        own = [label for label in labels if label.startswith(f"{method},")]
        assert own == [f"{method}, parallel, no refit", f"{method}, cascade, refit"]
    some = whole["sweeps"].query("order == 'parallel'")
    assert "DDLR, parallel, refit" in frontier(some, "bytes").axes[0].get_legend_handles_labels()[1]


def test_other_numbers_of_samples_are_in_their_own_figure_alone(whole):
    main = at_main_samples(whole["sweeps"])
    assert set(main["calibration_samples"]) == {5000}
    first = samples(whole["sweeps"], whole["layers"]).axes[0].get_lines()[0]
    assert list(first.get_xdata()) == [500, 1000, 2000, 5000, 10000, 20000]


def test_every_method_has_a_style_of_its_own_and_a_title():
    assert set(METHOD_STYLES) == set(METHOD_TITLES)
    styles = [tuple(style.values()) for style in METHOD_STYLES.values()]
    assert len(set(styles)) == len(styles)
