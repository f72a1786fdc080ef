"""Where the configuration lies, and how a node of it becomes an object."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG_PATH = str(REPOSITORY / "conf")

# Default paths hang on the repository, not on the folder a command is started in.
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)


def build(node: DictConfig, **arguments):
    """Call a node's ``_target_`` with its other entries and `arguments`.

    Left out are ``name``, which identifies the choice in records and tables, and ``training``, a
    model's recipe.
    """
    own = {key: value for key, value in node.items() if key not in ("name", "training")}
    return instantiate(own, **arguments)
