"""What two settings do: the number of calibration samples, and the order of the layers."""

from itertools import product

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.style import (
    METHOD_STYLES,
    THICK,
    THIN,
    accuracy_axis,
    bare,
    dense_line,
    draw_line,
    legend,
    method_style,
    network_title,
    over_seeds,
    panel_grid,
    plain_ticks,
    seed_range,
    short_title,
    size_axis,
    title_columns,
)
from experiments.report.tables import NETWORK_TITLES, at_commonest_samples_and_ridge, in_order
from experiments.report.variants import (
    LAYER_REFITS,
    OURS,
    RIVALS,
    VARIANT_WORDS,
    in_main_set,
    layer_by_layer,
    of_methods,
    of_variant,
    refit_words,
)


def samples(sweeps: pd.DataFrame, layers: pd.DataFrame) -> Figure | None:
    """Size, accuracy and held-out error of the layers against the number of calibration samples.

    DDLR, Net-Trim and ours in parallel order. One row per network, at the tolerance that was run
    with the most numbers of samples.
    """
    rows = in_main_set(of_methods(layer_by_layer(sweeps), *RIVALS, *OURS))
    rows = rows[rows["order"] == "parallel"]
    worst = layers.assign(
        promise_kept=layers["relative_error_held_out"] / layers["relative_tolerance"]
    )
    rows = rows.join(worst.groupby("run")["promise_kept"].max(), on="run")
    rows = rows.assign(kept=100 * rows["kept_fraction"])
    numbers = rows.groupby(["model", "relative_tolerance"])["calibration_samples"].nunique()
    numbers = numbers[numbers > 1]
    if numbers.empty:
        return None
    models = in_order(numbers.index.get_level_values("model"), NETWORK_TITLES)
    quantities = {
        "kept": "weights kept (% of the dense layers)",
        "accuracy": "test accuracy (%)",
        "promise_kept": "held-out error of the worst layer\n(1 is the promised error)",
    }
    figure, grid = panel_grid(len(models), len(quantities), width=4.4, height=3.6)
    for row, model in zip(grid, models, strict=True):
        tolerance = numbers[model].idxmax()
        here = rows[(rows["model"] == model) & (rows["relative_tolerance"] == tolerance)]
        for axes, (column, label) in zip(row, quantities.items(), strict=True):
            for method, refit in product(in_order(here["method"], METHOD_STYLES), LAYER_REFITS):
                line = of_variant(of_methods(here, method), (refit, "parallel"))
                points = over_seeds(line, "calibration_samples", column)
                if len(points) > 1:
                    style = _variant_style(method, (refit, "parallel"))
                    axes.errorbar(points.index, points["mean"], yerr=seed_range(points), **style)
            _sample_axis(axes, sorted(here["calibration_samples"].unique()))
            axes.set_ylabel(label)
        dense = here["accuracy_dense"].mean()
        dense_line(row[1], dense)
        low, high = row[1].get_ylim()
        row[1].set_ylim(low, max(high, dense) + 0.1 * (high - low))
        row[2].axhline(1, color="black", linestyle=":", linewidth=1)
        row[1].set_title(f"{network_title(model)}, tolerance {tolerance:g}")
    legend(figure, list(grid.flat))
    return figure


def _variant_style(method: str, variant: tuple[str, str]) -> dict:
    weight = THIN if variant[0] == "none" else {**THICK, "markersize": 5}
    return method_style(method, weight, label=f"{short_title(method)}, {VARIANT_WORDS[variant]}")


def _sample_axis(axes: Axes, numbers: list[int]) -> None:
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, numbers)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("calibration samples")
    bare(axes)


def order(sweeps: pd.DataFrame) -> Figure | None:
    """Parallel order against cascade: test accuracy against weights kept, one row per refit.

    DDLR, Net-Trim and ours, at one tolerance for all layers.
    """
    rows = in_main_set(
        at_commonest_samples_and_ridge(of_methods(layer_by_layer(sweeps), *RIVALS, *OURS))
    )
    cascades = rows[rows["order"] == "cascade"]
    models = in_order(cascades["model"], NETWORK_TITLES)
    refits = in_order(cascades["refit"], LAYER_REFITS)
    if not models:
        return None
    figure, grid = panel_grid(len(refits), len(models))
    for row, refit in zip(grid, refits, strict=True):
        for axes, model in zip(row, models, strict=True):
            here = rows[(rows["model"] == model) & (rows["refit"] == refit)]
            for method in in_order(here["method"], METHOD_STYLES):
                for how, weight in (("parallel", THIN), ("cascade", THICK)):
                    line = of_variant(of_methods(here, method), (refit, how))
                    style = method_style(method, weight, label=f"{short_title(method)}, {how}")
                    if len(line):
                        draw_line(axes, line, "kept_fraction", style)
            if here.empty:
                axes.set_axis_off()
                continue
            accuracy_axis(axes, here["accuracy_dense"].mean())
            size_axis(axes, here, "kept_fraction", "weights kept (%)")
            axes.set_ylabel(None)
        row[0].set_ylabel(f"test accuracy (%), {refit_words(refit)}")
    title_columns(grid, models)
    legend(figure, list(grid.flat))
    return figure
