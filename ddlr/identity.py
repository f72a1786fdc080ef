"""Who holds a layer, who reads its weights, and how another one takes its place."""

import copy
import functools
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ddlr.trials import is_compiled

# Hooks that compute a layer's weight from others before each call. What takes the layer's place
# has the weight itself.
_WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_KINDS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_LEAF = type | types.FunctionType | types.BuiltinFunctionType | types.ModuleType
_PLAIN = str | bytes | int | float | complex | None


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model. Tensors with a graph, which can not be copied, lose it in the copy.

    Such are outputs that a module has kept from a training step, and weights that the older
    `weight_norm` and `torch.nn.utils.prune` compute anew in each pass.

    Raises
    ------
    ValueError
        If something else in the model can not be copied; names the module.
    """
    memo: dict[int, Any] = {}

    def seen(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
        elif isinstance(value, torch.Generator):
            memo[id(value)] = value.clone_state()
        return value

    _walk(model, seen)
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:
        raise ValueError(f"{_uncopied(model, memo)} can not be copied: {error}") from error


def _uncopied(model: nn.Module, memo: Mapping[int, Any]) -> str:
    """Which attribute of the model it is that can not be copied."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                return f"attribute {attribute!r} of {_called(name, module)}"
    return "the model"


def _called(name: str, module: nn.Module) -> str:
    return f"module {name!r}" if name else f"the model, a {type(module).__name__},"


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put one module in the place of another wherever a model holds it, and give it back.

    Under all its names, and in lists, dicts and other objects that modules keep.
    """
    if model is old:
        return new

    def swapped(value: Any) -> Any:
        if value is old:
            return new
        if isinstance(value, types.MethodType) and value.__self__ is old:
            return getattr(new, value.__name__, value)
        return value

    return _walk(model, swapped)


def _walk(root: Any, change: Callable[[Any], Any]) -> Any:
    """Pass everything that an object holds through a function, and put back what it returns.

    Goes through attributes and containers, but not into functions, classes and tensors: those are
    shared by a model and its copies.
    """
    # Objects are kept, so that no other one gets the same id.
    seen: dict[int, tuple[Any, Any]] = {}

    def visit(value: Any) -> Any:
        changed = change(value)
        if changed is not value or isinstance(value, _PLAIN | _LEAF | Tensor):
            return changed
        if id(value) not in seen:
            seen[id(value)] = value, value
            seen[id(value)] = value, inside(value)
        return seen[id(value)][1]

    def inside(value: Any) -> Any:
        if isinstance(value, dict):
            for key, one in list(value.items()):
                now = visit(one)
                if now is not one:
                    value[key] = now
        elif isinstance(value, list | deque):
            for index, one in enumerate(value):
                now = visit(one)
                if now is not one:
                    value[index] = now
        elif isinstance(value, set):
            for one in list(value):
                now = visit(one)
                if now is not one:
                    value.remove(one)
                    value.add(now)
        elif isinstance(value, tuple | frozenset):
            parts = [visit(one) for one in value]
            if any(now is not one for now, one in zip(parts, value, strict=True)):
                named = hasattr(value, "_fields")
                return type(value)(*parts) if named else type(value)(parts)
        elif isinstance(value, functools.partial):
            function, arguments = visit(value.func), visit(value.args)
            keywords = {name: visit(one) for name, one in value.keywords.items()}
            return type(value)(function, *arguments, **keywords)
        elif isinstance(value, types.MethodType):
            visit(value.__self__)
        elif hasattr(value, "__dict__"):
            visit(vars(value))
        return value

    return visit(root)


def inherit(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a layer the mode, the hooks and `requires_grad` of the one whose place it takes."""
    if new is old:
        return new
    for kind in _HOOKS:
        mine = vars(new)[kind]
        for key, hook in vars(old)[kind].items():
            if not isinstance(hook, _WEIGHT_HOOKS):
                mine[key] = hook
    for kind in _HOOK_KINDS:
        vars(new)[kind].update(vars(old)[kind])
    vars(new)["_is_full_backward_hook"] = vars(old)["_is_full_backward_hook"]
    for name, value in vars(old).items():
        if (
            name not in vars(new)
            and not isinstance(value, Tensor | nn.Module)
            and name != "forward"
        ):
            vars(new)[name] = value  # an attribute of the owner's, which hooks may read
    trained = {
        bias: [
            each.requires_grad for name, each in old.named_parameters() if _is_bias(name) == bias
        ]
        for bias in (False, True)
    }
    weights = any(trained[False])
    for name, parameter in new.named_parameters():
        trains = any(trained[True]) if _is_bias(name) and trained[True] else weights
        if parameter.requires_grad != trains:
            parameter.requires_grad_(trains)
    return new.train(old.training)


def _is_bias(name: str) -> bool:
    return name.split(".")[-1] == "bias"


# --- what a layer computes -------------------------------------------------------------------


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weight and bias are its own parameters, computed from nothing else."""
    return (
        not parametrize.is_parametrized(layer)
        and isinstance(vars(layer)["_parameters"].get("weight"), nn.Parameter)
        and not any(isinstance(hook, _WEIGHT_HOOKS) for hook in layer._forward_pre_hooks.values())
    )


def check_model(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse a model of which the named layers can not be captured or replaced at all.

    Raises
    ------
    ValueError
        If a layer is compiled or scripted with what holds it, not initialised yet, or without
        values (on the meta device); says which.
    """
    for holder, module in model.named_modules():
        inside = f"{holder}." if holder else ""
        if is_compiled(module) and any(name == holder or name.startswith(inside) for name in names):
            what = f"model.{holder}" if holder else "model"
            how = "torch.compile" if hasattr(module, "_orig_mod") else "its method compile()"
            instead = f", {what}._orig_mod," if hasattr(module, "_orig_mod") else ""
            raise ValueError(
                f"{_called(holder, module)} was compiled by {how}, which passes over the layers "
                f"inside; give it as it was before{instead} and compile the result"
            )
    for name in names:
        for kind, tensor in model.get_submodule(name).named_parameters():
            if isinstance(tensor, UninitializedTensorMixin):
                raise ValueError(
                    f"layer {name!r} is not initialised yet; run the model once before"
                )
            if tensor.is_meta:
                raise ValueError(f"layer {name!r}: its {kind} is on the meta device, and no values")


def adapter_of(model: nn.Module, name: str) -> str:
    """Why a layer is not compressed, if it belongs to an adapter, as of LoRA; or ""."""
    parts = name.split(".")
    for depth in range(len(parts)):
        holder = model.get_submodule(".".join(parts[:depth]))
        if isinstance(getattr(holder, "base_layer", None), nn.Module):
            return (
                f"belongs to an adapter, a {type(holder).__name__}; merge it first (in peft: "
                "model.merge_and_unload()) and compress the merged network"
            )
    return ""


# --- who else reads it -----------------------------------------------------------------------


def shares_with(model: nn.Module, layer: nn.Module) -> str | None:
    """The name of a tensor outside a layer that has memory in common with the layer's own."""
    mine = list(layer.parameters())
    inside = {id(module) for module in layer.modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for kind, tensor in own:
            if any(_overlap(tensor, each) for each in mine):
                return f"{name}.{kind}" if name else kind
    return None


def _overlap(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    (start, end), (first, last) = _span(one), _span(other)
    return one.device == other.device and start < last and first < end


def _span(tensor: Tensor) -> tuple[int, int]:
    if isinstance(tensor, UninitializedTensorMixin) or tensor.layout != torch.strided:
        return 0, 0
    if tensor.is_meta or not tensor.numel():
        return 0, 0
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
