"""The captured layers of a network: what each saw and gave on the calibration samples."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddlr.calls import Batch, as_batches
from ddlr.constraints import OutputSet
from ddlr.hooks import is_sole_consumer
from ddlr.inputs import CentredInputs
from ddlr.method import LayerProblem, Method
from ddlr.result import SkippedWeights
from ddlr.routes import Route
from ddlr.separable import Kernel
from ddlr.trials import Trace


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The inputs of a layer, with what all its solves share.

    Attributes
    ----------
    whole : Tensor, shape (samples, in_features)
    eigen : (Tensor, Tensor), optional
        Eigenvalues and eigenvectors of the centred inputs that are not always zero, where they are
        known already; see `CentredInputs.eigen`.
    """

    whole: Tensor
    eigen: tuple[Tensor, Tensor] | None = None

    @cached_property
    def live(self) -> Tensor:
        return live(self.whole)

    @cached_property
    def centred(self) -> CentredInputs:
        """The inputs that are not always zero, with the eigenvectors that all solves share."""
        inputs = self.whole if bool(self.live.all()) else self.whole[:, self.live]
        if self.eigen is None:
            return CentredInputs(inputs)
        return CentredInputs.with_eigen(inputs, self.eigen)

    def release(self) -> None:
        """Let go of what is as large as the inputs, but for themselves; eigenvectors are kept."""
        made = vars(self).pop("centred", None)
        if made is not None and "eigen" in vars(made):
            object.__setattr__(self, "eigen", made.eigen)


@dataclass(frozen=True)
class CapturedLayer:
    """What one layer saw and gave on the calibration samples; serves any number of solves.

    Attributes
    ----------
    name : str
    inputs : Tensor, shape (samples, in_features)
    targets : Tensor, shape (samples, out_features)
        The layer's output, after its activation.
    activation : {"relu", "none"}
    weight, bias : Tensor
        The layer's own, as they were captured; a missing bias is zero.
    read : Tensor, optional, shape (out_features,)
        Which outputs something uses; targets of the others are zero. All where it is None.
    whole_targets : Tensor, optional
        The targets before those that nothing uses were set to zero.
    route : Route, optional
        Which samples reached the layer, see `ddlr.routes`; what cascade order goes by.
    shared : LayerInputs, optional
        What solves on the same inputs share; made anew unless given.
    on_patches : bool
        Whether it is a convolution, and rows of its inputs are patches.
    kernel_shape : (int, int, int), optional
        Channels, height and width of a convolution's kernel, where it may be split in these.
    frees : bool
        Whether its inputs are outputs of the layer before, which nothing else reads, so that an
        input without any weight frees that layer from an output.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    activation: str
    weight: Tensor
    bias: Tensor
    read: Tensor | None = None
    whole_targets: Tensor | None = None
    route: Route | None = field(default=None, repr=False)
    shared: LayerInputs | None = field(default=None, repr=False, compare=False)
    on_patches: bool = False
    kernel_shape: tuple[int, int, int] | None = None
    frees: bool = False

    def __post_init__(self):
        if self.shared is None or self.shared.whole is not self.inputs:
            object.__setattr__(self, "shared", LayerInputs(self.inputs))

    @property
    def dropped(self) -> int:
        """Outputs that are not always zero, but taken for that since nothing uses them."""
        if self.whole_targets is None:
            return 0
        return int(live(self.whole_targets).sum() - self.live_out.sum())

    @property
    def live_in(self) -> Tensor:
        return self.shared.live

    @cached_property
    def live_out(self) -> Tensor:
        return live(self.targets)

    @property
    def kernel(self) -> Kernel | None:
        """The kernel that may be split, None where single places of a channel are always zero."""
        if self.kernel_shape is None:
            return None
        live = self.live_in.view(self.kernel_shape[0], -1)
        channels = live.any(dim=1)
        if not torch.equal(channels, live.all(dim=1)):
            return None
        return Kernel(self.kernel_shape, int(channels.sum()))

    def method_of(self, method: Method) -> Method:
        """The method itself, or what it compresses such a layer by."""
        return method.of_layer(self.on_patches, self.kernel)

    @property
    def live_inputs(self) -> CentredInputs:
        return self.shared.centred

    def reading(self, read: Tensor) -> "CapturedLayer":
        """The layer where only some of its outputs are used, `read` of shape (out_features,)."""
        targets = self.targets * read
        return dataclasses.replace(self, targets=targets, read=read, whole_targets=self.targets)

    def problem(self, relative_bound: float, *, original_inputs: bool = True) -> LayerProblem:
        """The layer to be solved within a bound relative to the norm of its targets."""
        live_in, live_out = self.live_in, self.live_out
        return LayerProblem(
            self.live_inputs,
            self.targets[:, live_out],
            relative_bound * torch.linalg.vector_norm(self.targets).item(),
            self.activation,
            self.weight[live_out][:, live_in],
            self.bias[live_out],
            original_inputs,
            self.frees,
        )

    @torch.no_grad()
    def error_of_original(self) -> float:
        """Norm of the original weights' deviation on the inputs, relative to the targets."""
        outputs = OutputSet(self.targets, 0.0, self.activation, "hinge")
        return outputs.violation(torch.addmm(self.bias, self.inputs, self.weight.T))

    @torch.no_grad()
    def error_of_solved(self, weight: Tensor, bias: Tensor) -> float:
        """The same of a solution, which is of the inputs and outputs that are not always zero."""
        outputs = OutputSet(self.targets[:, self.live_out], 0.0, self.activation, "hinge")
        return outputs.violation(torch.addmm(bias, self.live_inputs.inputs, weight.T))

    def is_input_of(self, following: "CapturedLayer") -> bool:
        """Whether another layer's inputs are this one's outputs, as they are.

        Never of a convolution, which has no weights of a single input that could go.
        """
        if self.on_patches or following.on_patches:
            return False
        targets, inputs = self.targets, following.inputs
        return targets.shape == inputs.shape and torch.equal(targets, inputs)


