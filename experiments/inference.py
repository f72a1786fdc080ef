"""Time compressed networks as they are deployed: ``python -m experiments.inference``.

Writes `results/inference.csv`; rows of other networks, methods and engines stay in it. Each
method's smallest network within a held-out drop of accuracy, as `experiments.compress` finds it, is
saved, loaded, and timed from its first fully connected layer on, beside the dense network: as it
comes out of the file (form "stored"), and with its layers fused by `ddlr.fuse_chains` (form
"fused").
"""

import logging
from pathlib import Path

import hydra
import pandas as pd
import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from ddlr import CompressionResult
from experiments.benchmarks.deployed import FORMS, Deployed, speedups, stored_file, times
from experiments.compress import network_goal
from experiments.configuration import CONFIG_PATH, SettingError
from experiments.methods.configured import compress_as_configured
from experiments.metrics import accuracy, size_measures
from experiments.runs.preparation import Prepared, prepare
from experiments.runs.records import write_whole
from experiments.runs.solves import DiskSolveCache
from experiments.runs.units import choices, describe

log = logging.getLogger(__name__)
for _exporter in ("onnxscript", "onnx_ir", "torch.onnx"):
    logging.getLogger(_exporter).setLevel(logging.WARNING)  # a line per step otherwise

_PATHS = ("data_dir", "checkpoint_dir", "cache_dir")
_CHOICES = ("dataset", "model", "method", "refit", "order", "seed", "calibration_samples")


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="inference")
def main(cfg: DictConfig) -> None:
    path = Path(cfg.results_dir) / "inference.csv"
    for network in cfg.heads:
        _replace(path, pd.DataFrame(timed(network, cfg)))  # now: the next network may take long
    log.info("%s:\n%s", path, pd.read_csv(path).to_string(index=False))


def _replace(path: Path, rows: pd.DataFrame) -> None:
    """Put rows into a table in the place of earlier ones of the same network, method and engine."""
    if path.is_file():
        before = pd.read_csv(path)
        known = ["dataset", "model", "method", "engine"]
        made = pd.MultiIndex.from_frame(rows[known])
        rows = pd.concat(
            [before[~pd.MultiIndex.from_frame(before[known]).isin(made)], rows], ignore_index=True
        )
    write_whole(path, lambda scratch: rows.to_csv(scratch, index=False, float_format="%.6g"))


def timed(network: DictConfig, cfg: DictConfig) -> list[dict]:
    """Compress a network by all methods, and time them and the dense one side by side.

    Rows of what the run is, accuracy_drop_held_out, kept_fraction, form, file_bytes,
    load_milliseconds (both also with _dense), multiplications (per sample: one for each weight that
    is kept), promised (the speed-up if time went by them), engine, threads, batch, microseconds,
    microseconds_dense (in the same rounds), speedup, and share_of_promise.
    """
    about: dict[str, dict] = {}
    deployed: list[Deployed] = []
    for method in cfg.methods:
        run = run_of(network, method, cfg)
        prepared = prepare(run, torch.device("cpu"))
        compressed = _compressed(run, prepared)
        if not deployed:
            dense, dense_file = stored_file(prepared.network)
            deployed.append(Deployed("dense", dense, prepared.network))
        loaded, file = stored_file(compressed.model)
        about[method] = {**_about(run, prepared, compressed), **file}
        about[method] |= {f"{key}_dense": value for key, value in dense_file.items()}
        for form, made in FORMS.items():
            deployed.append(Deployed(f"{method} {form}", made(loaded), compressed.model))
        log.info("%s: kept %.4f", describe(run), about[method]["kept_fraction"])
    inputs = prepared.captured.layers[0].inputs
    measured = pd.DataFrame(
        times(
            deployed,
            inputs[: max(cfg.batches)],
            batches=cfg.batches,
            threads=sorted(set(cfg.threads)),
            engines=cfg.engines,
            rounds=cfg.rounds,
            seconds=cfg.seconds,
        )
    )
    log.info("%s: timed", network.model)
    return [
        {**row, "share_of_promise": row["speedup"] / row["promised"]}
        for row in speedups(measured, about)
    ]


def run_of(network: DictConfig, method: str, cfg: DictConfig) -> DictConfig:
    """The run of `experiments.compress` whose network is timed, as its config.

    Raises
    ------
    SettingError
        If `settings` has nothing on the method for the data set; names both.
    """
    settings = OmegaConf.select(cfg, f"settings.{network.dataset}.{method}")
    if settings is None:
        raise SettingError(
            f"settings has no {network.dataset}.{method}; say there what `experiments.compress` is "
            "told, as calibration_samples and goal.tolerances"
        )
    chosen = {"dataset": network.dataset, "model": network.model, "method": method}
    chosen |= {"seed": cfg.seed, "goal.max_accuracy_drop": cfg.max_accuracy_drop}
    run = compose("compress", overrides=[f"{key}={value}" for key, value in chosen.items()])
    with open_dict(run):
        return OmegaConf.merge(run, settings, {key: cfg[key] for key in _PATHS})


def _compressed(run: DictConfig, prepared: Prepared) -> CompressionResult:
    cache = DiskSolveCache(Path(run.cache_dir), run.cache.limit_gib) if run.cache.enabled else None
    goal = network_goal(run, prepared, cache, torch.device("cpu"))
    return compress_as_configured(
        run.method, prepared.network, prepared.captured, goal=goal, solve_cache=cache
    )


def _about(run: DictConfig, prepared: Prepared, compressed: CompressionResult) -> dict:
    names = [report.name for report in compressed.layers]
    sizes = size_measures(prepared.network, compressed.model, names)
    held_out = prepared.judged.held_out
    drop = prepared.judged.accuracy_held_out - accuracy(compressed.model, held_out)
    chosen = choices(run)
    return {
        **{name: chosen[name] for name in _CHOICES},
        "accuracy_drop_held_out": drop,
        "layers": "+".join(report.form for report in compressed.layers),
        "kept_fraction": sizes["kept_fraction"],
        "multiplications": sizes["parameters_kept"],
        "multiplications_dense": sizes["parameters_dense"],
        "promised": sizes["parameters_dense"] / max(1, sizes["parameters_kept"]),
    }


if __name__ == "__main__":
    main()
