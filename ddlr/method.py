"""A method of compressing layers: how a layer is solved, refitted and stored, and no more."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ddlr.arguments import as_number, as_whole_number, one_of
from ddlr.constraints import CONSTRAINTS
from ddlr.inputs import CentredInputs
from ddlr.problem import WarmStart
from ddlr.reduced_rank import RIDGE, check_ridge
from ddlr.result import ConvergenceError, SolverResult
from ddlr.separable import Kernel

ORDERS = ("parallel", "cascade")
REFITS = ("none", "layer", "network")

# Called with a function and its arguments in place of the function itself.
SolveCache = Callable[..., SolverResult]

_OPTION_CHECKS = {
    "tolerance": lambda value: as_number(value, "tolerance", positive=True),
    "max_iterations": lambda value: as_whole_number(value, "max_iterations", lowest=1),
    "ridge": check_ridge,
    "selection": lambda value: as_number(value, "selection", highest=0.99),
    "constraint": lambda value: one_of(value, "constraint", CONSTRAINTS),
}


@dataclass(frozen=True)
class LayerProblem:
    """One layer to be solved, without its inputs and outputs that are always zero.

    Attributes
    ----------
    inputs : CentredInputs of shape (samples, in_features)
    targets : Tensor, shape (samples, out_features)
        The original layer's output, after its activation.
    radius : float
        Frobenius bound on the output error, in units of `targets`.
    activation : {"relu", "none"}
    weight, bias : Tensor
        The original layer's own; a solver begins there.
    original_inputs : bool
        False in cascade order, where layers before this one have been compressed.
    frees : bool
        Whether an input without any weight frees the layer before from an output.
    """

    inputs: CentredInputs
    targets: Tensor
    radius: float
    activation: str
    weight: Tensor
    bias: Tensor
    original_inputs: bool = True
    frees: bool = False


@dataclass(frozen=True)
class Method:
    """All that distinguishes one method from another in the walk over a network's layers.

    Attributes
    ----------
    name : str
        For messages.
    solver : callable
        ``(inputs, targets, radius, *, activation, warm_start, **options)`` to a `SolverResult`, as
        `ddlr.solve_low_rank`. `warm_start` is the original weight and bias.
    store : callable
        ``(weight, bias)`` of a whole layer to the module that takes its place, or None where that
        would not be smaller than the original. Of a method with `parts` also these, by name, where
        the solution has them.
    options : mapping
        Keyword arguments of `solver`, with their values.
    refit : callable, optional
        ``(problem, solved, **refit_options)`` to a better weight and bias of the same size, and to
        their parts where the method has such: the refit "layer".
    refit_options : mapping
        Keyword arguments of `refit`, with their values.
    parts : mapping of str to tuple of bool
        The names of `SolverResult.parts`, and of each whether its rows are the layer's outputs, and
        its columns the layer's inputs.
    on_compressed_inputs : mapping
        Options that are replaced in cascade order behind a compressed layer.
    freeing_nothing : mapping
        Options that are replaced where the layer before has no use of inputs that are not used.
    orders : tuple of str
        Those of `ORDERS` that the method has.
    drops_unread : bool
        Whether a layer is freed from outputs for which the next layer, solved before it, has no
        weights. Its bound is then on the others.
    prepare : callable, optional
        ``(method, captured layers, tolerances by name)`` to a method, for one that has to see all
        layers before it solves the first.
    in_parts : bool
        Whether the solver consists of solves that others may have made, and takes a `SolveCache`
        for these, as ``cache``.
    one_tolerance : bool
        Whether all layers must have the same tolerance, so that there are no goals.
    on_patches : Method, optional
        What convolutions are compressed by, where this method's result is none that they can store.
    of_kernel : callable, optional
        ``(method, kernel)`` to what convolutions are compressed by whose kernel may be split in
        columns and rows, see `ddlr.separable.Kernel`.
    """

    name: str
    solver: Callable[..., SolverResult]
    store: Callable[..., nn.Module | None]
    options: Mapping[str, object] = field(default_factory=dict)
    refit: Callable[..., tuple] | None = None
    refit_options: Mapping[str, object] = field(default_factory=dict)
    parts: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    on_compressed_inputs: Mapping[str, object] = field(default_factory=dict)
    freeing_nothing: Mapping[str, object] = field(default_factory=dict)
    orders: tuple[str, ...] = ORDERS
    drops_unread: bool = False
    prepare: Callable[..., "Method"] | None = None
    in_parts: bool = False
    one_tolerance: bool = False
    on_patches: "Method | None" = None
    of_kernel: "Callable[[Method, Kernel], Method] | None" = None

    def of_layer(self, on_patches: bool, kernel: Kernel | None = None) -> "Method":
        """The method itself, or its substitute for a layer on patches, maybe of a kernel."""
        method = self.on_patches or self if on_patches else self
        if kernel is None or method.of_kernel is None:
            return method
        return method.of_kernel(method, kernel)

    @property
    def refits(self) -> tuple[str, ...]:
        return REFITS if self.refit is not None else ("none", "network")

    @property
    def ridge(self) -> float:
        return self.refit_options.get("ridge", self.options.get("ridge", RIDGE))

    def with_options(self, **given) -> "Method":
        """The method with other options; one that is None stays as it is.

        Raises
        ------
        ValueError
            If the method has no such option, or the value is not usable; names both.
        """
        given = {name: value for name, value in given.items() if value is not None}
        known = [*self.options, *(name for name in self.refit_options if name not in self.options)]
        for name, value in given.items():
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ValueError(
                    f"{name} is {value!r}, but method {self.name!r} has no such option; {has}"
                )
        given = {
            name: _OPTION_CHECKS[name](value) if name in _OPTION_CHECKS else value
            for name, value in given.items()
        }
        on_patches = self.on_patches and self.on_patches.with_options(
            **{name: value for name, value in given.items() if name in self.on_patches.options}
        )
        return dataclasses.replace(
            self,
            on_patches=on_patches,
            options={name: given.get(name, value) for name, value in self.options.items()},
            refit_options={
                name: given.get(name, value) for name, value in self.refit_options.items()
            },
        )

    def check(self, refit: str, order: str) -> None:
        """Raise a ValueError if the method does not have a refit or an order."""
        for name, value, all_values, available in (
            ("refit", refit, REFITS, self.refits),
            ("order", order, ORDERS, self.orders),
        ):
            one_of(value, name, all_values)
            if value not in available:
                raise ValueError(f"{name} is {value!r}; method {self.name!r} has {available}")


def solve_problem(
    method: Method, problem: LayerProblem, *, refit: bool, cache: SolveCache | None = None
) -> SolverResult | ConvergenceError:
    """Solve one layer by a method, from the original weight, and refit it by itself if asked for.

    Parameters
    ----------
    cache : callable, optional
        Called as ``cache(function, *arguments, **keywords)`` for the solve and for the refit; it
        may answer with what it knows of an equal call.

    Returns
    -------
    SolverResult or ConvergenceError
        The error in place of a result that is not within the solver's tolerance, and carries it,
        refitted. It is returned, not raised: what becomes of it is for the walk to say.
    """
    options = dict(method.options)
    if not problem.original_inputs:
        options |= method.on_compressed_inputs
    if not problem.frees:
        options |= method.freeing_nothing
    options |= {
        "activation": problem.activation,
        "warm_start": WarmStart(problem.weight, problem.bias),
    }
    arguments = (problem.inputs, problem.targets, problem.radius)
    failure = None
    try:
        if cache is None:
            solved = method.solver(*arguments, **options)
        elif method.in_parts:
            solved = method.solver(*arguments, **options, cache=cache)
        else:
            solved = cache(method.solver, *arguments, **options)
    except ConvergenceError as error:
        failure, solved = error, error.result
    if refit:
        solved = refit_problem(method, problem, solved, cache=cache)
    return solved if failure is None else ConvergenceError(str(failure), solved)


def refit_problem(
    method: Method, problem: LayerProblem, solved: SolverResult, *, cache: SolveCache | None = None
) -> SolverResult:
    """Refit one solved layer by itself, where the method has a refit."""
    if method.refit is None:
        return solved
    arguments = (method.refit, problem, solved)
    if cache is None:
        return _refitted(*arguments, **method.refit_options)
    return cache(_refitted, *arguments, **method.refit_options)


def _refitted(refit: Callable, problem: LayerProblem, solved: SolverResult, **options):
    started = time.perf_counter()
    weight, bias, *parts = refit(problem, solved, **options)
    return dataclasses.replace(
        solved,
        weight=weight,
        bias=bias,
        parts=parts[0] if parts else None,
        seconds=solved.seconds + time.perf_counter() - started,
    )
