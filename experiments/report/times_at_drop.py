"""What a forward pass takes at an equal drop of accuracy: the faster form of each method."""

import pandas as pd

from experiments.report.outcomes import TargetOutcome
from experiments.report.tables import METHOD_TITLES
from experiments.report.variants import OURS, is_baseline

_OF_SEED = ["dataset", "model", "largest_drop", "batch", "method", "seed"]
_OVER_SEEDS = _OF_SEED[:-1]


def over_seeds(times: pd.DataFrame) -> pd.DataFrame:
    """The speed-up over the dense layers by network, drop, batch and method: mean, low and high.

    Of each seed that of the faster one of the forms. Methods that lack a seed of their network at a
    drop are left out.
    """
    fastest = times.loc[times.groupby(_OF_SEED)["microseconds"].idxmin()]
    table = fastest.groupby(_OVER_SEEDS).agg(
        seeds=("seed", "nunique"),
        microseconds=("microseconds", "mean"),
        speedup=("speedup", "mean"),
        low=("speedup", "min"),
        high=("speedup", "max"),
    )
    table = table.reset_index()
    return table[table["seeds"] == table.groupby("model")["seeds"].transform("max")]


def fastest_is_ours(times: pd.DataFrame, model: str, drop: float, batch: int) -> TargetOutcome:
    """At a drop and batch the fastest network, mean over seeds, is one of ours."""
    table = over_seeds(times)
    here = (table["model"] == model) & (table["largest_drop"] == drop) & (table["batch"] == batch)
    table = table[here]
    ours, others = table[table["method"].isin(OURS)], table[is_baseline(table)]
    if not len(ours) or not len(others):
        return TargetOutcome()
    best, rival = (rows.loc[rows["microseconds"].idxmin()] for rows in (ours, others))
    return TargetOutcome(
        bool(best["microseconds"] < rival["microseconds"]),
        f"{_words(best)}; fastest baseline {_words(rival)}",
    )


def _words(row: pd.Series) -> str:
    return (
        f"{row['microseconds']:.0f} microseconds, {row['speedup']:.1f} times as fast as dense "
        f"({METHOD_TITLES.get(row['method'], row['method'])})"
    )
