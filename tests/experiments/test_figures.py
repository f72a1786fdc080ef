"""Figures of made-up tables: all of the comparison, a part of it, and what they show."""

import logging

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

matplotlib.use("Agg")

from experiments.collect import ACCURACY_DROPS, smallest_sizes
from experiments.plot import draw
from experiments.report.ablation import ablation_sizes
from experiments.report.figures import FIGURES
from experiments.report.figures_ablation import ablation
from experiments.report.figures_equal_drop import equal_drop
from experiments.report.figures_frontier import frontier, frontier_goals
from experiments.report.figures_layers import bound, layers
from experiments.report.figures_settings import order, samples
from experiments.report.style import METHOD_STYLES, draw_line, legend, panels_and_spare, save
from experiments.report.tables import (
    MADE_BY,
    METHOD_TITLES,
    NETWORK_TITLES,
    at_commonest_samples_and_ridge,
)
from made_up_tables import (
    KEPT_FRACTIONS,
    NETWORKS,
    SAMPLES,
    made_up_ablation,
    made_up_inference,
    made_up_spectrum,
    made_up_tables,
)

FIRST = next(iter(NETWORKS))  # whose panel comes first
LAYER_BY_LAYER = "goal == 'relative_tolerance' and refit != 'network'"


def tables(*arguments) -> dict[str, pd.DataFrame]:
    sweeps, layers = made_up_tables(*arguments)
    sweeps["bytes_fraction"] = sweeps["bytes_stored"] / sweeps["bytes_dense"]
    return {"sweeps": sweeps, "layers": layers, "sizes": smallest_sizes(sweeps)}


