"""Inputs and outputs of a network's layers on data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_TRIED = 100  # inputs, by `feeds_only`


@dataclass
class LayerRecord:
    """What one layer saw and gave while it was captured.

    `inputs` and `outputs` are of shape (samples, features), leading dimensions flattened, outputs
    before any activation. `activation` is "relu" or "none", as decided by `capture`.
    """

    _inputs: list[Tensor] = field(default_factory=list)
    _outputs: list[Tensor] = field(default_factory=list)
    _always_rectified: bool = True
    _compared: bool = False
    _negative: bool = False

    @property
    def called(self) -> bool:
        return bool(self._inputs)

    @property
    def inputs(self) -> Tensor:
        return torch.cat(self._inputs)

    @property
    def outputs(self) -> Tensor:
        return torch.cat(self._outputs)

    @property
    def activation(self) -> str:
        rectified = self._compared and self._always_rectified and self._negative
        return "relu" if rectified else "none"

    def _add(self, inputs: Tensor, outputs: Tensor) -> None:
        self._inputs.append(inputs.detach().flatten(0, -2).clone())
        # Cloned at once: an in-place activation would overwrite it.
        self._outputs.append(outputs.detach().flatten(0, -2).clone())

    def _compare(self, seen_next: object) -> None:
        """Hold the latest output against what the network made of it."""
        output = self._outputs[-1]
        self._compared = True
        self._negative |= bool((output < 0).any())
        self._always_rectified &= (
            isinstance(seen_next, Tensor)
            and seen_next.numel() == output.numel()
            and torch.equal(seen_next.detach().reshape(output.shape), output.relu())
        )


@contextmanager
def capture(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, LayerRecord]]:
    """Record inputs and outputs of named layers over all forward passes made inside the context.

        with capture(model, ["fc1", "fc2"]) as records:
            for batch in batches:
                model(batch)

    Hooks are removed when the context is left, also by an exception. The model's mode and
    gradients are the caller's business.

    Whether a ReLU follows a layer is decided on the data, so it does not matter if the network
    calls a module, a function or a method for it. The layer's output is compared with the input of
    the next module that has parameters, in the order of execution, or with the network's output if
    there is none. "relu" is the answer if that was exactly relu(output) in every pass, up to
    reshaping, and some output was negative. In all other cases the answer is "none", under which
    the whole output has to be reproduced: that is always a valid demand, only a harder one. So it
    is the answer too where outputs happen never to be negative, where pooling or normalisation
    stands in between, and for other activations. Only the next module is looked at: a network that
    also uses the raw output elsewhere needs the activation to be given explicitly.

    Raises
    ------
    ValueError
        If a name is not a module of the model.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"the model has no layer {unknown[0]!r}; it has {', '.join(modules)}")
    records = {name: LayerRecord() for name in names}
    waiting: list[LayerRecord] = []
    handles = []

    def settle(seen_next: object) -> None:
        while waiting:
            waiting.pop()._compare(seen_next)

    def before(_module, arguments):
        settle(arguments[0] if arguments else None)

    def after(record: LayerRecord):
        def hook(_module, arguments, output):
            record._add(arguments[0], output)
            waiting.append(record)

        return hook

    try:
        for module in modules.values():
            if any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(before))
        for name, record in records.items():
            handles.append(modules[name].register_forward_hook(after(record)))
        handles.append(model.register_forward_hook(lambda _module, _arguments, out: settle(out)))
        yield records
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Have a model in evaluation mode, and its modules in their own modes again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def run_batches(model: nn.Module, batches) -> None:
    """Pass batches of network inputs through a model in evaluation mode, on its device.

    Raises
    ------
    ValueError
        If there is no batch, or one without samples.
    TypeError
        If a batch is not a tensor.
    """
    count = 0
    with evaluating(model) as device:
        for batch in batches:
            if not isinstance(batch, Tensor):
                raise TypeError(
                    f"a calibration batch is a {type(batch).__name__}; it must be a tensor of "
                    "network inputs, so take the labels off: (inputs for inputs, _ in loader)"
                )
            count += len(batch)
            if len(batch):
                model(batch.to(device))
    if count == 0:
        raise ValueError("the calibration set is empty; it must have at least one sample")


class OutputError(ValueError):
    """Outputs of a network that can not be compared: not one tensor, or not finite."""


def one_tensor(output: object) -> Tensor:
    """What a network gave, in single precision at least, if it is a tensor with samples.

    Raises
    ------
    OutputError
        If it is not; says what to do.
    """
    if not isinstance(output, Tensor):
        raise OutputError(
            f"the network's output is a {type(output).__name__}, where it must be one tensor to be "
            "compared with another network's; wrap the network in a module that returns the "
            "tensor that counts"
        )
    if output.ndim == 0 or output.is_complex():
        raise OutputError(
            f"the network's output is of shape {tuple(output.shape)} and {output.dtype}; it must "
            "be real, and its first dimension that of the samples"
        )
    return output.to(torch.promote_types(output.dtype, torch.float32))


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Outputs of a network in evaluation mode, all batches in one, shape (rows, outputs).

    Leading dimensions are flattened, as those of a layer in a capture.

    Raises
    ------
    OutputError
        If an output is not one tensor, or their last dimensions differ.
    """
    with evaluating(model) as device:
        outputs = [one_tensor(model(batch.to(device))) for batch in batches]
    rows = [each.flatten(0, -2) if each.ndim > 1 else each[:, None] for each in outputs]
    if len({each.shape[1] for each in rows}) > 1:
        raise OutputError(
            "the last dimension of the network's output is not the same in all batches"
        )
    return torch.cat(rows)


@torch.no_grad()
def feeds_only(model: nn.Module, name: str, following: str, batch: Tensor) -> bool:
    """Whether a layer's outputs reach the network's outputs through one other layer alone.

    Tried out on some inputs: the layer's outputs are changed while the other layer is given the
    inputs that it had. Both have to be called once.
    """
    batch = batch[:_TRIED]
    seen: list[Tensor] = []
    called: list[Tensor] = []

    def note(_module, arguments):
        seen.append(arguments[0].clone())

    def give(_module, arguments):
        return (seen[0], *arguments[1:])

    def change(_module, _arguments, output):
        return -output - 1

    layer, other = model.get_submodule(name), model.get_submodule(following)
    count = (layer.register_forward_hook, lambda *given: called.append(given[2]))
    with _hooked((other.register_forward_pre_hook, note), count):
        before = outputs_of(model, [batch])
    if not len(seen) == len(called) == 1:
        return False
    with _hooked((layer.register_forward_hook, change), (other.register_forward_pre_hook, give)):
        return torch.equal(before, outputs_of(model, [batch]))


@contextmanager
def _hooked(*hooks: tuple) -> Iterator[None]:
    handles = [register(hook) for register, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
