"""Carry runs over from former code: ``python -m experiments.migrate``.

Names, and then sizes, which `experiments.runs.recounting` describes. Until they had the names they
have now, a run's identity hung on where the code of its method lies, and `refit=layer` was called
"fixed", `constraint=nettrim` "net_trim". Both identities follow from a run's settings. For each run
that `conf/paper.yaml` or the demo plans, and for some that the tables have beside these, rows of
the tables and records that have the former identity get the present one. Nothing else in them
changes but those two words, nor does their order. What was carried over already, and what is of no
such run, stays as it is.
"""

import csv
import json
import logging
import shlex
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.data import data_sha256
from experiments.runs.records import (
    ONE_TOLERANCE,
    USUAL_CASCADE_BOUND,
    USUAL_RIDGE,
    file_sha256,
    identity,
    write_json,
    write_whole,
)
from experiments.runs.recounting import recount_tables, recounted_record
from experiments.runs.units import FINISHED, choices, network_path, read_record, run_key
from experiments.status import planned

log = logging.getLogger(__name__)

TABLES = ("sweeps.csv", "layers.csv")
_BESIDE_THE_PAPER = (
    "suite=demo",
    "suite=demo method=activation_svd method.refit=none",
    # Rows that show why CIFAR-10 has 20 000 samples.
    "networks=cifar10 suite=goals method=fewest_weights method.ridge=0.01 calibration_samples=5000 "
    "goal.kept_fraction=0.02,0.03,0.05 goal.tolerances=[0.05,0.08,0.12,0.2,0.3,0.5]",
)

# Column to its former words and the present ones.
_RENAMED = {"refit": {"fixed": "layer"}, "constraint": {"net_trim": "nettrim"}}

# What follows describes former configs. It stays as it is, whatever becomes of conf/method.
_SOLVER = {"tolerance": 1e-2, "max_iterations": 5000, "raise_on_failure": False}
_FORMER_METHODS = {
    "ddlr": {"_target_": "ddlr.compress", **_SOLVER},
    "nettrim": {"_target_": "nettrim.prune", "penalise_bias": False, **_SOLVER},
    "nettrim_protocol": {"_target_": "nettrim.prune", "penalise_bias": True, **_SOLVER},
    **{
        name: {"_target_": "ddlr.compress", "method": name, "raise_on_failure": False}
        for name in ("lowest_rank", "fewest_weights")
    },
    **{
        name: {"_target_": f"experiments.baselines.{name}"}
        for name in (
            *("svd", "activation_svd", "activation_svd_selected"),
            *("magnitude", "magnitude_global"),
        )
    },
}
# Which of the choices a method had.
_CONVEX = ("ddlr", "nettrim", "nettrim_protocol")
_WITH_CHOICE = {
    "constraint": _CONVEX,
    "order": (*_CONVEX, "lowest_rank", "fewest_weights"),
    "refit": tuple(_FORMER_METHODS),
}
_FORMER_DROPOUT = {"fc_nettrim": 0.5, "convnet_nettrim": 0.5, "vgg_small": 0.5}


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="paper")
def main(cfg: DictConfig) -> None:
    GlobalHydra.instance().clear()  # it composes for one command at a time; this one's is done
    keys = {}
    for experiment in (*cfg.experiments, *_BESIDE_THE_PAPER):
        runs = planned([*shlex.split(experiment), f"checkpoint_dir={cfg.checkpoint_dir}"])
        keys |= {former_key(run): run_key(run) for run in runs}
        log.info("%s: %d runs", experiment, len(runs))
    for name in TABLES:
        path = Path(cfg.results_dir) / name
        if path.is_file():
            carried, already, others = carry_table(path, keys)
            log.info(
                "%s: %d runs carried over, %d had been, %d are of other experiments",
                path,
                carried,
                already,
                others,
            )
    folder = Path(cfg.record_dir)
    records = [carry_record(folder, old, new) for old, new in keys.items()]
    log.info("%s: %d records carried over", folder, sum(records))
    log.info("%s: %d runs counted anew", cfg.results_dir, recount_tables(Path(cfg.results_dir)))
    for path in sorted(folder.glob("*.json")):
        write_json(path, recounted_record(json.loads(path.read_text(encoding="utf-8"))))


