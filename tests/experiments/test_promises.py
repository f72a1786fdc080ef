"""What was promised of layers is told from what was asked for, and from what was measured."""

import pandas as pd
import pytest

from experiments.report.promises import promises, section

NAN = float("nan")


def layer(method: str, order: str, **values: float) -> dict:
    about = {"refit": "none", "status": "converged", "relative_tolerance": 0.1}
    about |= {"relative_bound": 0.1, "relative_error_read": 0.08, "relative_error": 0.08}
    return {"method": method, "order": order, **about, **values}


LAYERS = pd.DataFrame(
    [
        layer("ddlr", "parallel", relative_error_read=0.1),
        layer("ddlr", "cascade", relative_bound=0.15, relative_error_read=0.12),
        layer("ddlr", "cascade", relative_error=0.5),
        layer("ddlr", "cascade", relative_error_read=0.2, refit="network"),
        layer("ddlr", "cascade", relative_bound=0.0, relative_error_read=0.0, status="unchanged"),
        layer("nettrim", "parallel", relative_error_read=0.11),
        layer("nettrim", "parallel", relative_tolerance=NAN, relative_error_read=0.05),
    ]
)


def test_bounds_that_were_raised_and_errors_beyond_what_was_asked_for_are_counted():
    found = promises(LAYERS).set_index(["order", "method"])
    parallel = found.loc["parallel"]
    assert parallel["layers"].tolist() == [1, 2]
    assert parallel["within the bound (%)"].tolist() == [100, 50]
    assert parallel["worst error / bound"].tolist() == pytest.approx([1.0, 1.1])
    assert parallel["bounds raised (%)"].tolist() == [0, 0]
    # Where it is not known what was asked for, the layer counts for the bound alone.
    assert parallel["within the tolerance asked for (%)"].tolist() == [100, 0]
    (cascade,) = found.loc["cascade"].to_dict("records")
    assert cascade["layers"] == 2  # neither the refit of the network, nor what was left as it is
    assert cascade["within the bound (%)"] == 100
    assert cascade["bounds raised (%)"] == 50
    assert cascade["largest bound / tolerance"] == pytest.approx(1.5)
    assert cascade["within the tolerance asked for (%)"] == 50
    assert cascade["error over all outputs / bound, worst"] == pytest.approx(5.0)


def test_the_section_has_a_line_a_method_and_order_and_says_if_there_is_nothing():
    lines = section(LAYERS).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 3
    assert "Not measured." in section(pd.DataFrame())
    assert "Not measured." in section(LAYERS.drop(columns="relative_bound"))
