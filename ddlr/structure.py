"""The structure of a network as plain data, and a network of that structure.

    {"": {"class": "Sequential"}, "0": {"form": "LowRankLinear", "arguments": {...}}, ...}

It has an entry for each module by its name, in the order of `named_modules`; what a compressed
layer is made of belongs to its own entry. A form of this library and a module of torch, see
`ddlr.plain_modules`, have the arguments that make them. Of any other module it has the name of the
class, which is compared and never looked up: such a network needs an instance to load into.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddlr.convolution_forms import (
    GEOMETRY,
    LowRankConvolution,
    PivotedConvolution,
    SeparableConvolution,
)
from ddlr.identity import is_plain
from ddlr.layers import (
    LowRankLinear,
    PivotedLinear,
    SelectedLinear,
    replace_layer,
)
from ddlr.plain_modules import made_plain, plain_arguments
from ddlr.two_part_forms import SparseFactors, SparsePlusLowRank
from ddlr.untouched import random_state_kept

# Of a layer in a file; beyond, the file is taken to be damaged.
_MOST_FEATURES = 2**24
Entry = Mapping[str, Any]
Structure = Mapping[str, Entry]


# --- the forms of compressed layers ----------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A form of compressed layers in a file. A further one is a row of `FORMS`.

    Attributes
    ----------
    made : type
    arguments : callable
        ``(layer)`` to what makes such a layer, as JSON has it, without its tensors.
    make : callable
        Those as keywords to a layer of that structure, with any values.
    """

    made: type[nn.Module]
    arguments: Callable[[Any], dict[str, Any]]
    make: Callable[..., nn.Module]


def _low_rank_arguments(layer: LowRankLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "rank": layer.rank,
    }


def _convolution_arguments(layer: nn.Module, size: str = "rank") -> dict[str, Any]:
    names = ("in_channels", "out_channels", size, *GEOMETRY)
    values = {name: getattr(layer, name) for name in names}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def _pivoted_convolution_arguments(layer: PivotedConvolution) -> dict[str, Any]:
    return {**_convolution_arguments(layer), "bias": layer.bias is not None}


def _with_tuples(made: type[nn.Module], **arguments: Any) -> nn.Module:
    return made(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in arguments.items()
        }
    )


def _pivoted_arguments(layer: PivotedLinear) -> dict[str, Any]:
    return {**_low_rank_arguments(layer), "bias": layer.bias is not None}


def _selected_arguments(layer: SelectedLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "inputs": layer.inputs.count,
        "outputs": layer.outputs.count,
        "whole_bias": layer.whole_bias is not None,
        "layer": entry_of(layer.layer),
    }


def _make_selected(
    in_features: int,
    out_features: int,
    inputs: int,
    outputs: int,
    whole_bias: bool,
    layer: Entry,
) -> SelectedLinear:
    # Which ones comes with the values; how many decides how these are stored.
    kept = [
        torch.arange(total, device="cpu") < number
        for number, total in ((inputs, in_features), (outputs, out_features))
    ]
    return SelectedLinear(made(layer), *kept, torch.empty(out_features) if whole_bias else None)


def _parts_arguments(layer: SparsePlusLowRank | SparseFactors) -> dict[str, Any]:
    return {name: entry_of(part) for name, part in layer.named_children()}


def _with_parts(form: type[nn.Module], **parts: Entry) -> nn.Module:
    return form(**{name: made(part) for name, part in parts.items()})


# Classes whose modules compression replaces by others of the same class, which have a bias.
_COMPRESSED = ("Linear", "Conv1d", "Conv2d")
FORMS = {
    form.made.__name__: form
    for form in (
        Form(LowRankLinear, _low_rank_arguments, LowRankLinear),
        Form(LowRankConvolution, _convolution_arguments, partial(_with_tuples, LowRankConvolution)),
        Form(
            PivotedConvolution,
            _pivoted_convolution_arguments,
            partial(_with_tuples, PivotedConvolution),
        ),
        Form(
            SeparableConvolution,
            partial(_convolution_arguments, size="terms"),
            partial(_with_tuples, SeparableConvolution),
        ),
        Form(PivotedLinear, _pivoted_arguments, PivotedLinear),
        Form(SelectedLinear, _selected_arguments, _make_selected),
        Form(SparsePlusLowRank, _parts_arguments, partial(_with_parts, SparsePlusLowRank)),
        Form(SparseFactors, _parts_arguments, partial(_with_parts, SparseFactors)),
    )
}


