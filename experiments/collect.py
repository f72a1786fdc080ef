"""Turn records into tables: ``python -m experiments.collect``.

A row replaces the row of the same run that a table already has; all other rows stay. From the
whole table follows `sizes.csv`: the smallest network of each method within a drop of accuracy.
"""

import logging
from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.records import read_records, write_whole

log = logging.getLogger(__name__)

ACCURACY_DROPS = (0.5, 1.0)
_ORDER = [
    "dataset",
    "model",
    "method",
    "constraint",
    "refit",
    "order",
    "calibration_samples",
    "relative_tolerance",
    "seed",
    "run",
]


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="collect")
def main(cfg: DictConfig) -> None:
    results = Path(cfg.results_dir)
    records = read_records(Path(cfg.record_dir))
    if not records:
        log.warning(
            "%s holds no record; make one with python -m experiments.compress", cfg.record_dir
        )
        return
    failed = [record for record in records if record["state"] != "finished"]
    if failed:
        log.warning(
            "%d of %d runs failed and are left out of the tables: %s",
            *(len(failed), len(records), ", ".join(record["name"] for record in failed)),
        )
    records = [record for record in records if record["state"] == "finished"]
    if not records:
        return
    merge(results / "sweeps.csv", pd.DataFrame([record["row"] for record in records]))
    layers = [layer for record in records for layer in record["layers"]]
    merge(results / "layers.csv", pd.DataFrame(layers))
    sizes = smallest_sizes(pd.read_csv(results / "sweeps.csv"))
    write_whole(results / "sizes.csv", lambda scratch: sizes.to_csv(scratch, index=False))
    log.info("%s:\n%s", results / "sizes.csv", sizes.to_string(index=False))


def merge(path: Path, rows: pd.DataFrame) -> None:
    """Put rows into a table, in place of those with the same `run`, and write it in one step."""
    added = rows["run"].nunique()
    if path.is_file():
        earlier = pd.read_csv(path)
        rows = pd.concat([earlier[~earlier["run"].isin(rows["run"])], rows], ignore_index=True)
    # Stable, so that the layers of a run keep the order of the network.
    rows = rows.sort_values([key for key in _ORDER if key in rows], kind="stable")
    write_whole(path, lambda scratch: rows.to_csv(scratch, index=False, float_format="%.8g"))
    log.info("%s: %d rows, of %d runs from the records", path, len(rows), added)


def smallest_sizes(sweeps: pd.DataFrame) -> pd.DataFrame:
    """The least that must be kept for a drop of test accuracy of at most 0.5 and 1.0 points.

    Sizes and drops are means over seeds; the setting in `relative_tolerance` is the smallest by
    weights. Where no setting keeps the drop, there is no row.
    """
    choice = ["dataset", "model", "method", "constraint", "refit", "order"]
    sweeps = sweeps.assign(bytes_fraction=sweeps["bytes_stored"] / sweeps["bytes_dense"])
    means = sweeps.groupby([*choice, "calibration_samples", "relative_tolerance"])[
        ["kept_fraction", "bytes_fraction", "accuracy_drop"]
    ].mean()
    tables = []
    for drop in ACCURACY_DROPS:
        within = means[means["accuracy_drop"] <= drop].reset_index()
        best = within.loc[within.groupby(choice)["kept_fraction"].idxmin()]
        least_bytes = within.groupby(choice)["bytes_fraction"].min().to_numpy()
        tables.append(best.assign(largest_drop=drop, bytes_fraction=least_bytes))
    columns = [*choice, "largest_drop", "kept_fraction", "bytes_fraction", "relative_tolerance"]
    return pd.concat(tables).sort_values([*choice, "largest_drop"])[columns].round(4)


if __name__ == "__main__":
    main()