def former_key(cfg: DictConfig) -> str:
    """The identity that a run of today had."""
    path = network_path(cfg)
    return identity(
        {
            "config": _former_settings(cfg),
            "checkpoint": file_sha256(path) if path.is_file() else None,
            "data": data_sha256(cfg.dataset.name),
        }
    )


def _former_settings(cfg: DictConfig) -> dict:
    chosen = choices(cfg)
    method, model = chosen["method"], chosen["model"]
    node = {"name": method, **_FORMER_METHODS[method]}
    for choice, methods in _WITH_CHOICE.items():
        if method in methods:
            former = {new: old for old, new in _RENAMED.get(choice, {}).items()}
            node[choice] = former.get(chosen[choice], chosen[choice])
    if chosen["ridge"] != USUAL_RIDGE:
        node["ridge"] = float(chosen["ridge"])
    if chosen["cascade_bound"] != USUAL_CASCADE_BOUND:
        node["cascade_bound"] = chosen["cascade_bound"]
    settings = {
        "dataset": {
            "_target_": "experiments.data.load_dataset",
            "name": chosen["dataset"],
            "held_out": cfg.dataset.held_out,
        },
        "model": {"_target_": f"experiments.networks.{model}", "name": model},
        "method": node,
        "seed": chosen["seed"],
        "calibration_samples": chosen["calibration_samples"],
    }
    if model in _FORMER_DROPOUT:
        settings["model"]["dropout"] = _FORMER_DROPOUT[model]
    if chosen["goal"] == ONE_TOLERANCE:
        node["relative_tolerance"] = chosen["wanted"]
    else:
        settings["goal"] = {chosen["goal"]: chosen["wanted"]}
        if cfg.goal.tolerances is not None:
            settings["goal"]["tolerances"] = list(cfg.goal.tolerances)
    return settings


def carry_table(path: Path, keys: dict[str, str]) -> tuple[int, int, int]:
    """Give the rows of a table their present names, in one step; other cells stay as written.

    A run that the table has under both names keeps the rows under the present one.

    Parameters
    ----------
    path : path
        A table with a column `run`.
    keys : dict
        Former identity to present one.

    Returns
    -------
    carried, already, others : int
        Runs that were carried over, that had their present name, and that `keys` lacks.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        columns, *rows = csv.reader(stream)
    at_run = columns.index("run")
    before = {row[at_run] for row in rows}
    rows = [row for row in rows if keys.get(row[at_run]) not in before]
    found = {row[at_run] for row in rows}
    for row in rows:
        row[at_run] = keys.get(row[at_run], row[at_run])
        for column, words in _RENAMED.items():
            place = columns.index(column)
            row[place] = words.get(row[place], row[place])

    def write(scratch: Path) -> None:
        with scratch.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([columns, *rows])

    write_whole(path, write)
    carried, already = len(found & keys.keys()), len(found & set(keys.values()))
    return carried, already, len(found) - carried - already


def carry_record(folder: Path, old: str, new: str) -> bool:
    """Give a run's record its present name; one that finished under that name is kept instead."""
    former, present = folder / f"{old}.json", folder / f"{new}.json"
    if not former.is_file():
        return False
    record = json.loads(former.read_text(encoding="utf-8"))
    rows = [record["row"], *record["layers"]] if "row" in record else []  # none if it failed
    for row in rows:
        row["run"] = new
        for column, words in _RENAMED.items():
            row[column] = words.get(row[column], row[column])
    done = read_record(present)
    if done is None or done["state"] != FINISHED:
        write_json(present, record)
    former.unlink()
    return True


if __name__ == "__main__":
    main()
