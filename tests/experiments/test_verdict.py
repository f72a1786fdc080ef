"""Verdicts, each brought about by a table made for it."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from experiments import verdict
from experiments.collect import smallest_sizes
from experiments.report.tables import size_at_drop, write_table
from experiments.verdict import CLAIMS, Tables
from made_up_tables import made_up_inference, made_up_tables

FEWER, PROMISE, OTHERS, FASTER, WEIGHTS, BYTES = CLAIMS
NETWORK = "lenet_300_100"
REFIT = ("layer", "parallel")


def curve(
    method: str,
    sizes: list[float],
    *,
    drops: tuple[float, ...] = (0.1, 0.4, 0.8, 2.0),
    variant: tuple[str, str] = ("none", "parallel"),
    seeds: int = 3,
    wobble: float = 0.0,
) -> pd.DataFrame:
    """Rows of a method at four tolerances; `wobble` moves the sizes of the seeds apart."""
    refit, order = variant
    rows = [
        {
            "run": f"{method}-{refit}-{order}-{tolerance}-{seed}",
            "seed": seed,
            "goal": "relative_tolerance",
            "wanted": tolerance,
            "relative_tolerance": tolerance,
            "kept_fraction": size * (1 + wobble * (seed - (seeds - 1) / 2)),
            "accuracy_drop_held_out": drop,
            "accuracy_drop": drop,
            "output_error": tolerance,
            "output_bound": 2 * tolerance,
            "accuracy": 98.0 - drop,
        }
        for tolerance, size, drop in zip((0.05, 0.1, 0.2, 0.3), sizes, drops, strict=True)
        for seed in range(seeds)
    ]
    about = {"dataset": "mnist", "model": NETWORK, "method": method, "constraint": "nettrim"}
    about |= {"refit": refit, "order": order, "cascade_bound": "tolerance", "ridge": 0.01}
    table = pd.DataFrame(rows).assign(**about)
    return table.assign(bytes_fraction=table["kept_fraction"], calibration_samples=5000)


def judged(claim, *curves: pd.DataFrame, **more: pd.DataFrame) -> str:
    sweeps = pd.concat(curves, ignore_index=True)
    tables = Tables({"sweeps": sweeps, "sizes": smallest_sizes(sweeps), **more})
    return verdict.verdict(claim, tables, NETWORK)


SMALL, LARGE = [0.6, 0.4, 0.3, 0.2], [0.9, 0.8, 0.6, 0.5]


def test_nothing_is_said_of_what_was_not_measured():
    nettrim = curve("nettrim", SMALL)
    assert {judged(claim, nettrim) for claim in CLAIMS} == {"not measured"}
    tables = Tables({"sweeps": nettrim})
    assert verdict.verdict(FEWER, tables, "vgg_small") == "not measured"


def test_parameters_fall_a_lot():
    assert judged(FEWER, curve("ddlr", SMALL)) == "holds"
    assert judged(FEWER, curve("ddlr", LARGE)) == "does not hold"
    refitted = curve("ddlr", SMALL, variant=REFIT)
    assert judged(FEWER, curve("ddlr", LARGE), refitted) == "holds with refit"
    cascade = curve("ddlr", SMALL, variant=("none", "cascade"))
    assert judged(FEWER, curve("ddlr", LARGE), cascade) == "holds in cascade"


def test_parameters_fall_at_a_small_loss_only_if_the_test_set_confirms_it():
    fooled = curve("ddlr", SMALL).assign(accuracy_drop=1.5)
    assert judged(FEWER, fooled) == "does not hold"
    never = curve("ddlr", SMALL, drops=(0.6, 0.7, 0.8, 0.9))
    assert judged(FEWER, never) == "does not hold"


def layers_of(runs: pd.DataFrame, error: float, held_out: float) -> pd.DataFrame:
    """One layer a run, with its errors in units of the promise."""
    columns = ["run", "model", "method", "constraint", "refit", "order", "relative_tolerance"]
    promised = runs["relative_tolerance"]
    return runs[columns].assign(
        relative_error_read=error * promised, relative_error_held_out=held_out * promised
    )


@pytest.mark.parametrize(
    ("error", "held_out", "on_calibration", "on_others"),
    [
        (1.0005, 1.2, "holds", "holds"),
        (1.0, 1.3, "holds", "does not hold"),
        (1.01, 0.9, "does not hold", "holds"),
    ],
)
def test_the_loss_is_controlled(error, held_out, on_calibration, on_others):
    runs = curve("ddlr", SMALL)
    layers = layers_of(runs, error, held_out)
    assert judged(PROMISE, runs, layers=layers) == on_calibration
    assert judged(OTHERS, runs, layers=layers) == on_others


def test_the_loss_is_not_controlled_where_a_network_exceeds_its_bound():
    runs = curve("ddlr", SMALL)
    layers = layers_of(runs, 0.9, 0.9)
    broken = runs.assign(output_error=runs["output_bound"].where(runs["seed"] > 0, 9.0))
    assert judged(PROMISE, broken, layers=layers) == "does not hold"
    without = runs.assign(output_bound=float("nan"))
    assert judged(PROMISE, without, layers=layers) == "holds"


def timed(*rows: tuple[float, int, float]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["relative_tolerance", "batch", "speedup"])
    return table.assign(model=NETWORK, method="ddlr", form="low_rank", kept_fraction=0.5)


def test_inference_gets_faster_at_every_batch_and_a_tolerance_that_keeps_the_accuracy():
    # Within half a point are the tolerances 0.05 and 0.1.
    runs = curve("ddlr", SMALL)
    fast = timed((0.1, 1, 1.5), (0.1, 256, 1.2), (0.05, 1, 0.9), (0.05, 256, 0.9))
    assert judged(FASTER, runs, inference=fast) == "holds"
    for slow in (timed((0.1, 1, 1.5), (0.1, 256, 1.05)), timed((0.2, 1, 2), (0.2, 256, 2))):
        assert judged(FASTER, runs, inference=slow) == "does not hold"
    refitted = curve("ddlr", SMALL, drops=(0.1, 0.2, 0.4, 0.8), variant=REFIT)
    later = timed((0.05, 1, 0.9), (0.2, 1, 2), (0.2, 256, 2))
    assert judged(FASTER, runs, refitted, inference=later) == "holds with refit"


@pytest.mark.parametrize("claim", [WEIGHTS, BYTES], ids=["weights", "bytes"])
def test_ddlr_beats_nettrim_only_at_every_equal_drop(claim):
    small, large = curve("ddlr", SMALL), curve("nettrim", LARGE)
    assert judged(claim, small, large) == "holds"
    assert judged(claim, curve("ddlr", LARGE), curve("nettrim", SMALL)) == "does not hold"
    # Smaller at half a point, larger at one.
    crossing = curve("ddlr", [0.6, 0.4, 0.39, 0.38])
    assert judged(claim, crossing, curve("nettrim", [0.8, 0.6, 0.3, 0.1])) == "does not hold"


def test_weights_and_bytes_are_counted_apart():
    own = curve("ddlr", LARGE)
    rival = curve("nettrim", SMALL).assign(bytes_fraction=lambda rows: 3 * rows["kept_fraction"])
    assert judged(WEIGHTS, own, rival) == "does not hold"
    assert judged(BYTES, own, rival) == "holds"


def test_variants_are_compared_with_their_like():
    as_published = (curve("ddlr", LARGE), curve("nettrim", SMALL))
    refitted = (curve("ddlr", SMALL, variant=REFIT), curve("nettrim", LARGE, variant=REFIT))
    assert judged(WEIGHTS, *as_published, *refitted) == "holds with refit"
    # A refit that only DDLR has is no comparison.
    assert judged(WEIGHTS, *as_published, refitted[0]) == "does not hold"
    swapped = (curve("ddlr", SMALL), curve("nettrim", LARGE))
    fair = (curve("ddlr", LARGE, variant=REFIT), curve("nettrim", SMALL, variant=REFIT))
    assert judged(WEIGHTS, *swapped, *fair) == "holds as published only"


def test_a_tie_is_no_victory():
    nettrim = curve("nettrim", SMALL)
    # By less than the margin in every seed, and by more on average but not in every seed.
    slightly = curve("ddlr", [0.97 * size for size in SMALL])
    assert judged(WEIGHTS, slightly, nettrim) == "does not hold (a tie)"
    scattered = curve("ddlr", [0.93 * size for size in SMALL], wobble=0.1)
    assert judged(WEIGHTS, scattered, nettrim) == "does not hold (a tie)"
    clearly = curve("ddlr", [0.93 * size for size in SMALL], wobble=0.01)
    assert judged(WEIGHTS, clearly, nettrim) == "holds"
    refitted = (curve("ddlr", SMALL, variant=REFIT), curve("nettrim", SMALL, variant=REFIT))
    tie = judged(WEIGHTS, curve("ddlr", LARGE), nettrim, *refitted)
    assert tie == "does not hold (a tie with refit)"


def test_a_method_that_never_keeps_the_drop_is_larger_than_it_was_measured():
    never = (1.5, 2.0, 3.0, 4.0)
    rival = curve("nettrim", LARGE)
    assert judged(WEIGHTS, curve("ddlr", SMALL, drops=never), rival) == "does not hold"
    # All that is known of these rivals is that they need more than SMALL, and more than LARGE.
    beaten_by_none = curve("nettrim", SMALL, drops=never)
    assert judged(WEIGHTS, curve("ddlr", LARGE), beaten_by_none) == "does not hold"
    beaten = curve("nettrim", LARGE, drops=never)
    assert judged(WEIGHTS, curve("ddlr", SMALL), beaten) == "holds"

    drop = verdict.EQUAL_DROPS[0]
    word, cell = verdict.compare_sizes(curve("ddlr", LARGE), beaten_by_none, "kept_fraction", drop)
    assert word == "undecided"
    assert cell == "-; Net-Trim outside the grid in 3 of 3 seeds"
    nothing = curve("ddlr", SMALL, drops=never)
    assert verdict.compare_sizes(nothing, beaten, "kept_fraction", drop) == ("not measured", "-")


def seeds_of(method: str, *factors: float, **about) -> pd.DataFrame:
    """A curve whose sizes are those of `SMALL`, times a factor for each seed."""
    rows = curve(method, SMALL, seeds=len(factors), **about)
    return rows.assign(kept_fraction=rows["kept_fraction"] * np.take(factors, rows["seed"]))


def compared(own: pd.DataFrame, rival: pd.DataFrame) -> tuple[str, str]:
    return verdict.compare_sizes(own, rival, "kept_fraction", 0.8)


@pytest.mark.parametrize(
    ("ratios", "word"),
    [
        ((0.9, 0.93, 0.96), "smaller"),
        ((0.94, 0.96, 0.97), "tie"),  # in every seed, but by too little on average
        ((0.7, 0.8, 1.01), "tie"),  # by much on average, but not in every seed
        ((1.1, 1.07, 1.04), "larger"),
        ((1.06, 1.04, 1.03), "tie"),
        ((1.3, 1.2, 0.99), "tie"),
        ((1.0, 1.0, 1.0), "tie"),
    ],
)
def test_a_word_for_sizes_takes_every_seed_and_a_margin(ratios, word):
    mean, low, high = np.mean(ratios), min(ratios), max(ratios)
    cell = f"{mean:.2f}" if low == high else f"{mean:.2f} ({low:.2f} to {high:.2f})"
    assert compared(seeds_of("ddlr", *ratios), seeds_of("nettrim", 1, 1, 1)) == (word, cell)


def test_sizes_are_compared_on_the_seeds_that_both_were_run_with():
    own, rival = seeds_of("ddlr", 0.9, 0.8, 9.0), seeds_of("nettrim", 1, 1)
    assert compared(own, rival) == ("smaller", "0.85 (0.80 to 0.90)")
    assert compared(rival, own) == ("larger", "1.18 (1.11 to 1.25)")


def test_of_a_method_that_keeps_no_drop_only_a_bound_on_its_size_is_known():
    """Of one seed: more than the largest size it was measured at."""

    def never(rows: pd.DataFrame) -> pd.DataFrame:
        lost = rows["accuracy_drop_held_out"].where(rows["seed"] > 0, 9.0)
        return rows.assign(accuracy_drop_held_out=lost)

    half, whole = seeds_of("ddlr", 0.5, 0.5, 0.5), seeds_of("nettrim", 1, 1, 1)
    # The rival's size of that seed is above 0.6 of all weights, its largest; ours is 0.3 of them.
    word, cell = compared(seeds_of("ddlr", 1.0, 0.5, 0.5), never(whole))
    assert (word, cell) == ("smaller", "0.50; Net-Trim outside the grid in 1 of 3 seeds")
    word, cell = compared(seeds_of("ddlr", 3, 3, 3), never(whole))
    assert (word, cell) == ("undecided", "3.00; Net-Trim outside the grid in 1 of 3 seeds")
    word, cell = compared(never(half), whole)
    assert (word, cell) == ("undecided", "0.50; DDLR outside the grid in 1 of 3 seeds")
    word, cell = compared(never(seeds_of("ddlr", 3, 3, 3)), whole)
    assert (word, cell) == ("larger", "3.00; DDLR outside the grid in 1 of 3 seeds")
    # Where neither keeps the drop nothing is known of that seed; the others count.
    assert compared(never(half), never(whole)) == ("smaller", "0.50")


def test_runs_in_nettrims_output_set_are_the_published_ones():
    small, large = curve("ddlr", SMALL), curve("ddlr", LARGE).assign(constraint="hinge")
    hinge = large.assign(run=large["run"] + "-hinge")
    assert judged(FEWER, small, hinge) == "holds"
    swapped = curve("ddlr", LARGE), small.assign(constraint="hinge", run=small["run"] + "-hinge")
    assert judged(FEWER, *swapped) == "does not hold"


def test_one_layer_above_its_promise_breaks_it_on_samples_never_seen():
    runs = curve("ddlr", SMALL)
    layers = layers_of(runs, 0.9, 1.0)
    layers.loc[5, "relative_error_held_out"] *= 1.3
    assert judged(OTHERS, runs, layers=layers) == "does not hold"
    layers.loc[5, "relative_error_read"] *= 1.2
    assert judged(PROMISE, runs, layers=layers) == "does not hold"


def test_a_size_at_a_drop_lies_on_the_curve():
    sizes, drops = np.array([0.4, 0.1, 0.2]), np.array([0.0, 2.0, 1.0])
    assert size_at_drop(sizes, drops, 1.0) == 0.2
    assert size_at_drop(sizes, drops, 1.5) == pytest.approx(np.sqrt(0.1 * 0.2))
    assert size_at_drop(sizes, drops, 3.0) == 0.1
    assert np.isnan(size_at_drop(sizes, drops, -0.1))


def protocol(accuracies: list[float]) -> pd.DataFrame:
    """Net-Trim in its own protocol on three seeds, at twice the sizes of each other."""
    own = curve("nettrim_protocol", [0.4, 0.2, 0.1, 0.05], variant=("none", "cascade"))
    own["model"] = "fc_nettrim"
    return own.assign(accuracy=np.repeat(accuracies, 3) + 0.02 * (own["seed"] - 1))


def test_nettrim_is_set_against_its_published_curve():
    text = verdict.report({"sweeps": protocol([98.6, 98.6, 98.0, 97.0])})
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
    assert verdict.report({"sweeps": curve("ddlr", SMALL)}).endswith("Not measured.\n")


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


def test_rows_of_earlier_code_are_named_by_network():
    rows = curve("ddlr", SMALL)
    assert verdict.carried_over(rows) == verdict.carried_over(rows.assign(earlier=False)) == []
    rows = pd.concat([rows.assign(earlier=True), curve("nettrim", LARGE).assign(earlier=False)])
    (said,) = verdict.carried_over(rows)
    assert "12 of 24" in said and "upper bounds" in said
