"""Where the configuration lies, what its values can hang on, and how a node becomes an object."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG_PATH = str(REPOSITORY / "conf")


class SettingError(ValueError):
    """A setting that no run can have; one line with its key, its value and what would be right."""


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


# What a node `goal` has beside goals.
_HOW_GOALS_ARE_SOUGHT = (
    "tolerances",
    "largest_layer",
    "trials",
    "trial_sizes",
    "allocation",
)


def given_goals(goal: Mapping | None) -> dict:
    """The goals of a config's node `goal` that are set, by their names."""
    return {
        name: wanted
        for name, wanted in (goal or {}).items()
        if name not in _HOW_GOALS_ARE_SOUGHT and wanted is not None
    }


def _without_goal(value, *, _root_: DictConfig):
    """A default that a run with a goal does not have: null there."""
    return None if given_goals(OmegaConf.select(_root_, "goal")) else value


def _training_samples_up_to(most: int, dataset: str, held_out: int) -> int:
    """So many training samples, or all where a data set has fewer beside those held out."""
    # Imported here: most commands have no need of torch.
    from experiments.data import training_samples

    try:
        return min(most, training_samples(dataset, held_out))
    except ValueError:  # of the data set, which is refused by its own name
        return most


def _outcomes(sweep_dir: str) -> str:
    return str(Path(sweep_dir).absolute() / "outcomes" / uuid.uuid4().hex)


# Default paths hang on the repository, not on the folder a command is started in.
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)
OmegaConf.register_new_resolver("cores", cores, replace=True)
# That of the process which started a sweep, in all its jobs: Hydra hands them the cache.
OmegaConf.register_new_resolver("process", os.getpid, use_cache=True, replace=True)
# A sweep's own folder, likewise: another sweep in the same place has another one.
OmegaConf.register_new_resolver("outcomes", _outcomes, use_cache=True, replace=True)
OmegaConf.register_new_resolver("without_goal", _without_goal, replace=True)
OmegaConf.register_new_resolver("training_samples_up_to", _training_samples_up_to, replace=True)
OmegaConf.register_new_resolver("cores_each", lambda jobs: max(1, cores() // jobs), replace=True)


def build(node: DictConfig, **arguments):
    """Call a node's ``_target_`` with its other entries and `arguments`.

    Left out are ``name``, which identifies the choice in records and tables, and ``training``, a
    model's recipe.
    """
    own = {key: value for key, value in node.items() if key not in ("name", "training")}
    # Called here: Hydra would make configs of arguments that are dataclasses, and wrap errors.
    return instantiate(own, _partial_=True)(**arguments)