@pytest.fixture(scope="module")
def whole() -> dict[str, pd.DataFrame]:
    steps = ablation_sizes(made_up_ablation(), ACCURACY_DROPS)
    times = made_up_inference()
    at_drop = times.query("threads == 1 and engine == 'torch' and batch != 32")
    at_drop = pd.concat([at_drop.assign(largest_drop=drop) for drop in ACCURACY_DROPS])
    measured = {"inference": times, "spectrum": made_up_spectrum(), "times_at_drop": at_drop}
    return {**tables(), **measured, "ablation": steps}


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def labels(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def line(axes, label: str):
    (found,) = [each for each in axes.get_lines() if each.get_label() == label]
    return found


def drawn(figure) -> list:
    """Every line, point and limit of a figure's panels."""
    return [
        (
            [(each.get_label(), each.get_xydata().tolist()) for each in axes.get_lines()],
            [(each.get_label(), each.get_offsets().tolist()) for each in axes.collections],
            (axes.get_title(), axes.get_xlim(), axes.get_ylim()),
        )
        for axes in figure.axes
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_labelled_panels_and_no_empty_one(name, whole, tmp_path):
    figure = draw(name, whole)
    for axes in figure.axes:
        if axes.axison:
            assert axes.has_data()
            assert axes.get_xlabel() or name in ("equal_drop", "times_at_drop")
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
    rows = whole["sweeps"].query(f"model == @FIRST and method == 'svd' and {LAYER_BY_LAYER}")
    svd = line(figure.axes[0], METHOD_TITLES["svd"])
    means = rows.groupby("relative_tolerance")[["kept_fraction", "accuracy"]].mean()
    np.testing.assert_allclose(svd.get_xdata(), 100 * means["kept_fraction"])
    np.testing.assert_allclose(svd.get_ydata(), means["accuracy"])


def test_the_rivals_are_shown_as_published_and_at_their_best_and_ours_at_its_best(whole):
    found = labels(frontier(whole["sweeps"], "bytes").axes[0])
    for method in ("DDLR", "Net-Trim"):
        own = [label for label in found if label.startswith(f"{method},")]
        assert own == [f"{method}, parallel, no refit", f"{method}, cascade, refit"]
    assert found[:2] == ["fewest weights, cascade, refit", "lowest rank, cascade, refit"]
    some = whole["sweeps"].query("order == 'parallel'")
    found = labels(frontier(some, "bytes").axes[0])
    assert {"DDLR, parallel, refit", "lowest rank, parallel, refit"} <= set(found)
    published = some.query("refit == 'none'")
    assert "lowest rank, parallel, no refit" in labels(frontier(published, "bytes").axes[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "needed"),
    [
        (lambda sweeps: frontier(sweeps, "weights"), ("sweeps",)),
        (layers, ("sweeps", "layers")),
        (bound, ("sweeps", "layers")),
        (samples, ("sweeps", "layers")),
        (order, ("sweeps",)),
    ],
    ids=["frontier", "layers", "bound", "samples", "order"],
)
def test_goals_and_network_refits_are_in_their_own_figures_alone(function, needed, whole):
    apart = whole | {"sweeps": whole["sweeps"].query(LAYER_BY_LAYER)}
    assert len(apart["sweeps"]) < len(whole["sweeps"])
    alone, all_of_them = (drawn(function(*(of[name] for name in needed))) for of in (apart, whole))
    assert alone == all_of_them


def test_each_method_has_its_best_allocated_form_and_that_with_network_refit(whole):
    axes = frontier_goals(whole["sweeps"], "weights").axes
    assert [panel.get_title() for panel in axes if panel.axison] == [
        NETWORK_TITLES[network] for network in NETWORKS
    ]
    found = labels(axes[0])
    names = ["fewest weights", "lowest rank", "DDLR", "Net-Trim"]
    names += [METHOD_TITLES[name] for name in ("svd", "activation_svd")]
    names += [METHOD_TITLES[name] for name in ("magnitude", "magnitude_global")]
    assert found == [
        f"{name}, {words}" for name in names for words in ("allocated", "network refit")
    ]
    rows = whole["sweeps"].query("model == @FIRST and goal == 'kept_fraction'")
    for words, refit in (("allocated", "layer"), ("network refit", "network")):
        of_line = rows.query("method == 'lowest_rank' and order == 'cascade'")
        of_line = of_line[of_line["refit"] == refit]
        points = of_line.groupby("wanted")[["kept_fraction", "accuracy"]].mean()
        assert len(points) == len(KEPT_FRACTIONS)
        shown = line(axes[0], f"lowest rank, {words}")
        np.testing.assert_allclose(shown.get_xdata(), 100 * points["kept_fraction"])
        np.testing.assert_allclose(shown.get_ydata(), points["accuracy"])
    for name in names:
        solid, broken = (
            line(axes[0], f"{name}, {words}") for words in ("allocated", "network refit")
        )
        assert (solid.get_linestyle(), broken.get_linestyle()) == ("-", "--")
        assert solid.get_color() == broken.get_color() == solid.get_markerfacecolor()
        assert broken.get_markerfacecolor() == "white"


def test_refits_of_the_network_on_more_samples_are_a_line_of_their_own(whole):
    sweeps = whole["sweeps"].query("goal == 'kept_fraction'")
    together = sweeps[(sweeps["method"] == "lowest_rank") & (sweeps["refit"] == "network")]
    on_more = together.assign(network_refit="900 samples", accuracy=together["accuracy"] + 0.2)
    axes = frontier_goals(pd.concat([sweeps, on_more]), "weights").axes[0]
    usual, more = (
        line(axes, f"lowest rank, {words}") for words in ("network refit", "refit on more samples")
    )
    assert (usual.get_linestyle(), more.get_linestyle()) == ("--", ":")
    np.testing.assert_allclose(more.get_ydata(), usual.get_ydata() + 0.2)
    assert "DDLR, refit on more samples" not in labels(axes)


def test_the_best_allocated_form_is_sought_network_by_network(whole):
    sweeps = whole["sweeps"].query("goal == 'kept_fraction'")
    other = sweeps["model"] == "lenet5"
    sweeps = pd.concat(
        [
            sweeps[~other],
            sweeps[other].assign(order="parallel", accuracy=sweeps["accuracy"] - 0.5),
            sweeps[other & (sweeps["refit"] == "layer")].assign(refit="none"),
        ]
    )
    axes = frontier_goals(sweeps, "bytes").axes[list(NETWORKS).index("lenet5")]
    own = sweeps.query("model == 'lenet5' and method == 'ddlr' and wanted == 0.1")
    parallel = own.query("refit == 'layer' and order == 'parallel'")["accuracy"].mean()
    assert line(axes, "DDLR, allocated").get_ydata()[2] == pytest.approx(parallel)


def test_without_allocated_runs_there_is_no_figure_of_them(whole):
    assert frontier_goals(whole["sweeps"].query("goal == 'relative_tolerance'"), "bytes") is None
    assert frontier(whole["sweeps"].query("goal == 'kept_fraction'"), "bytes") is None


def heights(axes) -> dict[str, list[float]]:
    """Bars of a panel, by their label."""
    return {
        bars.get_label(): [bar.get_height() for bar in bars]
        for bars in axes.containers
        if hasattr(bars, "patches")
    }


def test_bars_are_as_published_at_the_best_and_with_network_refit(whole):
    sizes = whole["sizes"].query("counted == 'weights' and largest_drop == 0.5")
    axes = equal_drop(whole["sizes"]).axes[0]
    assert axes.get_title() == "weights, held-out drop of at most 0.5 points"
    found = heights(axes)
    assert list(found) == [
        *("DDLR, as published", "Net-Trim, as published"),
        *(f"{name}, at its best" for name in ("DDLR", "Net-Trim", METHOD_TITLES["svd"])),
        *(f"{name}, at its best" for name in (METHOD_TITLES["activation_svd"], "magnitude")),
        *("lowest rank, at its best", "fewest weights, at its best"),
        "fewest weights, network refit",
    ]
    published = "refit == 'none' and order == 'parallel' and goal == 'relative_tolerance'"
    alone = "refit in ('none', 'layer')"
    for label, chosen in (
        ("DDLR, as published", f"method == 'ddlr' and {published}"),
        ("DDLR, at its best", f"method == 'ddlr' and {alone}"),
        ("magnitude, at its best", f"method.str.startswith('magnitude') and {alone}"),
        ("fewest weights, at its best", f"method == 'fewest_weights' and {alone}"),
        ("fewest weights, network refit", "method == 'fewest_weights' and refit == 'network'"),
    ):
        least = sizes.query(chosen).groupby("model")["fraction"].min().reindex(NETWORKS)
        np.testing.assert_allclose(found[label], 100 * least, err_msg=label)
    # Either goal is the best one somewhere.
    best = sizes.query(alone).sort_values("fraction").drop_duplicates(["model", "method"])
    assert set(best["goal"]) == {"relative_tolerance", "kept_fraction"}
    written = [text.get_text() for text in axes.texts]
    value = found["fewest weights, at its best"][0]
    assert f"{value:.1f}" in written


def test_bars_of_what_was_not_run_are_left_out(whole):
    few = whole["sizes"].query("method in ('nettrim', 'lowest_rank') and largest_drop == 1.0")
    figure = equal_drop(few.query("not (model == 'lenet5' and method == 'lowest_rank')"))
    assert len(figure.axes) == 2
    assert list(heights(figure.axes[0])) == [
        *("Net-Trim, as published", "Net-Trim, at its best"),
        *("lowest rank, at its best", "lowest rank, network refit"),
    ]
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written.count("n/a") == 2
    assert equal_drop(whole["sizes"].query("method == 'nettrim_protocol'")) is None


@pytest.mark.slow
def test_the_rivals_are_compared_in_one_output_set_and_ours_in_its_own(whole):
    hinge = whole["sweeps"].query("method == 'ddlr'").assign(constraint="hinge", accuracy=0.0)
    both = pd.concat([whole["sweeps"], hinge.assign(run=hinge["run"] + "h")])
    assert drawn(order(both)) == drawn(order(whole["sweeps"]))
    best, alone = (frontier_goals(sweeps, "bytes") for sweeps in (both, whole["sweeps"]))
    assert drawn(best) == drawn(alone)


def test_other_numbers_of_samples_are_in_their_own_figure_alone(whole):
    main = at_commonest_samples_and_ridge(whole["sweeps"])
    assert set(main["calibration_samples"]) == {5000}
    axes = samples(whole["sweeps"], whole["layers"]).axes[0]
    assert list(axes.get_lines()[0].get_xdata()) == sorted([*SAMPLES, 5000])
    # Labels of lines with bars are those of their containers.
    assert labels(axes) == [
        f"{name}, parallel, {refit}"
        for name in ("fewest weights", "lowest rank", "DDLR", "Net-Trim")
        for refit in ("no refit", "refit")
    ]


def test_rows_with_another_ridge_do_not_mix_with_the_main_ones(whole):
    sweeps = whole["sweeps"]
    other = sweeps[sweeps["method"] == "fewest_weights"].head(3).assign(ridge=1.0)
    assert set(at_commonest_samples_and_ridge(pd.concat([sweeps, other]))["ridge"]) == {0.01}


def test_ours_has_a_line_of_samples_only_where_there_are_several_numbers(whole):
    own = whole["sweeps"]["method"].isin(("fewest_weights", "lowest_rank"))
    main = whole["sweeps"][~own | (whole["sweeps"]["calibration_samples"] == 5000)]
    assert labels(samples(main, whole["layers"]).axes[0]) == [
        f"{name}, parallel, {refit}"
        for name in ("DDLR", "Net-Trim")
        for refit in ("no refit", "refit")
    ]


def test_both_orders_are_shown_without_and_with_refit(whole):
    figure = order(whole["sweeps"])
    assert len(figure.axes) == 2 * len(NETWORKS)
    for axes, refit in ((figure.axes[0], "none"), (figure.axes[len(NETWORKS)], "layer")):
        assert labels(axes) == [
            f"{name}, {how}"
            for name in ("fewest weights", "lowest rank", "DDLR", "Net-Trim")
            for how in ("parallel", "cascade")
        ]
        rows = whole["sweeps"].query(
            "model == @FIRST and method == 'fewest_weights' and order == 'cascade' "
            "and goal == 'relative_tolerance'"
        )
        means = rows[rows["refit"] == refit].groupby("relative_tolerance")["accuracy"].mean()
        np.testing.assert_allclose(line(axes, "fewest weights, cascade").get_ydata(), means)
    rivals = whole["sweeps"].query("method in ('ddlr', 'nettrim')")
    assert len(labels(order(rivals).axes[0])) == 4


def test_steps_are_added_one_by_one_without_and_with_selected_inputs(whole):
    steps = whole["ablation"]
    figure = ablation(steps)
    panels = {axes: place for place, axes in enumerate(figure.axes)}
    assert [axes.get_title() for axes in panels] == [
        *(NETWORK_TITLES[model] for model in ("lenet_300_100", "lenet5")),
        *("", ""),
    ]
    for axes, place in panels.items():
        model, drop = ("lenet_300_100", "lenet5")[place % 2], (0.5, 1.0)[place // 2]
        names = [text.get_text() for text in axes.get_xticklabels()]
        assert names == ["closed form", "+ rank search", "+ refit", "+ cascade"]
        here = steps[(steps["model"] == model) & (steps["largest_drop"] == drop)]
        bars = {each.get_label(): each for each in axes.containers}
        assert list(bars) == ["on all inputs", "on selected inputs"]
        written = [text.get_text() for text in axes.texts]
        for label, inputs in (("on all inputs", "all"), ("on selected inputs", "selected")):
            of_line = here[here["inputs"] == inputs]
            points, _, (ranges,) = bars[label]
            shown = points.get_ydata()
            np.testing.assert_allclose(shown, 100 * of_line["fraction"])
            ends = np.array([segment[:, 1] for segment in ranges.get_segments()])
            np.testing.assert_allclose(ends, 100 * of_line[["fraction_min", "fraction_max"]])
            assert {f"{100 * value:.2f}" for value in of_line["fraction"]} <= set(written)


def test_a_step_that_is_not_within_the_drop_has_no_point_and_a_bound_says_so(whole):
    steps = whole["ablation"].copy()
    steps.loc[steps["step"] == "refit", ["fraction", "fraction_min", "fraction_max"]] = np.nan
    steps["at_most"] |= steps["step"] == "cascade"
    axes = ablation(steps).axes[0]
    for bars in axes.containers:
        np.testing.assert_array_equal(np.isfinite(bars[0].get_ydata()), [True, True, False, True])
    written = [text.get_text() for text in axes.texts]
    assert len(written) == 6 and sum(text.startswith("≤ ") for text in written) == 2
    assert ablation(steps.assign(fraction=np.nan)) is None


def test_every_method_has_a_style_of_its_own_and_a_title():
    assert set(METHOD_STYLES) == set(METHOD_TITLES)
    styles = [tuple(style.values()) for style in METHOD_STYLES.values()]
    assert len(set(styles)) == len(styles)
    # The cone solvers' have the colour of the method that they solve.
    colours = [
        style["color"] for method, style in METHOD_STYLES.items() if not method.endswith("_cvxpy")
    ]
    assert len(set(colours)) == len(colours)


def test_a_legend_that_a_panel_cannot_hold_goes_below():
    for entries, inside in ((5, True), (30, False)):
        figure, panels, spare = panels_and_spare(5)
        for index in range(entries):
            label = f"method {index} on selected inputs, refit on more samples"
            panels[0].plot([1, 2], [index, index], label=label)
        legend(figure, panels, spare)
        assert (spare.get_legend() is not None) == inside
        assert (len(figure.legends) == 0) == inside
        figure.canvas.draw()
        for each in figure.legends:
            assert each.get_window_extent().x0 >= 0
            assert each.get_window_extent().x1 <= figure.bbox.x1
        plt.close(figure)


def test_a_network_without_weights_is_not_drawn():
    figure, axes = plt.subplots()
    rows = pd.DataFrame(
        {"wanted": [1, 2], "seed": 0, "kept_fraction": [0.0, 0.1], "accuracy": [10.0, 90.0]}
    )
    draw_line(axes, rows, "kept_fraction", {"color": "black"})
    assert list(axes.lines[0].get_xdata()) == [10.0]
    plt.close(figure)
