"""What runs have left on disk for others: activations, eigenvectors, solves of layers.

python -m experiments.cache             # what is in it
python -m experiments.cache clear=true  # remove it
"""

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.configuration import CONFIG_PATH
from experiments.runs.storage import GIB, entries

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="cache")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.cache_dir)
    kept = entries(folder)
    size = sum(about.st_size for _, about in kept) / GIB
    if cfg["clear"]:  # an attribute of that name is a method
        for path, _ in kept:
            path.unlink(missing_ok=True)
        log.info("removed %d entries, %.2f GiB, from %s", len(kept), size, folder)
        return
    log.info("%s: %d entries, %.2f GiB; clear=true removes them", folder, len(kept), size)


if __name__ == "__main__":
    main()
