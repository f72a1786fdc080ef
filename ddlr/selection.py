"""Which layers of a network are compressed: by name, glob or predicate, and what is left out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ddlr.linear_maps import FULLY_CONNECTED, kind_of

# Names and globs of layers, a function of name and module, or "all".
Layers = str | Iterable[str] | Callable[[str, nn.Module], bool]

_GLOB = frozenset("*?[")
_FORMS = (
    'a sequence of names or globs, as ["fc1", "encoder.*"], a function of name and module, or "all"'
)


@dataclass(frozen=True)
class Selection:
    """Names of layers of one network, each module under its first name, in the network's order.

    `explicit` are those that were named one by one: where such a one cannot be compressed, that is
    an error, and no note in the report.
    """

    names: tuple[str, ...]
    explicit: frozenset[str]


def select_layers(
    model: nn.Module, layers: Layers | None = None, exclude: Layers | None = None
) -> Selection:
    """The layers of a network that are chosen.

    Parameters
    ----------
    model : nn.Module
    layers : optional
        By default all fully connected ones; "all" are convolutions too.
    exclude : optional
        Of these, the ones that are left out; of the same forms.

    Raises
    ------
    ValueError
        If it is of another form, names what is no layer that can be compressed, names a layer
        twice, or chooses none; says which.
    """
    first_names = {module: name for name, module in model.named_modules()}
    known = [name for name, module in model.named_modules() if not _inside_another(model, name)]
    linear = [name for name in known if kind_of(model.get_submodule(name)) is not None]
    explicit: list[str] = []
    if layers is None:
        chosen = [name for name in linear if kind_of(model.get_submodule(name), FULLY_CONNECTED)]
        if not chosen:
            raise ValueError(f"the model has no fully connected layer to compress{_others(linear)}")
    elif isinstance(layers, str) and layers == "all":
        chosen = linear
        if not chosen:
            raise ValueError("the model has no layer to compress")
    else:
        chosen, explicit = _matching(model, layers, "layers", linear, first_names)
    if exclude is not None:
        left_out, _ = _matching(model, exclude, "exclude", linear, first_names)
        chosen = [name for name in chosen if name not in left_out]
        if not chosen:
            raise ValueError("exclude leaves no layer to compress")
    return Selection(tuple(chosen), frozenset(explicit) & set(chosen))


def _inside_another(model: nn.Module, name: str) -> bool:
    """Whether a module is a part of a layer that is compressed as a whole, such as a factor."""
    parts = name.split(".")
    return any(
        kind_of(model.get_submodule(".".join(parts[:depth]))) is not None
        for depth in range(len(parts))
        if name
    )


def _others(linear: Sequence[str]) -> str:
    return f'; layers="all" takes {list(linear)}' if linear else ""


def _matching(
    model: nn.Module,
    layers: Layers,
    what: str,
    linear: Sequence[str],
    first_names: dict[nn.Module, str],
) -> tuple[list[str], list[str]]:
    """Names of the layers that match, in the network's order, and those that were named."""
    if callable(layers):
        chosen = [name for name in linear if layers(name, model.get_submodule(name))]
        if not chosen:
            raise ValueError(f"{what} is a function that chooses none of {list(linear)}")
        return chosen, []
    chosen, explicit = set(), []
    modules = dict(model.named_modules(remove_duplicate=False))
    given = _names(layers, what)
    for name in given:
        if name in modules:
            if kind_of(modules[name]) is None:
                raise ValueError(
                    f"layer {name!r}, named in {what}, {_why_none(modules[name])}; "
                    f"layers that can be compressed are {list(linear)}"
                )
            first = first_names[modules[name]]
            if first in explicit:
                other = next(each for each in given if first_names.get(modules.get(each)) == first)
                raise ValueError(
                    f"{what} has {other!r} and {name!r}, which are one layer under two names; give "
                    "one of them"
                )
            chosen.add(first)
            explicit.append(first)
            continue
        matches = [each for each in linear if fnmatchcase(each, name)] if _is_glob(name) else []
        if not matches:
            kind = "matches no layer" if _is_glob(name) else "is no layer"
            raise ValueError(
                f"layer {name!r}, named in {what}, {kind} of the model that can be compressed: "
                f"{list(linear)}"
            )
        chosen.update(matches)
    order = [*linear, *(name for name in explicit if name not in linear)]
    return [name for name in order if name in chosen], explicit


def _is_glob(name: str) -> bool:
    return not _GLOB.isdisjoint(name)


def _why_none(module: nn.Module) -> str:
    kind = type(module)
    if "quantized" in kind.__module__ or "ao.nn" in kind.__module__:
        return f"is a {kind.__name__}, quantised; compress first and quantise the result"
    if isinstance(module, nn.MultiheadAttention):
        return "is attention with packed projections, which are no layer of their own"
    kinds = "nn.Linear, nn.Conv1d, nn.Conv2d, or Conv1D of transformers"
    return f"is a {kind.__name__}, and no linear layer ({kinds})"


def _names(layers: object, what: str) -> list[str]:
    """Names and globs, after a check that they are different strings."""
    if isinstance(layers, str):
        return [layers]
    try:
        layers = list(layers)
    except TypeError:
        raise ValueError(f"{what} is {layers!r}; it must be {_FORMS}") from None
    if not layers:
        raise ValueError(f"{what} is empty; name at least one layer, or leave it out")
    for index, name in enumerate(layers):
        if not isinstance(name, str):
            raise ValueError(f"{what} has {name!r}; it must be {_FORMS}")
        if name in layers[:index]:
            raise ValueError(f"{what} has {name!r} twice; name each layer once")
    return layers
