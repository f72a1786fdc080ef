"""A network is run here, and stays as its owner left it."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

_MISSING = object()


def random_states() -> Callable[[], None]:
    """A function that puts Python's, numpy's and torch's random states back as they are now."""
    restore: list[Callable[[], None]] = []
    python, cpu = random.getstate(), torch.get_rng_state()
    restore.append(lambda: random.setstate(python))
    restore.append(lambda: torch.set_rng_state(cpu))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = torch.cuda.get_rng_state_all()
        restore.append(lambda: torch.cuda.set_rng_state_all(devices))
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    if numpy is not None:
        legacy = numpy.get_state()
        restore.append(lambda: numpy.set_state(legacy))

    def put_back() -> None:
        for one in restore:
            one()

    return put_back


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give random states back as they were, see `random_states`."""
    put_back = random_states()
    try:
        yield
    finally:
        put_back()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Have a model in evaluation mode, and its modules in their own modes again afterwards.

    Modes are changed by `train` and `eval`, so that a module that has its own does what it has to
    do. Random states are given back too. The fast path of torch's transformer layers, which reads
    the weights of linear layers in place of calling them, is off meanwhile.
    """
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    with random_state_kept():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model.eval()
            yield device_of(model)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            _restore_modes(modes)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is, or its first buffer; the CPU where it has neither."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def untouched(model: nn.Module) -> Iterator[torch.device]:
    """Have a model in evaluation mode, without gradients, and exactly as it was afterwards.

    What a forward pass or a change of mode alters is put back, to the last bit: values of
    parameters and buffers, attributes of modules and what their lists and dicts hold, random
    generators. Costs a copy of the parameters and buffers. Random states begin at the same place
    each time, so that a network that draws from them does the same on the same batches.
    """
    tensors = [*model.parameters(), *model.buffers()]
    with ExitStack() as stack:
        stack.callback(_restore_values, _values(tensors))
        for module in model.modules():
            stack.callback(_restore_attributes, module, *_attributes(module))
        stack.enter_context(torch.no_grad())
        device = stack.enter_context(evaluating(model))
        _begin_random_states()
        yield device


def _begin_random_states() -> None:
    random.seed(0)
    # Not `torch.manual_seed`, which is kept for a device that is not in use yet.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    if numpy is not None:
        numpy.seed(0)


def _values(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [
        (tensor, tensor.detach().clone())
        for tensor in tensors
        if not isinstance(tensor, UninitializedTensorMixin)
    ]


@torch.no_grad()
def _restore_values(values: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in values:
        if tensor.shape != before.shape or tensor.dtype != before.dtype:
            tensor.data = before
        elif not (tensor.device == before.device and torch.equal(tensor, before)):
            set_values(tensor, before)


def set_values(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor, also one that autograd has saved or that was made in inference mode."""
    if tensor.is_inference():
        with torch.inference_mode():
            tensor.copy_(values)
    else:
        tensor.data.copy_(values)


def _restore_modes(modes: dict[nn.Module, bool]) -> None:
    # Parents come first, and may set their children; a module with two parents may need a second
    # round. An attribute is set only where a module's own `train` does not lead back.
    for _ in range(3):
        for module, mode in modes.items():
            if module.training != mode:
                module.train(mode)
    for module, mode in modes.items():
        if module.training != mode:
            module.training = mode


def _attributes(module: nn.Module) -> tuple[dict, list[tuple]]:
    """The attributes of a module, and what those of them hold that change in place."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}, []
    attributes = dict(vars(module))
    attributes.pop("training", None)
    held = []
    for value in attributes.values():
        if isinstance(value, list | deque):
            held.append((value, list(value)))
        elif isinstance(value, dict | set):
            held.append((value, dict(value) if isinstance(value, dict) else set(value)))
        elif isinstance(value, torch.Generator):
            held.append((value, value.get_state()))
        elif isinstance(value, random.Random):
            held.append((value, value.getstate()))
        elif type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
            held.append((value, value.bit_generator.state))
        elif isinstance(value, Tensor):  # neither a parameter nor a buffer
            held.append((value, value.detach().clone()))
    return attributes, held


def _restore_attributes(module: nn.Module, attributes: dict, held: list[tuple]) -> None:
    if not attributes:
        return
    now = vars(module)
    for name in [name for name in now if name not in attributes and name != "training"]:
        del now[name]
    for name, value in attributes.items():
        if now.get(name, _MISSING) is not value:
            now[name] = value
    for value, before in held:
        if isinstance(value, Tensor):
            _restore_values([(value, before)])
        elif isinstance(value, torch.Generator):
            value.set_state(before)
        elif isinstance(value, random.Random):
            value.setstate(before)
        elif isinstance(value, list | deque):
            if len(value) != len(before) or any(
                one is not other for one, other in zip(value, before, strict=True)
            ):
                value.clear()
                value.extend(before)
        elif isinstance(value, set):
            if value != before:
                value.clear()
                value.update(before)
        elif isinstance(value, dict):
            if list(value) != list(before) or any(value[key] is not before[key] for key in before):
                value.clear()
                value.update(before)
        else:
            value.bit_generator.state = before