# --- from a network to its structure ---------------------------------------------------------


def structure_of(model: nn.Module) -> dict[str, Entry]:
    """The structure of a network, see above."""
    entries: dict[str, Entry] = {}
    names: dict[int, str] = {}
    for name, module in modules_of(model):
        if id(module) in names:
            entries[name] = {"same_as": names[id(module)]}
        else:
            names[id(module)] = name
            entries[name] = entry_of(module)
    return entries


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with all their names, without those that compressed layers are made of."""
    form = None
    for name, module in model.named_modules(remove_duplicate=False):
        if form is not None and name.startswith(form):
            continue
        if _form_of(module) is not None:
            form = f"{name}." if name else ""
        yield name, module


def entry_of(module: nn.Module) -> Entry:
    """The entry of one module in a structure."""
    form = _form_of(module)
    if form is not None:
        entry = {"form": form.made.__name__, "arguments": form.arguments(module)}
    else:
        entry = {"class": type(module).__name__}
        arguments = plain_arguments(module)
        if arguments is not None:
            entry["arguments"] = arguments
    return {**entry, "altered": True} if _is_altered(module) else entry


def _form_of(module: nn.Module) -> Form | None:
    form = FORMS.get(type(module).__name__)
    return form if form is not None and type(module) is form.made else None


def _is_altered(module: nn.Module) -> bool:
    """Whether an instance does more than its class: hooks, or a forward of its own."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


# --- from a structure to a network -----------------------------------------------------------


def network_of(structure: Structure) -> nn.Module:
    """A network of that structure on the meta device, without values.

    Raises
    ------
    ValueError
        If it has a class that is not known; names the module and says what to do.
    """
    for name, entry in structure.items():
        if "same_as" not in entry and "arguments" not in entry:
            raise ValueError(
                f"{_called(name)} is a {entry.get('class')}, whose class is not in the file: "
                "give a fresh instance of the network, load(path, model)"
            )
        if entry.get("altered"):
            raise ValueError(
                f"{_called(name)} had hooks or a forward of its own, which are not in the file: "
                "give a fresh instance of the network, load(path, model)"
            )
    return _built(structure, "")


def made(entry: Entry) -> nn.Module:
    """The module that an entry stands for, on the meta device and without its children."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"an entry {entry!r}, which must be a JSON object")
    with torch.device("meta"), random_state_kept(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        if "form" not in entry:
            return made_plain(entry.get("class"), entry.get("arguments"))
        form = FORMS.get(entry["form"]) if isinstance(entry["form"], str) else None
        if form is None:
            raise ValueError(f"a {entry['form']!r}, a form that this version does not know")
        try:
            sizes = [each for each in entry["arguments"].values() if isinstance(each, int)]
            # Index sets take memory for them, before the tensors of a file show what is true.
            if not all(0 <= each <= _MOST_FEATURES for each in sizes):
                raise ValueError(f"its sizes are {sizes}")
            return form.make(**entry["arguments"])
        except Exception as error:
            raise ValueError(f"a {entry['form']} that can not be made: {error}") from error


def _built(structure: Structure, root: str) -> nn.Module:
    """The part of a network below a name."""
    prefix = f"{root}." if root else ""
    modules: dict[str, nn.Module] = {}
    for name, entry in structure.items():
        if name != root and not name.startswith(prefix):
            continue
        try:
            module = modules[entry["same_as"]] if "same_as" in entry else made(entry)
            modules[name] = module
            if name != root:
                holder, _, last = name.rpartition(".")
                if not isinstance(modules[holder], nn.Sequential | nn.ModuleList | nn.ModuleDict):
                    raise ValueError("a part of a module that holds none")
                modules[holder].add_module(last, module)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{_called(name)} is {error}") from error
    if root not in modules:
        raise ValueError(f"{_called(root)} is missing")
    return modules[root]


# --- a structure and a fresh instance --------------------------------------------------------


def fitted(model: nn.Module, structure: Structure) -> nn.Module:
    """A fresh instance of the original network with its layers replaced as the structure says.

    Changes the model and gives it back. Replaced layers are on the meta device.

    Raises
    ------
    ValueError
        If the model has another structure; names the module and says what is wrong.
    """
    here = dict(model.named_modules(remove_duplicate=False))
    first = _first_names(here)
    replaced: list[str] = []
    covered: list[str] = []  # the names of replaced layers, of which each may have several
    for name, entry in structure.items():
        if _is_below(name, covered):
            continue
        if name not in here:
            raise ValueError(
                f"{_called(name)} is missing in the model, which has another structure"
            )
        same = entry.get("same_as")
        if same != (first[name] if first[name] != name else None):
            shared = f"the same as {same!r}" if same is not None else "one of its own"
            raise ValueError(f"{_called(name)} is {shared} in the file, and not so in the model")
        if same is None and _is_replacement(name, entry, structure, here[name]):
            replaced.append(name)
        if first[name] in replaced:
            covered.append(name)
    for name in here:
        if name not in structure and not _is_below(name, covered):
            raise ValueError(f"{_called(name)} of the model is missing in the file")
    for name in replaced:
        model = replace_layer(model, name, _built(structure, name))
    return model


def _first_names(here: Mapping[str, nn.Module]) -> dict[str, str]:
    """By name of a module the first of its names."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(module), name) for name, module in here.items()}


