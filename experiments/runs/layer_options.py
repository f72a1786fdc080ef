"""What each layer of a network, alone, has to offer to a goal: kept for all runs with goals."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from ddlr.goals import Allocation, Option
from experiments.methods.configured import layer_refit
from experiments.runs.locking import locked
from experiments.runs.preparation import content_key
from experiments.runs.records import identity
from experiments.runs.storage import entry_lock, entry_path, load_json, store_json

# To be raised when the content of an entry, or how it is computed, changes.
_FORMAT = 9


def remembered_options(
    cfg: DictConfig, device: torch.device, compute: Callable[[], dict[str, list[Option]]]
) -> dict[str, list[Option]]:
    """The sizes and effects of each layer alone, computed once for all goals of a method."""

    def encode(options: dict[str, list[Option]]) -> dict:
        return {name: [asdict(each) for each in options[name]] for name in options}

    def decode(content: dict) -> dict[str, list[Option]]:
        return {name: [Option(**each) for each in content[name]] for name in content}

    return _remembered(cfg, _about_options(cfg, device), compute, encode, decode)


def remembered_allocations(
    cfg: DictConfig, device: torch.device, compute: Callable[[], list[Allocation]]
) -> list[Allocation]:
    """The allocations whose networks were tried out, computed once for all goals of a method."""

    def encode(allocations: list[Allocation]) -> dict:
        return {"allocations": [asdict(each) for each in allocations]}

    def decode(content: dict) -> list[Allocation]:
        return [Allocation(**each) for each in content["allocations"]]

    goal = OmegaConf.to_container(cfg.goal)
    about = _about_options(cfg, device)
    about |= {key: goal[key] for key in ("trials", "trial_sizes", "allocation")}
    about |= {key: cfg.method.get(key) for key in ("order", "cascade_bound")}
    return _remembered(cfg, about, compute, encode, decode)


def _remembered(
    cfg: DictConfig, about: dict, compute: Callable, encode: Callable, decode: Callable
):
    if not cfg.cache.enabled:
        return compute()
    folder = Path(cfg.cache_dir)
    key = identity({**about, "format": _FORMAT})
    path = entry_path(folder, key, ".json")
    with locked(entry_lock(folder, key)):
        known = load_json(path, decode)
        if known is None:
            known = compute()
            store_json(path, encode(known), cfg.cache.limit_gib)
    return known


def _about_options(cfg: DictConfig, device: torch.device) -> dict:
    method = OmegaConf.to_container(cfg.method, resolve=True)
    # Layers are tried one by one, with the refit that each can have alone.
    method.pop("relative_tolerance")
    method.pop("order", None)
    method |= {"refit": layer_refit(cfg.method)}
    about = {"of": content_key(cfg, device), "method": method}
    about |= {"tolerances": OmegaConf.to_container(cfg.goal).get("tolerances")}
    if cfg.goal.get("largest_layer") is not None:
        about |= {"largest_layer": cfg.goal.largest_layer}
    return about
