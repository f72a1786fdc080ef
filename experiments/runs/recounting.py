"""Sizes of runs from before a low-rank layer counted fewer weights than its two factors.

A layer of rank r with n inputs and m outputs counted r (n + m) weights, and was kept dense where
that was no less than n m. Now it counts r (n + m - r), see `ddlr.sizes`, which is r^2 less whatever
n and m are. The network is the same; but where sizes decided something, as they do for a goal, for
selected inputs, and for a layer that was kept dense, today's code may find another, smaller one.
`chosen_by_factors` says of each run whether that is so.
"""

import math
from pathlib import Path

import pandas as pd

from ddlr.index_sets import set_bytes
from ddlr.sizes import BYTES_PER_VALUE
from experiments.report.tables import write_table
from experiments.runs.records import ONE_TOLERANCE

MARK = "chosen_by_factors"
_LOW_RANK = (
    *("ddlr", "lowest_rank", "fewest_weights"),
    *("svd", "activation_svd", "activation_svd_selected"),
)
_SIZES = ("parameters_kept", "bytes_stored")
_GOALS_OF_SIZE = {"kept_fraction": "kept_fraction", "max_parameters": "parameters_kept"}
# Which weights these leave out follows from sizes, at one tolerance too.
_SELECT_INPUTS = ("fewest_weights", "activation_svd_selected")


def recount_tables(folder: Path) -> int:
    """Recount `sweeps.csv` and `layers.csv` in a folder, and return how many runs changed in size.

    Tables in which runs have the mark are left as they are, row by row.
    """
    paths = [folder / name for name in ("sweeps.csv", "layers.csv")]
    if not all(path.is_file() for path in paths):
        return 0
    sweeps, layers = (pd.read_csv(path, dtype={"run": str}) for path in paths)
    new_sweeps, new_layers = recounted(sweeps, layers)
    write_table(paths[1], new_layers)
    write_table(paths[0], new_sweeps)
    return int((new_sweeps["parameters_kept"] != sweeps["parameters_kept"]).sum())


def recounted(sweeps: pd.DataFrame, layers: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs and their layers with sizes as they count today; those with the mark stay.

    Bytes are upper bounds, 0.03 % too large on average and 0.7 % at most: how many outputs a layer
    has kept, among which its pivots are named, is not in the tables, so they are named among all.

    Parameters
    ----------
    sweeps, layers : DataFrame
        Of the form of `sweeps.csv` and `layers.csv`; all layers of each run must be there.

    Raises
    ------
    ValueError
        If layers of a run do not add up to its size; names it.
    """
    done = sweeps[MARK].notna() if MARK in sweeps else pd.Series(False, index=sweeps.index)
    former = layers["run"].isin(sweeps.loc[~done, "run"])
    _check_sums(sweeps[~done], layers[former])
    affected = sweeps["run"].isin(layers.loc[[*map(_might_shrink, layers.itertuples())], "run"])
    layers = _recounted_layers(layers, former & (layers["form"] == "low_rank"))
    sums = layers.groupby("run")[list(_SIZES)].sum()
    sizes = {column: sweeps["run"].map(sums[column]) for column in _SIZES}
    sizes["kept_fraction"] = sizes["parameters_kept"] / sweeps["parameters_dense"]
    for goal, column in _GOALS_OF_SIZE.items():
        if "goal_measured" in sweeps:
            measured = sizes.get("goal_measured", sweeps["goal_measured"])
            sizes["goal_measured"] = measured.where(sweeps["goal"] != goal, sizes[column])
    sweeps = sweeps.assign(
        **{column: sweeps[column].where(done, size) for column, size in sizes.items()}
    )
    low_rank = sweeps["method"].isin(_LOW_RANK)
    by_size = (sweeps["goal"] != ONE_TOLERANCE) | sweeps["method"].isin(_SELECT_INPUTS)
    mark = low_rank & (by_size | affected)
    kept = sweeps[MARK] if MARK in sweeps else mark
    return sweeps.assign(**{MARK: mark.where(~done, kept).astype(bool)}), layers


def recounted_record(record: dict) -> dict:
    """The record of a run with sizes as they count today."""
    if "row" not in record or MARK in record["row"]:
        return record
    sweeps, layers = recounted(pd.DataFrame([record["row"]]), pd.DataFrame(record["layers"]))
    row = record["row"] | {MARK: bool(sweeps[MARK].iloc[0])}
    for column in (*_SIZES, "kept_fraction", "goal_measured"):
        if row.get(column) is not None:
            row[column] = sweeps[column].iloc[0].item()
    sizes = layers[list(_SIZES)].to_dict("records")
    layers = [old | new for old, new in zip(record["layers"], sizes, strict=True)]
    return record | {"row": row, "layers": layers}


def _recounted_layers(layers: pd.DataFrame, of: pd.Series) -> pd.DataFrame:
    """The layers with those that a mask says counted anew."""
    rank, outputs = layers["rank"], layers["out_features"]
    names = pd.Series([*map(set_bytes, rank, outputs)], index=layers.index)
    sizes = {
        "parameters_kept": layers["parameters_kept"] - rank**2,
        "bytes_stored": layers["bytes_stored"] - BYTES_PER_VALUE * rank**2 + names,
    }
    # At rank 0 columns of the first factor, which nothing read, were counted.
    return layers.assign(
        **{
            column: layers[column].where(~of, size.where(rank > 0, 0))
            for column, size in sizes.items()
        }
    )


def _might_shrink(layer) -> bool:
    """Whether a layer was kept dense at ranks at which it would be low-rank today."""
    if layer.form != "dense" or layer.method not in _LOW_RANK:
        return False
    shorter = min(layer.in_features, layer.out_features)
    longer = layer.parameters_kept / shorter  # of the sides that are left
    return math.ceil(shorter * longer / (shorter + longer)) < shorter


def _check_sums(sweeps: pd.DataFrame, layers: pd.DataFrame) -> None:
    sums = layers.groupby("run")["parameters_kept"].sum()
    off = sweeps.loc[sweeps["run"].map(sums) != sweeps["parameters_kept"], "run"]
    if len(off):
        raise ValueError(
            f"the layers of run {off.iloc[0]} do not add up to its parameters_kept; all of its "
            "layers must be in layers.csv, as experiments.collect writes them"
        )
