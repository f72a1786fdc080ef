"""Net-Trim's reimplementation against its published curve, in the text of the claims."""

import numpy as np
import pandas as pd

from experiments.report.claims import report
from made_up_claims import SMALL, curve


def protocol(accuracies: list[float]) -> pd.DataFrame:
    """Net-Trim in its own protocol on three seeds, at twice the sizes of each other."""
    own = curve("nettrim_protocol", [0.4, 0.2, 0.1, 0.05], variant=("none", "cascade"))
    own["model"] = "fc_nettrim"
    return own.assign(accuracy=np.repeat(accuracies, 3) + 0.02 * (own["seed"] - 1))


def test_nettrim_is_set_against_its_published_curve():
    text = report({"sweeps": protocol([98.6, 98.6, 98.0, 97.0])})
    section = text.partition("published curve")[2]
    # Between 20 % and 10 % kept, in the logarithm.
    here = 98.0 + 0.6 * np.log(1.55) / np.log(2)
    line = f"| 84.5 | 98.55 | {here:.2f} ({here - 0.02:.2f} to {here + 0.02:.2f}) |"
    assert line in section
    assert f"| {here - 98.55:.2f} " in section
    assert "| 93.5 | 98.07 | " in section
    assert "| 97.0 | 96.52 | outside the measured sizes |" in section
    reproduced = [row.split("|")[-2].strip() for row in section.splitlines() if "98." in row]
    assert reproduced == ["yes", "yes", "no"]


def test_without_its_protocol_nothing_is_said_of_nettrims_curve():
    assert report({"sweeps": curve("ddlr", SMALL)}).endswith("Not measured.\n")
