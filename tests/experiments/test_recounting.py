"""Former counts become those of today by arithmetic, once, and what they decided is marked."""

import pandas as pd
import pytest
import torch

from ddlr import LowRankLinear
from ddlr.sizes import layer_size
from experiments.runs.recounting import MARK, recount_tables, recounted, recounted_record


def former_layer(run: str, method: str, in_features: int, out_features: int, **values) -> dict:
    """A layer as it was counted; low-rank on all inputs and outputs unless said otherwise."""
    rank = values["rank"]
    two_factors = rank * (in_features + out_features)
    return {
        "run": run,
        "method": method,
        "in_features": in_features,
        "out_features": out_features,
        "form": "low_rank",
        "parameters_kept": two_factors,
        "bytes_stored": 4 * two_factors,
    } | values


def former_run(layers: list[dict], **values) -> dict:
    kept = sum(layer["parameters_kept"] for layer in layers)
    return {
        "run": layers[0]["run"],
        "method": layers[0]["method"],
        "goal": "relative_tolerance",
        "goal_measured": None,
        "parameters_dense": 40_000,
        "parameters_kept": kept,
        "bytes_stored": sum(layer["bytes_stored"] for layer in layers),
        "kept_fraction": kept / 40_000,
    } | values


def dense(run: str, method: str, in_features: int, out_features: int) -> dict:
    size = in_features * out_features
    return former_layer(
        run,
        method,
        in_features,
        out_features,
        rank=min(in_features, out_features),
        form="dense",
        parameters_kept=size,
        bytes_stored=4 * size,
    )


FIRST = former_layer("a", "svd", 300, 100, rank=7)
RUNS = {
    "low rank, and a last layer of full rank": (
        [FIRST, dense("a", "svd", 100, 10)],
        {},
        False,
    ),
    "a dense layer that might be low-rank today": ([FIRST, dense("a", "svd", 100, 60)], {}, True),
    "a goal": ([FIRST], {"goal": "kept_fraction", "goal_measured": 0.07}, True),
    "inputs that were selected": ([FIRST | {"method": "fewest_weights"}], {}, True),
    "not low-rank": (
        [FIRST | {"method": "nettrim", "form": "sparse"}],
        {"goal": "kept_fraction", "goal_measured": 0.07},
        False,
    ),
}


@pytest.mark.parametrize(("layers", "values", "chosen"), RUNS.values(), ids=RUNS)
def test_sizes_are_those_that_the_layers_would_count_today(layers, values, chosen):
    run = former_run(layers, **values)
    sweeps, found = recounted(pd.DataFrame([run]), pd.DataFrame(layers))
    for layer, now in zip(layers, found.to_dict("records"), strict=True):
        size = layer["parameters_kept"], layer["bytes_stored"]
        if layer["form"] == "low_rank":
            shape = layer["in_features"], layer["out_features"], layer["rank"]
            counted = layer_size(LowRankLinear(*shape))
            size = counted.parameters, counted.bytes
        assert (now["parameters_kept"], now["bytes_stored"]) == size
    row = sweeps.iloc[0]
    assert row[MARK] == chosen
    for column in ("parameters_kept", "bytes_stored"):
        assert row[column] == found[column].sum()
    assert row["kept_fraction"] == row["parameters_kept"] / 40_000
    if run["goal"] == "kept_fraction":
        assert row["goal_measured"] == row["kept_fraction"]


def test_with_outputs_left_out_weights_are_exact_and_bytes_an_upper_bound():
    layer = LowRankLinear(300, 100, 7)
    with torch.no_grad():
        layer[1].weight[20:], layer[0].weight[:, 100:] = 0, 0
    former = former_layer("a", "svd", 300, 100, rank=7, parameters_kept=7 * 120)
    former["bytes_stored"] = 4 * 7 * 120 + 13 + 38  # bitmaps of outputs and inputs
    sweeps, _ = recounted(pd.DataFrame([former_run([former])]), pd.DataFrame([former]))
    size = layer_size(layer)
    assert sweeps["parameters_kept"].item() == size.parameters
    assert size.bytes <= sweeps["bytes_stored"].item() <= 1.007 * size.bytes


def test_a_layer_of_rank_zero_holds_nothing():
    layer = former_layer("a", "lowest_rank", 784, 300, rank=0, parameters_kept=2608)
    sweeps, _ = recounted(pd.DataFrame([former_run([layer])]), pd.DataFrame([layer]))
    assert sweeps["parameters_kept"].item() == sweeps["bytes_stored"].item() == 0


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    layers = [FIRST, former_layer("b", "ddlr", 300, 100, rank=3)]
    return pd.DataFrame([former_run([layer]) for layer in layers]), pd.DataFrame(layers)


def test_tables_are_counted_anew_once_and_rows_of_today_stay(tmp_path):
    for name, table in zip(("sweeps", "layers"), tables(), strict=True):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    assert recount_tables(tmp_path) == 2
    once = [(tmp_path / f"{name}.csv").read_text() for name in ("sweeps", "layers")]
    assert recount_tables(tmp_path) == 0
    assert once == [(tmp_path / f"{name}.csv").read_text() for name in ("sweeps", "layers")]
    assert recount_tables(tmp_path / "elsewhere") == 0


def test_a_table_that_lacks_layers_of_a_run_is_refused():
    sweeps, layers = tables()
    with pytest.raises(ValueError, match="the layers of run b do not add up"):
        recounted(sweeps, layers[layers["run"] == "a"])


def test_a_record_is_counted_as_the_tables_are():
    record = {"state": "finished", "row": former_run([FIRST]), "layers": [FIRST]}
    now = recounted_record(record)
    sweeps, layers = recounted(pd.DataFrame([record["row"]]), pd.DataFrame(record["layers"]))
    assert now["row"]["parameters_kept"] == sweeps["parameters_kept"].item() == 7 * (400 - 7)
    assert now["layers"][0]["bytes_stored"] == layers["bytes_stored"].item()
    assert recounted_record(now) == now
    assert recounted_record({"state": "failed"}) == {"state": "failed"}
