"""Verdicts on claims, each brought about by a table made for it."""

import pandas as pd
import pytest

from experiments.collect import smallest_sizes
from experiments.report.claims import CLAIMS, Tables, carried_over, verdict
from experiments.report.size_ratios import EQUAL_DROPS, compare_sizes
from made_up_claims import LARGE, NETWORK, SMALL, curve

FEWER, PROMISE, OTHERS, FASTER, WEIGHTS, BYTES = CLAIMS
REFIT = ("layer", "parallel")


def judged(claim, *curves: pd.DataFrame, **more: pd.DataFrame) -> str:
    sweeps = pd.concat(curves, ignore_index=True)
    tables = Tables({"sweeps": sweeps, "sizes": smallest_sizes(sweeps), **more})
    return verdict(claim, tables, NETWORK)


def test_nothing_is_said_of_what_was_not_measured():
    nettrim = curve("nettrim", SMALL)
    assert {judged(claim, nettrim) for claim in CLAIMS} == {"not measured"}
    tables = Tables({"sweeps": nettrim})
    assert verdict(FEWER, tables, "vgg_small") == "not measured"


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


def timed(*rows: tuple[str, str, int, float, float]) -> pd.DataFrame:
    """Times by engine, form and batch, of the compressed layers and of the dense ones."""
    columns = ["engine", "form", "batch", "microseconds", "microseconds_dense"]
    about = {
        "model": NETWORK,
        "method": "ddlr",
        "refit": "layer",
        "order": "parallel",
        "threads": 1,
        "promised": 2.0,
        "kept_fraction": 0.5,
        "accuracy_drop_held_out": 0.9,
    }
    return pd.DataFrame(rows, columns=columns).assign(**about)


def test_inference_gets_faster_at_every_batch():
    runs = curve("ddlr", SMALL)
    fast = timed(("torch", "fused", 1, 10, 15), ("torch", "fused", 256, 100, 120))
    assert judged(FASTER, runs, inference=fast) == "holds with refit"
    slow = timed(("torch", "fused", 1, 10, 15), ("torch", "fused", 256, 100, 105))
    assert judged(FASTER, runs, inference=slow) == "does not hold"
    for column, other in {"method": "nettrim", "model": "others", "threads": 2}.items():
        assert judged(FASTER, runs, inference=fast.assign(**{column: other})) == "not measured"


def test_each_is_timed_where_it_is_fastest():
    runs = curve("ddlr", SMALL)
    slow_stored = timed(("torch", "stored", 1, 30, 15), ("torch", "fused", 1, 10, 15))
    assert judged(FASTER, runs, inference=slow_stored) == "holds with refit"
    # Dense layers that are faster in another engine are what counts.
    other = timed(("torch", "fused", 1, 10, 15), ("onnxruntime", "fused", 1, 12, 10.5))
    assert judged(FASTER, runs, inference=other) == "does not hold"


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

    drop = EQUAL_DROPS[0]
    word, cell = compare_sizes(curve("ddlr", LARGE), beaten_by_none, "kept_fraction", drop)
    assert word == "undecided"
    assert cell == "-; Net-Trim outside the grid in 3 of 3 seeds"
    nothing = curve("ddlr", SMALL, drops=never)
    assert compare_sizes(nothing, beaten, "kept_fraction", drop) == ("not measured", "-")


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


def test_rows_of_earlier_code_are_named_by_network():
    rows = curve("ddlr", SMALL)
    assert carried_over(rows) == carried_over(rows.assign(earlier=False)) == []
    rows = pd.concat([rows.assign(earlier=True), curve("nettrim", LARGE).assign(earlier=False)])
    (said,) = carried_over(rows)
    assert "12 of 24" in said and "upper bounds" in said
