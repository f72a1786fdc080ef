"""The command that judges the claims of the paper."""

import subprocess
import sys

from experiments.collect import smallest_sizes
from experiments.report.tables import write_table
from made_up_tables import made_up_inference, made_up_tables


def test_the_command_writes_the_same_file_from_the_same_tables(tmp_path):
    sweeps, layers = made_up_tables()
    sweeps["bytes_fraction"] = sweeps["bytes_stored"] / sweeps["bytes_dense"]
    tables = {"layers": layers, "sizes": smallest_sizes(sweeps), "inference": made_up_inference()}
    for name, table in tables.items():
        write_table(tmp_path / f"{name}.csv", table)
    command = [sys.executable, "-m", "experiments.verdict", f"results_dir={tmp_path}"]
    texts = []
    for order in (sweeps, sweeps.sample(frac=1, random_state=0)):
        write_table(tmp_path / "sweeps.csv", order)
        done = subprocess.run(
            [*command, f"output_dir={tmp_path}/outputs"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        texts.append((tmp_path / "claims.md").read_text())
    assert texts[0] == texts[1]
    summary = [line for line in texts[0].splitlines() if line.startswith("| DDLR beats")]
    assert len(summary) == 2
    assert all(line.count("|") == 8 for line in summary)  # the claim, and six networks


def test_without_runs_the_command_says_what_makes_them(tmp_path):
    command = [sys.executable, "-m", "experiments.verdict", f"results_dir={tmp_path}"]
    done = subprocess.run(
        [*command, f"output_dir={tmp_path}/outputs"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "make it with python -m experiments.compress" in done.stderr
