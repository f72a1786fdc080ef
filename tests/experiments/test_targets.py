"""The table of the project's targets, and the command that writes it."""

import subprocess
import sys

import pandas as pd

from experiments.report.tables import read_table, write_table
from experiments.report.targets import measured_targets, report
from made_up_curves import curve, to_a_drop


def test_without_tables_nothing_is_measured():
    for tables in ({}, {"sweeps": curve("svd", 0.1, model="another")}):
        found = measured_targets(tables)
        assert len(found) == 46
        assert set(found["measured"]) == {"not measured"}
        assert set(found["met"]) == {""}
        assert report(found).count("\n| ") == 48


def test_the_command_writes_both_tables_without_torch(tmp_path):
    command = [sys.executable, "-m", "experiments.targets", f"results_dir={tmp_path}"]
    command.append(f"output_dir={tmp_path}/outputs")
    sweeps = pd.concat([curve("lowest_rank", 0.02), curve("svd", 0.2), to_a_drop(0.5)])
    texts = []
    for order in (sweeps, sweeps.sample(frac=1, random_state=0)):
        write_table(tmp_path / "sweeps.csv", order.assign(run="r", relative_tolerance=0.1))
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        texts.append((tmp_path / "targets.md").read_text())
        at_equal_drop = (tmp_path / "at_equal_drop.md").read_text()
        assert "| lowest rank | **2.00; 1.00** |" in at_equal_drop
    assert texts[0] == texts[1]
    assert texts[0] in done.stdout
    assert "| 2.00 %, lowest rank, refit none, parallel | 1.00 | yes |" in texts[0]
    table = read_table(tmp_path / "targets.csv")
    assert list(table) == ["what", "target", "measured", "test_drop", "met"]
    assert (table["met"] == "yes").sum() == 7  # two sizes, four ratios, the test drops
    code = "import sys, experiments.targets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
