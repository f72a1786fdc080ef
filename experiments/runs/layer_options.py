"""What each layer of a network, alone, has to offer to a goal: kept for all runs with goals."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from ddlr.goals import Option
from experiments.methods.configured import layer_refit
from experiments.runs.locking import locked
from experiments.runs.preparation import content_key
from experiments.runs.records import identity
from experiments.runs.storage import entry_lock, entry_path, load_json, store_json

# To be raised when the content of an entry, or how it is computed, changes.
_FORMAT = 7


def remembered_options(
    cfg: DictConfig, device: torch.device, compute: Callable[[], dict[str, list[Option]]]
) -> dict[str, list[Option]]:
    """The sizes and effects of each layer alone, computed once for all goals of a method."""
    if not cfg.cache.enabled:
        return compute()
    folder = Path(cfg.cache_dir)
    key = _options_key(cfg, device)
    path = entry_path(folder, key, ".json")
    with locked(entry_lock(folder, key)):
        options = load_json(path, _decoded)
        if options is None:
            options = compute()
            content = {name: [asdict(each) for each in options[name]] for name in options}
            store_json(path, content, cfg.cache.limit_gib)
    return options


def _decoded(content: dict) -> dict[str, list[Option]]:
    return {name: [Option(**each) for each in content[name]] for name in content}


def _options_key(cfg: DictConfig, device: torch.device) -> str:
    method = OmegaConf.to_container(cfg.method, resolve=True)
    # Layers are tried one by one, with the refit that each can have alone.
    method.pop("relative_tolerance")
    method.pop("order", None)
    method |= {"refit": layer_refit(cfg.method)}
    about = {"of": content_key(cfg, device), "method": method}
    about |= {"tolerances": OmegaConf.to_container(cfg.goal).get("tolerances")}
    if cfg.goal.get("largest_layer") is not None:
        about |= {"largest_layer": cfg.goal.largest_layer}
    return identity({**about, "format": _FORMAT})
