"""Time each method's smallest network within a drop: ``python -m experiments.times_at_drop``.

Writes `results/times_at_drop.csv`. Of the runs of `conf/paper.yaml` in `results/sweeps.csv`, the
network with the fewest weights of each method, network and seed is made again, without a refit of
the network as a whole, saved, loaded, and timed from its first fully connected layer on: as stored,
and with its layers fused. All networks of one seed are timed side by side with the dense one.

A network with a tolerance for each layer is made from those in `results/layers.csv`, without the
search that found them. It is sought again where they do not stand there, or where the number of
weights differs by more than 2 per cent; searches for a size end within one.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import hydra
import pandas as pd
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from ddlr import CompressionResult
from ddlr.goals import kept_weights
from experiments.benchmarks.deployed import FORMS, Deployed, speedups, stored_file, times
from experiments.compress import compressed_as_configured
from experiments.configuration import CONFIG_PATH
from experiments.paper import runs_of_paper
from experiments.report.tables import read_table, with_all_seeds, write_table
from experiments.report.variants import LAYER_REFITS
from experiments.runs.preparation import Prepared, prepare
from experiments.runs.records import ONE_TOLERANCE
from experiments.runs.units import describe, goal_of

log = logging.getLogger(__name__)

_PATHS = ("data_dir", "checkpoint_dir", "cache_dir")
_NETWORK = ["dataset", "model", "seed"]
_SAME = 0.02
_FACTS = (*_NETWORK, "method", "run", "accuracy_drop_held_out", "kept_fraction")


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="times_at_drop")
def main(cfg: DictConfig) -> None:
    path = Path(cfg.results_dir) / "times_at_drop.csv"
    GlobalHydra.instance().clear()  # it composes for one command at a time; this one's is done
    sweeps = with_all_seeds(read_table(Path(cfg.results_dir) / "sweeps.csv"))
    layers = read_table(Path(cfg.results_dir) / "layers.csv")
    if cfg.models is not None:
        sweeps = sweeps[sweeps["model"].isin(cfg.models)]
    for chosen in smallest_networks(sweeps, list(cfg.drops)):
        earlier = read_table(path) if path.is_file() else pd.DataFrame(columns=["run"])
        if not cfg.rerun and set(chosen["run"]) <= set(_of_same(earlier, chosen)["run"]):
            continue
        rows = pd.DataFrame(timed(chosen, layers, cfg))
        others = earlier.drop(_of_same(earlier, chosen).index)
        write_table(path, pd.concat([others, rows], ignore_index=True))  # the next may take long
    log.info("%s is up to date", path)


def smallest_networks(sweeps: pd.DataFrame, drops: list[float]) -> Iterator[pd.DataFrame]:
    """For each network, seed and drop: the smallest run of each method within it, held out."""
    sweeps = sweeps[sweeps["refit"].isin(LAYER_REFITS)]
    for _, rows in sweeps.groupby(_NETWORK):
        for drop in drops:
            within = rows[rows["accuracy_drop_held_out"] <= drop]
            if len(within):
                smallest = within.groupby("method")["kept_fraction"].idxmin()
                yield within.loc[smallest].assign(largest_drop=drop)


def timed(chosen: pd.DataFrame, layers: pd.DataFrame, cfg: DictConfig) -> list[dict]:
    """The times of some runs of one network and seed, and of the dense one, side by side.

    `layers` has the tolerances of their layers.

    Rows of what the run is, form, engine, threads, batch, microseconds, microseconds_dense and
    speedup.
    """
    planned = runs_of_paper(chosen)
    about: dict[str, dict] = {}
    deployed: list[Deployed] = []
    for run in sorted(set(chosen["run"]) - set(planned)):
        log.warning("%s: no experiment of conf/paper.yaml makes this run", run)
    chosen = chosen[chosen["run"].isin(planned)]
    if chosen.empty:
        return []
    for row in chosen.to_dict("records"):
        run = planned[row["run"]]
        with open_dict(run):
            run = OmegaConf.merge(run, {key: cfg[key] for key in _PATHS})
        prepared = prepare(run, torch.device("cpu"))
        tolerances = layers[layers["run"] == row["run"]].set_index("layer")["relative_tolerance"]
        compressed = made_again(run, prepared, tolerances.to_dict(), row["parameters_kept"])
        if not deployed:
            deployed.append(Deployed("dense", stored_file(prepared.network)[0], prepared.network))
        loaded, _ = stored_file(compressed.model)
        about[row["method"]] = {key: row[key] for key in (*_FACTS, "largest_drop")}
        for form, made in FORMS.items():
            deployed.append(Deployed(f"{row['method']} {form}", made(loaded), compressed.model))
    inputs = prepared.captured.layers[0].inputs
    measured = times(
        deployed,
        inputs[: max(cfg.batches)],
        batches=cfg.batches,
        threads=[cfg.threads],
        engines=["torch"],
        rounds=cfg.rounds,
        seconds=cfg.seconds,
    )
    rows = list(speedups(pd.DataFrame(measured), about))
    first = chosen.iloc[0]
    log.info("%s, seed %d, %g points: timed", first["model"], first["seed"], first["largest_drop"])
    return rows


def made_again(
    cfg: DictConfig, prepared: Prepared, tolerances: Mapping[str, float], parameters: int
) -> CompressionResult:
    """The compressed network of a run, of which the tolerances and the weights kept are known."""
    device = torch.device("cpu")
    known = tolerances and not any(map(math.isnan, tolerances.values()))
    if goal_of(cfg)[0] == ONE_TOLERANCE or not known:
        return compressed_as_configured(cfg, prepared, device)
    compressed = compressed_as_configured(cfg, prepared, device, tolerances=tolerances)
    kept = kept_weights(compressed)
    if abs(kept - parameters) <= _SAME * parameters:
        return compressed
    log.info("%s is sought again: it has %d weights, not %d", describe(cfg), kept, parameters)
    return compressed_as_configured(cfg, prepared, device)


def _of_same(rows: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """The rows of the same network, seed and drop."""
    same = pd.Series(len(rows) > 0, index=rows.index)
    for key in (*_NETWORK, "largest_drop"):
        if key in rows:
            same &= rows[key] == chosen[key].iloc[0]
    return rows[same]


if __name__ == "__main__":
    main()
