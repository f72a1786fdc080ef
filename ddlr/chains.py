"""A compressed network in the form that runs fastest: runs of its layers as one module each."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddlr.identity import copied, is_plain
from ddlr.index_sets import pick
from ddlr.layers import (
    LowRankLinear,
    PivotedLinear,
    SelectedLinear,
    factorise,
    replace_layer,
)

# Take each value by itself and hold no tensors, so that features may come first or be left out.
_ELEMENTWISE = (
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Tanh,
)
_NOTHING = (nn.Identity, nn.Dropout)  # at inference

# Time to pick one input of a sample, in multiplications of the thin product that follows: 0.35 ns
# and 0.025 ns, one thread of an AMD EPYC 9004 at batch 256. Fewer inputs than this makes worth
# picking are read all, with zeros in the weight for the others.
_PRODUCTS_PER_PICK = 14


class LinearChain(nn.Module):
    """Linear layers with activations between, made for inference on many samples at once.

    What it computes is what the layers compute, up to rounding. It is faster than they are for
    four reasons. Outputs that the next layer does not read are not computed, and outputs are put
    nowhere from which they have to be picked again. Within the chain features come first and
    samples last, (features, samples): a product with few rows, as that with a factor of low rank,
    is up to twice as fast so. ReLU works in place. And it is one module to call, not ten.

    It is made anew by `fuse_chains` from a network as it is stored; it has no parameters to train,
    and its dropout is that of inference: none.

    Parameters
    ----------
    stages : sequence of Stage
        At least one.
    in_features, out_features : int
    inputs : Tensor, optional, shape (inputs kept,)
        Indices of the inputs that are read; the first weight is of these alone. All if None.
    """

    def __init__(
        self,
        stages: Sequence["Stage"],
        in_features: int,
        out_features: int,
        inputs: Tensor | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("inputs", inputs)
        self._products: list[tuple[str, str | None, nn.Module | None]] = []
        for place, stage in enumerate(stages):
            *first, last = stage.weights
            for part, weight in enumerate(first):
                self.register_buffer(f"weight_{place}_{part}", weight)
                self._products.append((f"weight_{place}_{part}", None, None))
            self.register_buffer(f"weight_{place}", last)
            # A column, as features come first.
            self.register_buffer(f"bias_{place}", stage.bias[:, None])
            self.add_module(f"activation_{place}", stage.activation)
            self._products.append((f"weight_{place}", f"bias_{place}", stage.activation))

    def forward(self, inputs: Tensor) -> Tensor:
        values = inputs if self.inputs is None else pick(inputs, self.inputs)
        leading = values.shape[:-1]
        if values.dim() != 2:
            values = values.reshape(-1, values.shape[-1])
        values = values.T
        tensors = self._buffers  # the attributes take a microsecond each
        for weight, bias, activation in self._products:
            if bias is None:
                values = tensors[weight] @ values
            else:
                values = torch.addmm(tensors[bias], tensors[weight], values)
            if activation is not None:
                # The values are nobody else's.
                values = values.relu_() if type(activation) is nn.ReLU else activation(values)
        values = values.T.contiguous()
        return values if len(leading) == 1 else values.reshape(*leading, self.out_features)

    def extra_repr(self) -> str:
        shapes = ", ".join(
            "x".join(str(side) for side in getattr(self, weight).shape)
            for weight, *_ in self._products
        )
        read = "all" if self.inputs is None else len(self.inputs)
        return f"in_features={self.in_features}, inputs read: {read}, weights: {shapes}"


@dataclass(frozen=True)
class Stage:
    """A linear layer of a chain, and the activation behind it.

    Attributes
    ----------
    weights : tuple of Tensor
        One matrix (out_features, in_features), or the factors of one, which are applied in turn:
        (rank, in_features), then (out_features, rank).
    bias : Tensor, shape (out_features,)
    activation : nn.Module, optional
        Takes each value by itself.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor
    activation: nn.Module | None = None

    @property
    def read(self) -> Tensor:
        """The mask of the inputs that have weights."""
        return (self.weights[0] != 0).any(dim=0)

    @property
    def given(self) -> Tensor:
        """The mask of the outputs that may be other than 0."""
        given = (self.weights[-1] != 0).any(dim=1) | (self.bias != 0)
        if self.activation is not None and self.activation(self.bias.new_zeros(1)).item() != 0:
            given = torch.ones_like(given)
        return given

    def in_fewest_products(self) -> "Stage":
        """With the factors multiplied, where that is less to compute."""
        if len(self.weights) == 1:
            return self
        right, left = self.weights
        rank, read, given = len(right), int(self.read.sum()), len(left)
        whole = rank * (read + given) >= read * given
        return Stage((left @ right,), self.bias, self.activation) if whole else self

    def on_inputs(self, kept: Tensor) -> "Stage":
        first, *others = self.weights
        return Stage((first[:, kept].contiguous(), *others), self.bias, self.activation)

    def on_outputs(self, kept: Tensor) -> "Stage":
        *others, last = self.weights
        return Stage((*others, last[kept].contiguous()), self.bias[kept], self.activation)


