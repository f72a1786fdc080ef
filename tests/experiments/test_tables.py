"""Tables are read by what they say, in whatever order their rows stand."""

import numpy as np
import pandas as pd
import pytest

from experiments.report.tables import (
    GROUP,
    at_commonest_samples_and_ridge,
    at_one_tolerance,
    in_order,
    read_table,
    with_all_seeds,
    with_choices,
)
from experiments.report.variants import variant_words
from experiments.runs.records import ONE_TOLERANCE, USUAL_RIDGE


def settings(**columns) -> pd.DataFrame:
    about = {key: "x" for key in ("dataset", "constraint", "refit", "order", "goal")}
    about |= {"model": "a", "method": "m", "ridge": 0.01, "calibration_samples": 5000, "seed": 0}
    about |= {"cascade_bound": "tolerance", "network_refit": ""}
    rows = pd.DataFrame({"wanted": [0.1], **{name: [value] for name, value in columns.items()}})
    return rows.assign(**{key: value for key, value in about.items() if key not in rows})


def joined(*parts: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True)


def test_the_commonest_samples_and_ridge_are_those_with_most_rows_of_a_network_and_method():
    few = [settings(wanted=each, calibration_samples=5000) for each in (0.1, 0.2)]
    many = [settings(wanted=each, calibration_samples=500) for each in (0.1, 0.2, 0.3)]
    # Another method, and another network, have most rows elsewhere.
    others = [
        settings(wanted=each, calibration_samples=5000, **other)
        for each in (0.1, 0.2, 0.3, 0.4)
        for other in ({"method": "n"}, {"model": "b"})
    ]
    main = at_commonest_samples_and_ridge(joined(*few, *many, *others))
    own = main[(main["model"] == "a") & (main["method"] == "m")]
    assert sorted(own["wanted"]) == [0.1, 0.2, 0.3]
    assert set(own["calibration_samples"]) == {500}
    assert len(main) == 3 + 8


@pytest.mark.parametrize(
    ("column", "smaller", "larger"), [("calibration_samples", 500, 5000), ("ridge", 0.01, 1.0)]
)
def test_of_samples_and_ridges_with_as_many_rows_the_larger_are_taken(column, smaller, larger):
    rows = [settings(**{column: each}) for each in (larger, smaller)]
    for order in (rows, rows[::-1]):
        assert set(at_commonest_samples_and_ridge(joined(*order))[column]) == {larger}


def test_a_setting_counts_with_every_seed_of_its_own_network():
    whole = [settings(seed=seed) for seed in (0, 1)]
    lacking = settings(wanted=0.2, seed=0)
    twice = [settings(wanted=0.3, seed=1) for _ in range(2)]  # as many rows, but of one seed
    other = settings(model="b", seed=7)
    found = with_all_seeds(joined(*whole, lacking, *twice, other))
    assert list(zip(found["model"], found["wanted"], found["seed"], strict=True)) == [
        ("a", 0.1, 0),
        ("a", 0.1, 1),
        ("b", 0.1, 7),
    ]


def test_runs_from_before_there_were_choices_had_the_usual_ones():
    old = pd.DataFrame({"relative_tolerance": [0.1, 0.2]})
    found = with_choices(old)
    assert list(found["goal"]) == [ONE_TOLERANCE] * 2
    assert list(found["wanted"]) == [0.1, 0.2]
    assert list(found["ridge"]) == [USUAL_RIDGE] * 2
    new = pd.DataFrame(
        {"relative_tolerance": [np.nan], "goal": ["kept_fraction"], "wanted": [0.3], "ridge": [1.0]}
    )
    found = with_choices(joined(old, new))
    assert list(found["goal"]) == [ONE_TOLERANCE] * 2 + ["kept_fraction"]
    assert list(found["wanted"]) == [0.1, 0.2, 0.3]
    assert list(found["ridge"]) == [USUAL_RIDGE] * 2 + [1.0]
    assert list(at_one_tolerance(found)["wanted"]) == [0.1, 0.2]


def test_a_refit_of_the_network_on_more_samples_is_a_setting_of_its_own(tmp_path):
    usual = settings(refit="network", relative_tolerance=0.1)
    on_more = settings(refit="network", relative_tolerance=0.1, network_refit="900 samples")
    path = tmp_path / "sweeps.csv"
    joined(usual, on_more).assign(run=["1", "2"]).to_csv(path, index=False)
    found = read_table(path)
    assert list(found["network_refit"]) == ["", "900 samples"]
    assert len(with_all_seeds(found)) == 2
    keys = [key for key, _ in found.groupby(GROUP)]
    assert len(keys) == 2
    assert [variant_words(GROUP, key) for key in keys] == [
        "m, refit network, x",
        "m, refit network (900 samples), x",
    ]
    # So do rows from before there was a choice.
    old = joined(usual).drop(columns="network_refit")
    assert list(with_choices(old)["network_refit"]) == [""]


def test_names_come_once_in_the_known_order_and_others_after_them():
    assert in_order(["z", "b", "a", "q", "b"], ["b", "c", "a"]) == ["b", "a", "q", "z"]


def test_one_architecture_on_two_data_sets_is_two_networks(tmp_path):
    path = tmp_path / "sweeps.csv"
    rows = pd.DataFrame(
        {
            "run": ["1", "2", "3"],
            "dataset": ["mnist", "fashion_mnist", "fashion_mnist"],
            "model": ["fc_nettrim", "fc_nettrim", "fc_nettrim_fashion"],
        }
    )
    rows.to_csv(path, index=False)
    assert list(read_table(path)["model"]) == ["fc_nettrim", *["fc_nettrim_fashion"] * 2]
