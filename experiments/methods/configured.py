"""What the node `method` of a config says: a method, its options, and how it goes over layers."""

import dataclasses
from collections.abc import Callable, Mapping

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

import ddlr
from ddlr import CompressionResult, Goal, LayerReport, NetworkRefit, Settings
from ddlr.captured import CapturedLayers
from ddlr.method import Method, SolveCache
from ddlr.walk import WalkSettings

# The other keys are options of the method itself.
OF_THE_WALK = ("relative_tolerance", "refit", "order", "cascade_bound", "raise_on_failure")


def method_of(node: DictConfig) -> Method:
    """The method, with its options."""
    own = {key: value for key, value in node.items() if key not in ("name", *OF_THE_WALK)}
    return instantiate(own, _partial_=True)()  # called here: Hydra would wrap its errors


def walk_of(
    node: DictConfig, *, workers: int = 1, solve_cache: SolveCache | None = None
) -> WalkSettings:
    """How each layer is compressed by itself, for `ddlr.allocate.layer_options`."""
    return WalkSettings(
        refit_layers=node.get("refit", "none") != "none",
        raise_on_failure=node.get("raise_on_failure", True),
        workers=workers,
        solve_cache=_cache_for(method_of(node), solve_cache),
    )


def whole_walk_of(
    node: DictConfig, *, workers: int = 1, solve_cache: SolveCache | None = None
) -> WalkSettings:
    """How layers are compressed one after the other, for `ddlr.goal_search.Networks`."""
    return dataclasses.replace(
        walk_of(node, workers=workers, solve_cache=solve_cache),
        order=node.get("order", "parallel"),
        refit_layers=layer_refit(node) == "layer",
        cascade_bound=node.get("cascade_bound", "tolerance"),
    )


def layer_refit(node: DictConfig) -> str:
    """The refit that moves no other layer: the method's own, also before that of the network."""
    asked = node.get("refit", "none") != "none"
    return "layer" if asked and method_of(node).refit is not None else "none"


def compress_as_configured(
    node: DictConfig,
    model: nn.Module,
    captured: CapturedLayers,
    *,
    goal: Goal | None = None,
    tolerances: Mapping[str, float] | None = None,
    workers: int = 1,
    solve_cache: SolveCache | None = None,
    network_refit: NetworkRefit | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> CompressionResult:
    """Compress a network of logits of classes as a config says, to a goal, or at given tolerances.

    Parameters and errors are those of `ddlr.compress_network`; `network_refit` is for a config that
    asks for such a refit.
    """
    method = method_of(node)
    if tolerances is None and goal is None:
        tolerances = node.relative_tolerance
    return ddlr.compress_network(
        model,
        captured,
        method,
        relative_tolerance=tolerances,
        goal=goal,
        refit=node.get("refit", "none"),
        order=node.get("order", "parallel"),
        output="classes",
        on_layer=on_layer,
        settings=Settings(
            cascade_bound=node.get("cascade_bound", "tolerance"),
            raise_on_failure=node.get("raise_on_failure", True),
            workers=workers,
            solve_cache=_cache_for(method, solve_cache),
            network_refit=network_refit,
        ),
    )


def _cache_for(method: Method, solve_cache: SolveCache | None) -> SolveCache | None:
    """None for a method whose runs share no solves: it is computed faster than it is read."""
    return solve_cache if len(method.orders) > 1 else None