@torch.no_grad()
def fuse_chains(model: nn.Module) -> nn.Module:
    """A copy of a compressed network in which runs of linear layers are one `LinearChain` each.

    For inference: it runs faster than the network as it is stored, with equal outputs up to
    rounding, but is no smaller, and can not be trained. It can be exported and compiled. What is
    stored is the network itself, see `ddlr.compact`, from which this is made in milliseconds.

    A run is what follows one another in an `nn.Sequential`: linear layers in any form, activations
    that take each value by itself, `nn.Identity` and `nn.Dropout`. At least one of its layers must
    be low-rank or leave out inputs or outputs. A run ends at a module that is anything else, that
    has hooks, or whose weights the model holds in another place too. The values between the layers
    of a run exist no more: it is not for a network that reaches into the `nn.Sequential`, past its
    own call.

    Parameters
    ----------
    model : nn.Module
        Compressed, compact or not. Is left untouched.
    """
    model = copied(model)
    places = _places(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Sequential and not isinstance(module, LowRankLinear):
            fused = _fused(module, places)
            if fused is not None:
                model = replace_layer(model, name, fused)
    return model


def _places(model: nn.Module) -> dict[int, int]:
    """How many names each parameter has in the model."""
    places: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    return places


def _fused(sequence: nn.Sequential, places: dict[int, int]) -> nn.Sequential | None:
    """The modules with their runs fused; None where there is no run that gains by it."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    changed = False
    for run, may_be_fused in _runs(sequence, places):
        chain = _chain([module for _, module in run]) if may_be_fused else None
        if chain is None:
            parts.update(run)
        else:
            parts[run[0][0]] = chain
            changed = True
    return nn.Sequential(parts) if changed else None


def _runs(
    sequence: nn.Sequential, places: dict[int, int]
) -> Iterator[tuple[list[tuple[str, nn.Module]], bool]]:
    """The children in order: runs that begin with a linear layer, and one by one what is in none.

    With each, whether it is a run that may be fused.
    """
    run: list[tuple[str, nn.Module]] = []
    for name, module in sequence._modules.items():  # one that stands twice, twice
        starts = _is_linear(module, places)
        belongs = starts or (run and type(module) in (*_ELEMENTWISE, *_NOTHING))
        if belongs and not _has_hooks(module):
            run.append((name, module))
            continue
        if run:
            yield run, True
        run = []
        yield [(name, module)], False
    if run:
        yield run, True


def _has_hooks(module: nn.Module) -> bool:
    return any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


def _is_linear(module: nn.Module, places: dict[int, int]) -> bool:
    """Whether a module is a linear layer in a form that is known, with a weight of its own."""
    inner = module.layer if isinstance(module, SelectedLinear) else module
    if any(places.get(id(parameter), 1) > 1 for parameter in module.parameters()):
        return False
    if type(inner) is nn.Linear:
        return is_plain(inner)
    return isinstance(inner, LowRankLinear | PivotedLinear)


def _chain(modules: Sequence[nn.Module]) -> LinearChain | None:
    """A run as one module, or None where each of its layers is dense and whole."""
    stages, linear = [], []
    for module in modules:
        if type(module) in _ELEMENTWISE:
            if stages[-1].activation is not None:
                module = nn.Sequential(stages[-1].activation, module)
            stages[-1] = Stage(stages[-1].weights, stages[-1].bias, module)
        elif type(module) not in _NOTHING:
            linear.append(module)
            stages.append(_stage(module))
    whole = all(bool(stage.read.all() and stage.given.all()) for stage in stages)
    if whole and all(type(layer) is nn.Linear for layer in linear):
        return None
    for place in range(len(stages) - 1):
        kept = stages[place].given & stages[place + 1].read
        stages[place] = stages[place].on_outputs(kept)
        stages[place + 1] = stages[place + 1].on_inputs(kept)
    stages = [stage.in_fewest_products() for stage in stages]
    read = stages[0].read
    inputs = None
    rows, picked = len(stages[0].weights[0]), int(read.sum())
    if (len(read) - picked) * rows > _PRODUCTS_PER_PICK * picked:
        inputs = read.nonzero()[:, 0]
        stages[0] = stages[0].on_inputs(read)
    return LinearChain(stages, linear[0].in_features, linear[-1].out_features, inputs)


def _stage(layer: nn.Module) -> Stage:
    """A linear layer of a chain, as factors where it has a rank."""
    weight = layer.weight.detach()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    if isinstance(layer, LowRankLinear):
        return Stage((layer[0].weight.detach(), layer[1].weight.detach()), bias)
    rank = None if isinstance(layer, nn.Linear) else layer.rank
    if rank is None:
        return Stage((weight,), bias)
    left, right = factorise(weight, rank)
    return Stage((right, left), bias)
