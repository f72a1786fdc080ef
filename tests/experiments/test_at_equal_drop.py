"""The tables at an equal drop of accuracy, of made-up runs."""

import re

import pandas as pd

from experiments.report.at_equal_drop import ratios_table, report, sizes_table
from experiments.report.tables import NETWORK_TITLES
from made_up_curves import curve


def cells(table: str) -> dict[str, list[str]]:
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    rows = [[cell.strip() for cell in line] for line in lines]
    return {first: others for first, *others in rows if "---" not in first}


def test_each_method_has_its_best_variant_at_the_drop_and_the_least_is_bold():
    ours = curve("lowest_rank", 0.1)
    ours.loc[ours["seed"] == 2, "kept_fraction"] *= 1.3
    sweeps = pd.concat([ours, curve("svd", 0.4), curve("svd", 0.2, refit="layer")])
    found = cells(sizes_table(sweeps, "weights", 1.0))
    assert list(found) == ["", "lowest rank", "SVD of the weights"]
    assert found[""] == [NETWORK_TITLES["lenet_300_100"]]
    assert found["lowest rank"] == ["**11.00 (10.00 to 13.00); 1.00**"]
    assert found["SVD of the weights"] == ["20.00; 1.00"]
    # At half a point, between the two larger sizes, in the logarithm of the size.
    half = cells(sizes_table(sweeps, "weights", 0.5))
    assert half["SVD of the weights"] == [f"{20 * 2**0.625:.2f}; 0.50"]
    in_bytes = cells(sizes_table(sweeps, "bytes", 1.0))
    assert in_bytes["SVD of the weights"] == ["24.00; 1.00"]


def test_what_was_not_run_by_all_seeds_or_never_within_the_drop_is_a_dash():
    other = {"model": "lenet5"}
    sweeps = pd.concat(
        [
            curve("lowest_rank", 0.1),
            curve("svd", 0.2),
            curve("svd", 0.2, **other),
            curve("alps", 0.1, seeds=(0, 1)),
            curve("magnitude", 0.1, drops=(9.0, 8.0, 7.0)),
            curve("magnitude", 0.1, **other),
            curve("osscar", 0.1, refit="network"),
            curve("fewest_weights", 0.05, goal="max_accuracy_drop"),
        ]
    )
    found = cells(sizes_table(sweeps, "weights", 1.0))
    magnitude = "magnitude, a threshold a layer"
    assert list(found) == ["", "lowest rank", "SVD of the weights", magnitude]
    assert found["lowest rank"][1] == "-"
    assert found[magnitude] == ["-", "**10.00; 1.00**"]


def test_bounds_and_rows_of_earlier_code_are_marked():
    small = curve("svd", 0.24, drops=(0.9, 0.8, 0.7)).assign(earlier=False)
    old = curve("lowest_rank", 0.1).assign(earlier=lambda rows: rows["wanted"] == 0.2)
    found = cells(sizes_table(pd.concat([small, old]), "weights", 1.0))
    assert found["SVD of the weights"] == ["at most 12.00; 0.90"]
    assert found["lowest rank"] == ["**10.00; 1.00†**"]


def test_with_all_layers_trained_together_only_those_count():
    sweeps = pd.concat([curve("svd", 0.1), curve("svd", 0.3, refit="network")])
    text = report({"sweeps": sweeps})
    alone, together = (
        cells(part[part.index("|") :].partition("\n\n")[0])
        for part in re.split("## Weights kept at a drop of 1 point", text)[1:]
    )
    assert alone["SVD of the weights"] == ["**10.00; 1.00**"]
    assert together["SVD of the weights"] == ["**30.00; 1.00**"]


def test_the_ratio_is_of_the_least_of_ours_over_the_least_of_all_baselines():
    ours = [curve("lowest_rank", 0.1), curve("smallest", 0.08)]
    baselines = [curve("svd", 0.2), curve("alps", 0.16), curve("svd", 0.01, refit="network")]
    step = curve("activation_svd_selected", 0.01)
    other = curve("svd", 0.1, model="lenet5")
    found = cells(ratios_table(pd.concat([*ours, *baselines, step, other])))
    first = found[NETWORK_TITLES["lenet_300_100"]]
    assert first[0] == "0.50: smallest form 8.00 %; ALPS 16.00 %"
    assert first[2] == "0.50: smallest form 9.60 %; ALPS 19.20 %"
    assert found[NETWORK_TITLES["lenet5"]] == ["not measured"] * 4


def test_a_ratio_of_a_size_that_is_a_bound_says_so():
    within = curve("svd", 0.2, drops=(0.9, 0.5, 0.1))
    found = cells(ratios_table(pd.concat([curve("lowest_rank", 0.05), within])))
    first = found[NETWORK_TITLES["lenet_300_100"]][0]
    assert first == "0.50: lowest rank 5.00 %; SVD of the weights at most 10.00 %"


def test_times_are_those_of_the_faster_form():
    rows = [
        {"method": method, "form": form, "seed": seed, "batch": batch, "speedup": speedup}
        | {"microseconds": 100 / speedup, "dataset": "mnist", "model": "lenet5"}
        | {"largest_drop": 1.0}
        for method, fused in (("smallest", 6.0), ("svd", 3.0))
        for batch in (1, 256)
        for seed, factor in ((0, 1.0), (1, 1.5))
        for form, speedup in (("stored", 2.0), ("fused", factor * fused))
    ]
    text = report({"times_at_drop": pd.DataFrame(rows)})
    assert text.count("\n## Times as fast as the dense layers, batch ") == 2
    found = cells(text[text.index("|") :].partition("\n\n")[0])
    assert found["smallest form"] == ["**7.5 (6.0 to 9.0)**"]
    assert found["SVD of the weights"] == ["3.8 (3.0 to 4.5)"]
    assert "Not measured." not in text
    assert "Not measured." in report({})


def test_the_report_has_each_count_at_each_drop():
    text = report({"sweeps": curve("svd", 0.1)})
    for words in ("Weights", "Bytes"):
        for drop in ("1 point", "0.5 points"):
            assert f"\n## {words} kept at a drop of {drop}\n" in text
