"""The table of the ablation: sizes at equal drops of the runs that differ in one step each."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments.configuration import CONFIG_PATH
from experiments.report.ablation import METHODS, STEPS, ablation_sizes
from experiments.report.curves import size_at_drop
from experiments.report.tables import read_table, write_table
from experiments.status import expanded
from made_up_tables import made_up_ablation
from patience import PATIENCE

DROPS = (0.5, 1.0)


@pytest.fixture(scope="module")
def sweeps() -> pd.DataFrame:
    return made_up_ablation()


def at(table: pd.DataFrame, model: str, drop: float, inputs: str) -> pd.DataFrame:
    rows = (table["model"] == model) & (table["largest_drop"] == drop)
    return table[rows & (table["inputs"] == inputs)].set_index("step")


def test_each_step_differs_from_the_one_before_in_what_it_is_named_after(sweeps):
    table = ablation_sizes(sweeps, DROPS)
    assert len(table) == 2 * len(DROPS) * len(METHODS) * len(STEPS)
    columns = ["method", "refit", "order"]
    found = at(table, "lenet5", 0.5, "selected")[columns].to_numpy().tolist()
    assert found == [
        ["activation_svd_selected", "none", "parallel"],
        ["fewest_weights", "none", "parallel"],
        ["fewest_weights", "layer", "parallel"],
        ["fewest_weights", "layer", "cascade"],
    ]
    others = at(table, "lenet5", 0.5, "all")[columns].to_numpy().tolist()
    assert others == [
        ["activation_svd", "none", "parallel"],
        ["lowest_rank", "none", "parallel"],
        ["lowest_rank", "layer", "parallel"],
        ["lowest_rank", "layer", "cascade"],
    ]


def test_sizes_are_interpolated_seed_by_seed_and_chosen_on_held_out_samples(sweeps):
    table = ablation_sizes(sweeps, DROPS)
    for model in ("lenet_300_100", "lenet5"):
        for drop in DROPS:
            row = at(table, model, drop, "selected").loc["refit"]
            own = sweeps[(sweeps["model"] == model) & (sweeps["method"] == "fewest_weights")]
            own = own[(own["refit"] == "layer") & (own["order"] == "parallel")]
            sizes = [
                size_at_drop(
                    rows["kept_fraction"].to_numpy(),
                    rows["accuracy_drop_held_out"].to_numpy(),
                    drop,
                )
                for _, rows in own.groupby("seed")
            ]
            assert row["seeds"] == 3 and not row["at_most"]
            wanted = [np.mean(sizes), min(sizes), max(sizes)]
            found = [row[name] for name in ("fraction", "fraction_min", "fraction_max")]
            np.testing.assert_allclose(found, wanted, atol=1e-6)
            # Held-out drops are made up as 1.05 times those on the test set.
            assert row["accuracy_drop"] == pytest.approx(drop / 1.05, abs=1e-5)


def test_a_step_of_which_a_seed_is_never_within_the_drop_has_no_size(sweeps):
    step = (sweeps["method"] == "lowest_rank") & (sweeps["order"] == "cascade")
    worse = sweeps["accuracy_drop_held_out"].mask(step & (sweeps["seed"] == 1), 9.0)
    rows = at(
        ablation_sizes(sweeps.assign(accuracy_drop_held_out=worse), DROPS), "lenet5", 1.0, "all"
    )
    assert rows["fraction"].isna().tolist() == [False, False, False, True]
    better = sweeps["accuracy_drop_held_out"].mask(step & (sweeps["seed"] == 1), 0.0)
    rows = at(
        ablation_sizes(sweeps.assign(accuracy_drop_held_out=better), DROPS), "lenet5", 1.0, "all"
    )
    assert rows["at_most"].tolist() == [False, False, False, True]


def test_steps_that_were_not_run_have_no_size_and_without_selection_there_is_no_table(sweeps):
    some = sweeps[~((sweeps["method"] == "fewest_weights") & (sweeps["refit"] == "none"))]
    rows = at(ablation_sizes(some, DROPS), "lenet_300_100", 0.5, "selected")
    assert rows["fraction"].isna().tolist() == [False, True, False, False]
    assert rows["seeds"].tolist() == [3, 0, 3, 3]
    without = sweeps[sweeps["method"] != "activation_svd_selected"]
    assert ablation_sizes(without, DROPS).empty
    assert ablation_sizes(sweeps.assign(goal="relative_tolerance"), DROPS).empty


def test_steps_are_compared_at_equal_samples_and_ridge(sweeps):
    table = ablation_sizes(sweeps, DROPS)
    # More rows, but with samples or a ridge that the selection alone was not run with.
    searched = sweeps["method"].isin(["fewest_weights", "lowest_rank"])
    for change in ({"calibration_samples": 20000}, {"ridge": 1.0}):
        other = sweeps[searched].assign(kept_fraction=1e-3, accuracy_drop_held_out=0.0, **change)
        both = pd.concat([sweeps, other, other.assign(wanted=0.7)], ignore_index=True)
        pd.testing.assert_frame_equal(ablation_sizes(both, DROPS), table)
    # The activation-aware SVD on all inputs has no ridge.
    ridged = sweeps.assign(ridge=sweeps["ridge"].where(sweeps["method"] == "activation_svd", 1.0))
    found = ablation_sizes(ridged, DROPS)
    pd.testing.assert_frame_equal(found.drop(columns="ridge"), table.drop(columns="ridge"))


def runs_of(experiment: str) -> pd.DataFrame:
    """The runs of a sweep, from what it sets; in parallel order where it sets none."""
    whole, runs = expanded(shlex.split(experiment))
    rows = [dict(override.split("=", 1) for override in run) for run in runs]
    runs = pd.DataFrame(rows).rename(columns=lambda key: key.rpartition(".")[2])
    order = runs["order"] if "order" in runs else "parallel"
    return runs.assign(order=order, tolerances=str(whole.goal.tolerances))


def test_the_experiments_of_the_paper_have_every_step_at_the_same_tolerances():
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        listed = compose("paper").experiments
        steps = [
            *("networks=mnist suite=goals_baselines", "networks=mnist suite=goals"),
            *(each for each in listed if "suite=ablation" in each),
        ]
        assert len(steps) == 4
        assert set(steps) <= set(listed)
        runs = pd.concat([runs_of(experiment) for experiment in steps])
    runs = runs[runs["model"].isin(["lenet_300_100", "lenet5"])]
    assert runs["tolerances"].nunique() == 1
    for closed_form, searched in METHODS.values():
        for step, (refit, order) in STEPS.items():
            method = closed_form if step == "closed form" else searched
            of_step = runs[(runs["method"] == method) & (runs["refit"] == refit)]
            of_step = of_step[of_step["order"] == order]
            for _, own in of_step.groupby("model"):
                assert set(own["seed"]) == {"0", "1", "2"}
            assert set(of_step["model"]) == {"lenet_300_100", "lenet5"}
            assert {"0.05", "0.08", "0.12", "0.2"} <= set(of_step["kept_fraction"])


@pytest.mark.slow
def test_the_table_is_collected_where_the_steps_were_run(sweeps, tmp_path: Path):
    sizes = sweeps.drop(columns="output_bound")
    for name, rows in (("all", sizes), ("none", sizes[sizes["method"] == "lowest_rank"])):
        results = tmp_path / name
        results.mkdir()
        write_table(results / "sweeps.csv", rows)
        command = [sys.executable, "-m", "experiments.collect", f"results_dir={results}"]
        command += [f"output_dir={tmp_path}/outputs"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        assert (results / "sizes.csv").is_file()
        assert (results / "ablation.csv").is_file() == (name == "all")
    found = read_table(tmp_path / "all/ablation.csv")
    pd.testing.assert_frame_equal(found, ablation_sizes(sweeps, DROPS), atol=1e-5)
