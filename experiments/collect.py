"""Turn records into tables: ``python -m experiments.collect``.

A row replaces the row of the same run that a table already has; all other rows stay. From the
whole table follow `sizes.csv`, the smallest network of each method within a drop of accuracy on
held-out samples, and, where it was run, `ablation.csv`, what each step towards the fewest weights
brings. Without records they follow from `sweeps.csv` as it is.
"""

import logging
from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.report.ablation import ablation_sizes
from experiments.report.tables import (
    FRACTIONS,
    GROUP,
    SETTING,
    read_table,
    with_all_seeds,
    with_choices,
    write_table,
)
from experiments.runs.records import read_records

log = logging.getLogger(__name__)

ACCURACY_DROPS = (0.5, 1.0)
_RUN = [*SETTING, "seed"]
_ORDER = [*_RUN, "run"]


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="collect")
def main(cfg: DictConfig) -> None:
    results = Path(cfg.results_dir)
    records = read_records(Path(cfg.record_dir))
    failed = [record for record in records if record["state"] != "finished"]
    if failed:
        log.warning(
            "%d of %d runs failed and are left out of the tables: %s",
            len(failed),
            len(records),
            ", ".join(record["name"] for record in failed),
        )
    finished = [record for record in records if record["state"] == "finished"]
    if finished:
        merge(results / "sweeps.csv", pd.DataFrame([record["row"] for record in finished]))
        layers = [layer for record in finished for layer in record["layers"]]
        merge(results / "layers.csv", pd.DataFrame(layers))
    elif not (results / "sweeps.csv").is_file():
        log.warning(
            "%s holds no finished record; make one with python -m experiments.compress",
            cfg.record_dir,
        )
        return
    sweeps = read_table(results / "sweeps.csv")
    tables = {"sizes": smallest_sizes(sweeps), "ablation": ablation_sizes(sweeps, ACCURACY_DROPS)}
    for name, table in tables.items():
        if name == "sizes" or len(table):
            write_table(results / f"{name}.csv", table)
            log.info("%s: %d rows", results / f"{name}.csv", len(table))


def merge(path: Path, rows: pd.DataFrame) -> None:
    """Put rows into a table, in place of those with the same `run`, and write it in one step."""
    added = rows["run"].nunique()
    # A column of None alone would make objects of the numbers that it is put below.
    rows = rows.where(rows.notna(), float("nan")).infer_objects()
    if path.is_file():
        earlier = pd.read_csv(path, dtype={"run": str})
        rows = pd.concat([earlier[~earlier["run"].isin(rows["run"])], rows], ignore_index=True)
    if "calibration_samples" in rows:
        rows = with_choices(rows)
    # Stable, so that the layers of a run keep the order of the network.
    rows = rows.sort_values([key for key in _ORDER if key in rows], kind="stable")
    if set(_RUN) <= set(rows):
        _warn_of_mixed(rows)
    write_table(path, rows)
    log.info("%s: %d rows, of %d runs from the records", path, len(rows), added)


def _warn_of_mixed(sweeps: pd.DataFrame) -> None:
    """Name the runs that differ in nothing that the tables hold, so that means would mix them."""
    mixed = sweeps[sweeps.duplicated(_RUN, keep=False)]
    if len(mixed):
        log.warning(
            "%d runs are the same as another in all that the tables hold (they differ in another "
            "option, the tolerances of a goal, or the network's file); means over seeds mix them, "
            "so keep them in results folders of their own: %s",
            len(mixed),
            ", ".join(mixed["run"]),
        )


def smallest_sizes(sweeps: pd.DataFrame) -> pd.DataFrame:
    """The least that must be kept for a drop of accuracy of at most 0.5 and 1.0 points.

    The tolerance, or the value of another goal, is chosen on held-out samples: of those at which
    the drop there, mean over seeds, is within `largest_drop`, the one that keeps the smallest
    fraction, mean over seeds. What the choice costs on the test set is reported beside it. Settings
    that lack a seed of their network are left out; each number of calibration samples is a group of
    its own.

    Parameters
    ----------
    sweeps : DataFrame
        `sweeps.csv` as `experiments.report.tables.read_table` gives it.

    Returns
    -------
    DataFrame
        For each group, `largest_drop` and what is `counted` (weights or bytes): the value `wanted`
        that was chosen, the number of `seeds`, `fraction` kept of the dense layers with its least
        and largest over seeds, `accuracy_drop_held_out`, and `accuracy_drop` on the test set with
        its least and largest; drops in points. Where no value keeps the drop, there is no row.
    """
    settings = with_all_seeds(sweeps).groupby(SETTING)
    tables = [
        _smallest(_over_seeds(settings, column), drop).assign(counted=counted, largest_drop=drop)
        for drop in ACCURACY_DROPS
        for counted, column in FRACTIONS.items()
    ]
    key = [*GROUP, "largest_drop", "counted"]
    table = pd.concat(tables).sort_values(key)
    return table[key + [column for column in table if column not in key]].round(6)


def _over_seeds(settings, column: str) -> pd.DataFrame:
    return settings.agg(
        seeds=("seed", "nunique"),
        fraction=(column, "mean"),
        fraction_min=(column, "min"),
        fraction_max=(column, "max"),
        accuracy_drop_held_out=("accuracy_drop_held_out", "mean"),
        accuracy_drop=("accuracy_drop", "mean"),
        accuracy_drop_min=("accuracy_drop", "min"),
        accuracy_drop_max=("accuracy_drop", "max"),
    ).reset_index()


def _smallest(table: pd.DataFrame, drop: float) -> pd.DataFrame:
    within = table[table["accuracy_drop_held_out"] <= drop]
    return within.loc[within.groupby(GROUP)["fraction"].idxmin()]


if __name__ == "__main__":
    main()
