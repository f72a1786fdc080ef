"""Whether a compressed layer runs as fast as the dense one: break-even by measured time."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ddlr.arguments import as_number, as_whole_number
from ddlr.compacting import compact

BREAK_EVENS = ("parameters", "latency")

# A timing lasts so long that reading the clock, some 0.1 microseconds, does not count in it.
_SECONDS_PER_TIMING = 2e-4
_MOST_CALLS = 1000  # of a layer in one timing, however fast it is


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A rule that keeps a compressed layer only if it is measured to be faster than the dense one.

    Both are timed in turn, in evaluation mode, on the calibration samples, with the threads that
    torch has. The smallest time of each counts, since whatever else the machine does adds to a
    time. The result depends on the machine, and near a tie on chance.

    Attributes
    ----------
    batch_sizes : sequence of int
        Rows of each batch. The layer has to be faster at all of them. 1 and 256 unless given: a
        single request, which waits for weights to be read and for calls, and a batch that is bound
        by arithmetic. Who runs batches of one size alone names it.
    margin : float
        Share of the dense layer's time by which the compressed one has to be below it; a repeated
        measurement scatters by less.
    rounds : int
        Timings of each form at each batch size.
    clock : callable
        The time in seconds, as `time.perf_counter`.

    Raises
    ------
    ValueError
        If a value is out of its range; names it.
    """

    batch_sizes: Sequence[int] = (1, 256)
    margin: float = 0.05
    rounds: int = 15
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)

    def __post_init__(self):
        sizes = tuple(as_whole_number(size, "batch_sizes", lowest=1) for size in self.batch_sizes)
        if not sizes:
            raise ValueError("batch_sizes is empty; give at least one number of rows")
        object.__setattr__(self, "batch_sizes", sizes)
        as_number(self.margin, "margin", highest=0.99)
        as_whole_number(self.rounds, "rounds", lowest=1)

    def keeps(self, layer: nn.Module, dense: nn.Module, inputs: Tensor) -> bool:
        """Whether a compressed layer is faster than the dense one in its place.

        Parameters
        ----------
        layer : nn.Module
            As a method stores it. It is measured as it is deployed, see `ddlr.compact`. One that is
            deployed as an `nn.Linear` of the same shape does the same work, and is kept.
        dense : nn.Module
            The layer that is stored otherwise.
        inputs : Tensor, shape (samples, in_features)
            Are repeated where a batch has more rows.
        """
        deployed = compact(layer)
        if type(deployed) is nn.Linear and deployed.weight.shape == dense.weight.shape:
            return True
        like = next(dense.parameters())
        for size in self.batch_sizes:
            batch = rows_of(inputs, size).to(like)
            dense_seconds, seconds = fastest_times(
                (dense, deployed), batch, rounds=self.rounds, clock=self.clock
            )
            if not seconds <= (1 - self.margin) * dense_seconds:
                return False
        return True


def as_rule(break_even: str | Latency) -> Latency | None:
    """The rule of `ddlr.Settings.break_even`; None where parameters alone are counted.

    Raises
    ------
    ValueError
        If it is neither of `BREAK_EVENS` nor a `Latency`.
    """
    if isinstance(break_even, Latency):
        return break_even
    if break_even not in BREAK_EVENS:
        raise ValueError(
            f"break_even is {break_even!r}; choose one of {BREAK_EVENS}, or give a ddlr.Latency"
        )
    return Latency() if break_even == "latency" else None


def rows_of(inputs: Tensor, size: int) -> Tensor:
    """The first rows, in memory of their own; from the first again where there are too few."""
    if len(inputs) == 0:
        raise ValueError("inputs has no rows; at least one is needed to time a layer")
    return inputs[torch.arange(size, device=inputs.device) % len(inputs)]


def fastest_times(
    functions: Sequence[Callable[[object], object]],
    inputs: object,
    *,
    rounds: int,
    seconds: float = _SECONDS_PER_TIMING,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """The smallest time of a call of each function, in seconds; all are timed anew in each round.

    So all see the same state of the machine, one after the other, each round from another one on.
    Modules are put into evaluation mode for it, and gradients are off.

    Parameters
    ----------
    inputs : object
        The argument of all functions.
    rounds : int
        Timings of each function.
    seconds : float
        Functions that are faster are called repeatedly for so long in one timing.
    """
    modules = [each for each in functions if isinstance(each, nn.Module)]
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with torch.inference_mode():
            calls = [_calls_for(each, inputs, seconds, clock) for each in functions]
            best = [math.inf] * len(functions)
            for turn in range(rounds):
                for step in range(len(functions)):
                    index = (turn + step) % len(functions)
                    took = _time_of(functions[index], inputs, calls[index], clock)
                    best[index] = min(best[index], took)
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
    return best


def _calls_for(
    function: Callable, inputs: object, seconds: float, clock: Callable[[], float]
) -> int:
    """Calls of a function that take some time; also warms it up."""
    _time_of(function, inputs, 1, clock)
    took = _time_of(function, inputs, 1, clock)
    return _MOST_CALLS if took * _MOST_CALLS <= seconds else max(1, math.ceil(seconds / took))


def _time_of(function: Callable, inputs: object, calls: int, clock: Callable[[], float]) -> float:
    """Seconds of one of some calls in a row."""
    _wait_for_devices(inputs)
    started = clock()
    for _ in range(calls):
        function(inputs)
    _wait_for_devices(inputs)
    return (clock() - started) / calls


def _wait_for_devices(inputs: object) -> None:
    if isinstance(inputs, Tensor) and inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)
