"""Train a network and keep it: ``python -m experiments.train_baseline model=lenet5 seed=0``.

Interrupted, the same command goes on from the last whole epoch.
"""

import logging
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.configuration import CONFIG_PATH, build
from experiments.metrics import accuracy
from experiments.runs.checkpoints import checkpoint_path, save_checkpoint
from experiments.runs.records import identity, provenance
from experiments.training import choose_device, train

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="train_baseline")
def main(cfg: DictConfig) -> None:
    path = checkpoint_path(cfg.checkpoint_dir, cfg.model.name, cfg.dataset.name, cfg.seed)
    if path.is_file() and not cfg.overwrite:
        log.info("%s is there already; overwrite=true trains it again", path)
        return
    dataset = instantiate(cfg.dataset)
    torch.manual_seed(cfg.seed)
    network = build(cfg.model)
    train(
        network,
        dataset,
        **cfg.model.training,
        seed=cfg.seed,
        device=choose_device(cfg.device),
        resume=_unfinished(cfg),
    )
    measured = {
        "test": accuracy(network, dataset.test),
        "held_out": accuracy(network, dataset.held_out),
    }
    save_checkpoint(
        path,
        network,
        {
            "model": cfg.model.name,
            "dataset": cfg.dataset.name,
            "seed": cfg.seed,
            "accuracy": measured,
            "config": {
                "model": OmegaConf.to_container(cfg.model, resolve=True),
                "dataset": {"name": cfg.dataset.name, "held_out": cfg.dataset.held_out},
            },
            "data_sha256": dataset.sha256,
            "provenance": provenance(),
        },
    )
    log.info("%s: test accuracy %.2f %%, held-out %.2f %%", path, *measured.values())


def _unfinished(cfg: DictConfig) -> Path:
    """Where the training that this config describes keeps its state."""
    model = OmegaConf.to_container(cfg.model, resolve=True)
    key = identity({"model": model, "dataset": cfg.dataset.name, "seed": cfg.seed})
    return Path(cfg.output_dir) / "training" / f"{cfg.model.name}_{key}.pt"


if __name__ == "__main__":
    main()