def _is_below(name: str, roots: list[str]) -> bool:
    return any(name != root and (not root or name.startswith(f"{root}.")) for root in roots)


def _is_replacement(name: str, entry: Entry, structure: Structure, old: nn.Module) -> bool:
    """Whether a module of the model is to be replaced by what the file has in its place."""
    if "form" not in entry:
        word, arguments = entry.get("class"), entry.get("arguments")
        if word == type(old).__name__:
            mine = plain_arguments(old)
            computed = word in _COMPRESSED and not (entry.get("altered") or is_plain(old))
            if arguments is None or mine is None or (mine == arguments and not computed):
                return False
            given = {each: arguments.get(each) for each in {*mine, *arguments}}
            wrong = {each for each, value in given.items() if mine.get(each) != value}
            if word not in _COMPRESSED or not wrong <= {"bias"}:
                raise ValueError(
                    f"{_called(name)} is a {word} with {_said(arguments, wrong)} in the file, and "
                    f"with {_said(mine, wrong)} in the model"
                )
        elif word not in ("Linear", "Sequential") or arguments is None:
            raise ValueError(
                f"{_called(name)} is a {word} in the file, and a {type(old).__name__} in the model"
            )
    new = _built(structure, name)
    ours, theirs = _geometry(old), _geometry(new)
    if ours is None or theirs is None or ours != theirs:
        raise ValueError(
            f"{_called(name)} is a {type(new).__name__} of {theirs} in the file, which can not "
            f"take the place of a {type(old).__name__} of {ours} in the model"
        )
    return True


def _said(arguments: Mapping[str, Any], names: set[str]) -> str:
    return ", ".join(f"{name}={arguments.get(name, 'its default')}" for name in sorted(names))


def _geometry(layer: nn.Module) -> str | None:
    """What a layer that takes the place of another one has in common with it, in words."""
    if isinstance(getattr(layer, "in_features", None), int):
        return f"{layer.in_features} inputs and {layer.out_features} outputs"
    if hasattr(layer, "nf") and isinstance(getattr(layer, "weight", None), Tensor):
        inputs, outputs = layer.weight.shape  # the Conv1D of GPT-2
        return f"{inputs} inputs and {outputs} outputs"
    if isinstance(layer, SeparableConvolution):
        return _window([layer.whole()])
    if isinstance(layer, PivotedConvolution):
        first = layer.pivot_rows
        last = type(first)(layer.rank, layer.out_channels, 1, device="meta")
        return _window([first, last])
    parts = list(layer) if isinstance(layer, nn.Sequential) else [layer]
    if not parts or not all(type(each) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) for each in parts):
        return None
    if any(isinstance(each.padding, str) for each in parts[1:]):
        return None
    return _window(parts)


def _window(convolutions: list[nn.Module]) -> str:
    """Channels, and the window of convolutions in sequence as that of one."""
    steps = [1] * len(convolutions[0].stride)
    spans, pads = list(steps), [0] * len(steps)
    for each in convolutions:
        for side, step in enumerate(steps):
            spans[side] += (each.kernel_size[side] - 1) * each.dilation[side] * step
            pads[side] += 0 if isinstance(each.padding, str) else each.padding[side] * step
            steps[side] *= each.stride[side]
    padding = convolutions[0].padding if isinstance(convolutions[0].padding, str) else pads
    return (
        f"{convolutions[0].in_channels} input and {convolutions[-1].out_channels} output channels, "
        f"span {spans}, stride {steps}, padding {padding}"
    )


def _called(name: str) -> str:
    return f"module {name!r}" if name else "the network itself"
