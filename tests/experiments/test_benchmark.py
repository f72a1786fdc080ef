"""The benchmark of the solvers, in small: what it measures, draws and leaves as it is."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from commands import DIGITS, command
from experiments import benchmarks
from experiments.configuration import REPOSITORY
from experiments.report.solver_targets import ONE_RANK, RANK_SEARCH, SUM_OF_STRUCTURES

RANKS_OF_DIGITS = (
    "model@lowest_rank.model=mlp_digits",
    *("lowest_rank.samples=200", "lowest_rank.other_starts=2"),
)


@pytest.mark.slow
def test_the_benchmark_measures_certified_solves_and_draws_them(tmp_path):
    tiny = "[[6,5,30]]"
    done = command(
        "benchmark",
        *DIGITS,
        "layer.samples=200",
        "layer.seconds_limit=0.05",
        "memory.samples=300",
        "reference.SCS.layers=" + tiny,
        "reference.CLARABEL.layers=" + tiny,
        "reference.MOSEK.layers=[]",
        "reference.ours_alone.layers=[[12,12,60]]",
        "growth.layers=" + tiny,
        "sparse.layers=[[30,20]]",
        "sparse.rounds=2",
        f"checkpoint_dir={REPOSITORY}/results/checkpoints",
        *RANKS_OF_DIGITS,
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "results/benchmark.csv")
    parts = {"reference", "layer", "sum", "path", "lowest_rank", "growth", "memory", "sparse"}
    assert set(table["part"]) == parts
    solved = table[table["gap_asked"].notna()]
    assert (solved["status"] == "converged").all()
    assert (solved["relative_gap"].abs() <= solved["gap_asked"]).all()
    sparse = table[table["part"] == "sparse"]
    assert len(sparse) == 18
    assert (sparse[["seconds", "seconds_dense"]] > 0).all(axis=None)
    cone = solved[solved["solver"].isin(["SCS", "CLARABEL"])]
    assert len(cone) == 2
    targets = pd.read_csv(tmp_path / "results/benchmark_targets.csv")
    assert {"yes", "no"} >= set(targets["met"])
    assert any("pairs an iteration" in what for what in targets["what"])
    assert SUM_OF_STRUCTURES in set(targets["what"])
    for figure in ("convergence", "scaling"):
        assert (tmp_path / f"results/figures/{figure}.png").stat().st_size > 10_000


def test_a_part_of_the_benchmark_runs_alone_and_leaves_the_rows_of_others(tmp_path):
    path = tmp_path / "results/benchmark.csv"
    path.parent.mkdir()
    earlier = [
        {"part": "growth", "case": "growth", "norm": "l1", "seconds": 7.0},
        {"part": "lowest_rank", "case": "search", "norm": "rank", "seconds": 8.0},
    ]
    pd.DataFrame(earlier).to_csv(path, index=False)
    done = command(
        "benchmark",
        "dataset=digits",
        "parts=[lowest_rank]",
        *RANKS_OF_DIGITS,
        f"checkpoint_dir={REPOSITORY}/results/checkpoints",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(path)
    assert table.loc[table["part"] == "growth", "seconds"].tolist() == [7.0]
    found = table[table["part"] == "lowest_rank"]
    assert list(found["case"]) == ["search"] * 3 + ["one rank"] + ["other start"] * 2
    searches, one, others = found.iloc[:3], found.iloc[3], found.iloc[4:]
    assert (others["rank"] == one["rank"] - 1).all()
    assert (others["relative_error"] > one["relative_error"]).all()
    assert (searches["relative_error"] <= searches["relative_tolerance"] * (1 + 1e-3)).all()
    assert searches["rank"].is_monotonic_decreasing
    assert one["rank"] == searches["rank"].iloc[1]
    assert one["relative_error"] <= searches["relative_error"].iloc[1]
    targets = pd.read_csv(path.with_name("benchmark_targets.csv"))
    assert list(targets["what"]) == [ONE_RANK, RANK_SEARCH]
    assert list(targets["target"]) == ["<= 12", "<= 50"]
    pairs = searches["seconds"] / searches["pair_seconds"]
    assert targets["measured"].iloc[1] == pytest.approx(pairs.max(), rel=1e-2)


def test_measurement_never_imports_the_judge():
    names = [path.stem for path in Path(benchmarks.__file__).parent.glob("*.py")]
    assert {"timing", "one_layer"} <= set(names)
    imports = "; ".join(f"import experiments.benchmarks.{name}" for name in names if name[0] != "_")
    code = f"{imports}; import sys; print(*(each for each in sys.modules if 'experiments' in each))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    judges = ("experiments.report", "experiments.targets", "experiments.verdict")
    loaded = done.stdout.split()
    assert "experiments.benchmarks.timing" in loaded
    assert not [name for name in loaded if name.startswith((*judges, "experiments.plot"))]
