"""Where the configuration lies, and how a node of it becomes an object."""

import os
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG_PATH = str(REPOSITORY / "conf")


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


# Default paths hang on the repository, not on the folder a command is started in.
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)
OmegaConf.register_new_resolver("cores", cores, replace=True)
# That of the process which started a sweep, in all its jobs: Hydra hands them the cache.
OmegaConf.register_new_resolver("process", os.getpid, use_cache=True, replace=True)
OmegaConf.register_new_resolver("cores_each", lambda jobs: max(1, cores() // jobs), replace=True)


def build(node: DictConfig, **arguments):
    """Call a node's ``_target_`` with its other entries and `arguments`.

    Left out are ``name``, which identifies the choice in records and tables, and ``training``, a
    model's recipe.
    """
    own = {key: value for key, value in node.items() if key not in ("name", "training")}
    # Called here: Hydra would make configs of arguments that are dataclasses, and wrap errors.
    return instantiate(own, _partial_=True)(**arguments)
