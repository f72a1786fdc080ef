"""What was promised of layers, and kept: in parallel order and in cascade, for every method.

In cascade a layer's original weights may miss the tolerance on the inputs that it is given; its
bound is then raised. So two things are reported of each method and order: whether what was promised
is kept, and how far that is above what was asked for.
"""

import pandas as pd

from experiments.report.markdown import markdown_table
from experiments.report.tables import METHOD_TITLES, in_order

SLACK = 1e-3  # relative, above a bound: of solves from before weights were kept within it
COLUMNS = (
    "method",
    "order",
    "layers",
    "within the bound (%)",
    "worst error / bound",
    "bounds raised (%)",
    "largest bound / tolerance",
    "within the tolerance asked for (%)",
    "error over all outputs / bound, worst",
)

_DIGITS = (1, 4, 1, 2, 1, 1)  # of the numbers behind the count


def promises(layers: pd.DataFrame) -> pd.DataFrame:
    """One row per method and order, over the layers of all its runs without refit of the network.

    Layers that were left as they are count for nothing. Where it is not known what was asked for,
    the layer counts in the first three columns alone.
    """
    solved = layers[(layers["refit"] != "network") & (layers["status"] != "unchanged")]
    solved = solved[solved["relative_bound"] > 0]
    rows = []
    for method in in_order(solved["method"], METHOD_TITLES):
        for order in ("parallel", "cascade"):
            of_order = solved[(solved["method"] == method) & (solved["order"] == order)]
            if len(of_order):
                rows.append((METHOD_TITLES.get(method, method), order, *_measures(of_order)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _measures(layers: pd.DataFrame) -> tuple:
    used = layers["relative_error_read"] / layers["relative_bound"]
    asked = layers[layers["relative_tolerance"].notna()]
    raised = asked["relative_bound"] / asked["relative_tolerance"]
    within = asked["relative_error_read"] <= asked["relative_tolerance"] * (1 + SLACK)
    return (
        len(layers),
        100 * (used <= 1 + SLACK).mean(),
        used.max(),
        100 * (raised > 1 + SLACK).mean(),
        raised.max(),
        100 * within.mean(),
        (layers["relative_error"] / layers["relative_bound"]).max(),
    )


def section(layers: pd.DataFrame) -> str:
    """The part of `claims.md` on what was promised."""
    title = "## What was promised, and what was kept"
    if layers.empty or "relative_bound" not in layers:
        return f"{title}\n\nNot measured."
    measure = (
        "All layers of all runs without refit of the network, in every method. *Bound*: what was "
        "promised of a layer's error, relative to its output. In parallel order it is the "
        "tolerance asked for. In cascade it is raised where the original weights miss the "
        "tolerance on the compressed inputs, and then promises less than was asked for; Net-Trim's "
        "own protocol asks for nothing after the first layer. Errors are over the outputs that the "
        "network reads. In the last column they are over all outputs of a layer: those that the "
        "next layer does not read are removed, for every method, and count there as an error of "
        "their whole size. Nothing is promised of them."
    )
    lines = []
    for method, order, count, *numbers in promises(layers).itertuples(index=False):
        cells = [_number(value, digits) for value, digits in zip(numbers, _DIGITS, strict=True)]
        lines.append([method, order, str(count), *cells])
    return f"{title}\n\n{measure}\n\n{markdown_table(list(COLUMNS), lines)}"


def _number(value: float, digits: int) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"