@dataclass(frozen=True)
class CapturedLayers:
    """The captured layers of one network, in its order. Stands in for the calibration set.

    Attributes
    ----------
    layers : tuple of CapturedLayer
        In the order in which the network calls them first.
    batches : tuple of Batch
        The network inputs they were captured on, and how the network is called on them; made of
        tensors where these are given.
    traces : tuple of Trace, optional
        What the network did on each batch. By it a network that is not the one that was captured is
        found out at once; without it by the activations alone.
    traced : tuple of str
        The modules over which the traces are.
    activations_given : frozenset of str
        Names of the layers whose activation the caller gave.
    reused : bool
        Whether further solves are to come, for which centred inputs and eigenvectors are kept.
    skipped : tuple of SkippedWeights
        What was left out, and why.
    """

    layers: tuple[CapturedLayer, ...]
    batches: tuple[Batch, ...]
    traces: tuple[Trace, ...] | None = field(default=None, repr=False)
    traced: tuple[str, ...] = field(default=(), repr=False)
    activations_given: frozenset[str] = frozenset()
    reused: bool = True
    skipped: tuple[SkippedWeights, ...] = ()
    # What was tried out: pairs of names, and whether the one alone reads the other.
    _consumers: dict[tuple[str, str], bool] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self):
        object.__setattr__(self, "batches", as_batches(self.batches))

    def only(self, names: Sequence[str]) -> "CapturedLayers":
        """The same of some of the layers, in the network's order."""
        known = [layer.name for layer in self.layers]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"layer {unknown[0]!r} was not captured; captured are {known}")
        return self._with([layer for layer in self.layers if layer.name in names])

    def _with(self, layers: Sequence[CapturedLayer]) -> "CapturedLayers":
        """The same network with other layers, and all that was tried out on it."""
        other = dataclasses.replace(self, layers=tuple(layers))
        object.__setattr__(other, "_consumers", self._consumers)
        return other

    def is_sole_consumer(
        self, model: nn.Module, following: CapturedLayer, layer: CapturedLayer
    ) -> bool:
        """Whether one layer has another's outputs for its inputs, and nothing else reads them.

        Tried out on all calibration samples, see `ddlr.hooks.is_sole_consumer`, once for each pair.
        """
        pair = (layer.name, following.name)
        if pair not in self._consumers:
            self._consumers[pair] = layer.is_input_of(following) and is_sole_consumer(
                model, *pair, self.batches
            )
        return self._consumers[pair]

    def noting_what_frees(self, model: nn.Module) -> "CapturedLayers":
        """The same with `CapturedLayer.frees` of each layer that follows another here."""
        layers = list(self.layers)
        for place, (layer, following) in enumerate(pairwise(self.layers), start=1):
            if not following.frees:
                frees = self.is_sole_consumer(model, following, layer)
                layers[place] = dataclasses.replace(following, frees=frees)
        return self._with(layers)

    @property
    def weights(self) -> int:
        """Weights of all captured layers, as they were."""
        return sum(layer.weight.numel() for layer in self.layers)

    def for_solving(self) -> Iterator[CapturedLayer]:
        """The layers, one by one; what their solves share is kept where it is used again."""
        last = {id(layer.inputs): index for index, layer in enumerate(self.layers)}
        shared: dict[int, LayerInputs] = {}
        for index, layer in enumerate(self.layers):
            inputs = layer.inputs
            if self.reused:
                yield layer
                continue
            same = shared.setdefault(id(inputs), LayerInputs(inputs))
            if last[id(inputs)] == index:
                del shared[id(inputs)]
            yield dataclasses.replace(layer, shared=same)


def released(layers: Iterable[CapturedLayer]) -> Iterator[CapturedLayer]:
    """The layers, one by one; what is as large as their inputs is let go of behind each.

    But where the next one has the same inputs, and behind the last one.
    """
    before = None
    for layer in layers:
        if before is not None and before.shared is not layer.shared:
            before.shared.release()
        yield layer
        before = layer


def live(activations: Tensor) -> Tensor:
    """Which features are not zero on every sample; the first one at least."""
    some = (activations != 0).any(dim=0)
    some[0] |= ~some.any()
    return some
