"""Fine-tune pruned networks with labels: ``python -m experiments.finetune``.

Not a method of the comparison, in which nobody uses labels, but an experiment on how far published
accuracies can be explained by it. The networks are those of `experiments.compress`; what is zero in
a compressed layer stays zero. Writes `results/finetune.csv`, with the columns of `sweeps.csv` that
apply, `refit` being "finetuned".
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import hydra
import pandas as pd
import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.configuration import CONFIG_PATH
from experiments.methods.configured import compress_as_configured
from experiments.metrics import accuracy, size_measures
from experiments.networks import split_at_first_linear
from experiments.report.tables import write_table
from experiments.runs.preparation import load_network, prepare
from experiments.runs.solves import DiskSolveCache
from experiments.runs.units import choices, describe
from experiments.training import choose_device, train

log = logging.getLogger(__name__)

_PATHS = ("data_dir", "checkpoint_dir", "cache_dir")


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="finetune")
def main(cfg: DictConfig) -> None:
    path = Path(cfg.results_dir) / "finetune.csv"
    table = pd.DataFrame([finetuned(run, cfg) for run in runs(cfg)])
    write_table(path, table)
    log.info("%s:\n%s", path, table.to_string(index=False))


def runs(cfg: DictConfig) -> Iterator[DictConfig]:
    """The runs of `experiments.compress` whose networks are fine-tuned."""
    paths = {key: cfg[key] for key in _PATHS}
    for seed in cfg.seeds:
        for tolerance in cfg.relative_tolerances:
            own = {
                **{group: cfg[group].name for group in ("dataset", "model", "method")},
                "method.relative_tolerance": tolerance,
                "seed": seed,
                "calibration_samples": cfg.calibration_samples,
            }
            run = compose("compress", overrides=[f"{key}={value}" for key, value in own.items()])
            yield OmegaConf.merge(run, paths)


def finetuned(run: DictConfig, cfg: DictConfig) -> dict:
    """Compress a network as a run says, train what is left, and measure it before and after."""
    device = choose_device(cfg.device)
    prepared = prepare(run, device)
    cache = DiskSolveCache(Path(run.cache_dir), run.cache.limit_gib)
    compressed = compress_as_configured(
        run.method, prepared.network, prepared.captured, solve_cache=cache
    ).model
    names = [layer.name for layer in prepared.captured.layers]
    before, _ = split_at_first_linear(load_network(run, device)[0])
    whole = nn.Sequential(before, compressed)
    dataset = instantiate(run.dataset)
    pruned = accuracy(whole, dataset.test)
    for name in names:
        _hold_zeros(compressed.get_submodule(name).weight)
    for module in whole.modules():
        if isinstance(module, nn.Dropout):
            module.p = cfg.dropout
    torch.manual_seed(run.seed)
    train(whole, dataset, **cfg.training, seed=run.seed, device=device)
    log.info("%s: fine-tuned", describe(run))
    after = accuracy(whole, dataset.test)
    return {
        **choices(run),
        "refit": "finetuned",
        **size_measures(prepared.network, compressed, names),
        "epochs": cfg.training.epochs,
        "accuracy_dense": prepared.judged.accuracy,
        "accuracy_pruned": pruned,
        "accuracy": after,
        "accuracy_drop": prepared.judged.accuracy - after,
    }


def _hold_zeros(weight: nn.Parameter) -> None:
    """Keep at zero what is zero now: without a gradient, Adam and its decay leave it there."""
    kept = weight.detach() != 0
    weight.register_hook(lambda gradient: gradient * kept)


if __name__ == "__main__":
    main()
