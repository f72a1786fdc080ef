"""What each step from the activation-aware SVD to the fewest weights brings, from the runs alone.

The steps are added one by one, to the closed form on all inputs and to that on selected inputs:
the search for the lowest rank, the refit of layers, the cascade. Needs neither torch nor a network.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.report.curves import sizes_by_seed
from experiments.report.tables import at_commonest_samples_and_ridge, with_all_seeds
from experiments.report.variants import A_SIZE

# Step to its refit and order.
STEPS = {
    "closed form": ("none", "parallel"),
    "rank search": ("none", "parallel"),
    "refit": ("layer", "parallel"),
    "cascade": ("layer", "cascade"),
}
# Inputs to the method of the closed form, and that of all later steps.
METHODS = {
    "all": ("activation_svd", "lowest_rank"),
    "selected": ("activation_svd_selected", "fewest_weights"),
}
_WITHOUT_RIDGE = "activation_svd"


def ablation_sizes(sweeps: pd.DataFrame, drops: Sequence[float]) -> pd.DataFrame:
    """The weights kept at equal held-out drops of accuracy, as steps are added one by one.

    Only runs to a given size count, on the networks that the selection of inputs was run alone on,
    at the calibration samples and ridge that it has most rows of. Between measured sizes it is
    interpolated, seed by seed, see `experiments.report.curves.size_at_drop`.

    Parameters
    ----------
    sweeps : DataFrame
        `sweeps.csv` as `experiments.report.tables.read_table` gives it.
    drops : sequence of float
        Of accuracy on held-out samples, in points.

    Returns
    -------
    DataFrame
        For each network, drop, `inputs` (all or selected) and last `step` added: `fraction` of the
        dense layers' weights with its least and largest over `seeds`, NaN where a seed is never
        within the drop or the step was not run; `at_most`, whether some seed's smallest network is
        within it already; and `accuracy_drop` on the test set at that size, likewise over seeds.
    """
    runs = with_all_seeds(sweeps[sweeps["goal"] == A_SIZE])
    alone = METHODS["selected"][0]
    of_selection = at_commonest_samples_and_ridge(runs[runs["method"] == alone])
    rows = []
    for model, selected in of_selection.groupby("model"):
        samples, ridge = selected["calibration_samples"].iloc[0], selected["ridge"].iloc[0]
        here = runs[(runs["model"] == model) & (runs["calibration_samples"] == samples)]
        here = here[(here["ridge"] == ridge) | (here["method"] == _WITHOUT_RIDGE)]
        at = {"model": model, "calibration_samples": samples, "ridge": ridge}
        for drop in drops:
            for inputs, (closed_form, searched) in METHODS.items():
                for step, (refit, order) in STEPS.items():
                    method = closed_form if step == "closed form" else searched
                    variant = {"method": method, "refit": refit, "order": order}
                    of_step = here[(here[list(variant)] == pd.Series(variant)).all(axis=1)]
                    case = {**at, "largest_drop": drop, "inputs": inputs, "step": step, **variant}
                    rows.append(case | _size(of_step, drop))
    return pd.DataFrame(rows).round(6)


def _size(rows: pd.DataFrame, drop: float) -> dict:
    """The size at the drop and the test drop there, over seeds; NaN where there is none."""
    sizes, test_drops, at_most = sizes_by_seed(rows, drop)
    if not sizes or np.isnan(sizes).any():
        sizes, test_drops, at_most = [np.nan], [np.nan], False
    return {
        "seeds": rows["seed"].nunique(),
        "fraction": np.mean(sizes),
        "fraction_min": min(sizes),
        "fraction_max": max(sizes),
        "at_most": at_most,
        "accuracy_drop": np.mean(test_drops),
        "accuracy_drop_min": min(test_drops),
        "accuracy_drop_max": max(test_drops),
    }
