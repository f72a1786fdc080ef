"""Tolerances for all layers together, chosen by networks that are made and measured."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from ddlr.goals import Allocation, Option

_FIRST_SHARE = 0.25  # of the trials: allocations of the frontier, before their neighbours


def measured_frontier(
    measure: Callable[[Mapping[str, float]], Allocation],
    predicted: Sequence[Allocation],
    options: Mapping[str, Sequence[Option]],
    *,
    trials: int,
    sizes: tuple[float, float] = (0.0, math.inf),
) -> list[Allocation]:
    """Allocations that no other beats among those whose networks were made, the smallest first.

    The curves of `ddlr.allocate.layer_options` are of each layer alone, on the original network's
    activations, and `ddlr.allocate.frontier` adds them up. In the network the later layers make up
    for the earlier ones, and a layer that leaves out inputs frees the one before it. So some
    allocations of that frontier are made, spread evenly over the logarithms of sizes. Then, one by
    one, neighbours of those that are not beaten: other by one step in the tolerance of one layer.
    The next is the one that is expected to be furthest below the others, if sizes and divergences
    change by the same factors as the curves say. The network as it is comes last.

    Parameters
    ----------
    measure : callable
        Tolerances by layer to the size and the divergence of the network that they make.
    predicted : sequence of Allocation
        As `ddlr.allocate.frontier` gives them for `options`.
    options : mapping of layer name to sequence of Option
    trials : int
        How many networks are made at most.
    sizes : tuple of float
        The smallest and largest numbers of weights that are of interest.
    """
    curves = Curves(options)
    known: dict[tuple[float, ...], Allocation] = {}
    for each in itertools.islice(_spread(predicted, trials, sizes), trials):
        known[curves.key(each.tolerances)] = measure(each.tolerances)
    while len(known) < trials:
        candidates = _neighbours(_unbeaten(known.values()), curves, known, sizes)
        if not candidates:
            break
        best = min(candidates, key=lambda key: _height(candidates[key], known.values()))
        known[best] = measure(curves.tolerances(best))
    untouched = Allocation(predicted[-1].parameters, 0.0, dict.fromkeys(options, 0.0), True)
    return [*_unbeaten(each for each in known.values() if each.divergence > 0), untouched]


class Curves:
    """The tolerances that layers are tried at, with what each is expected to cost."""

    def __init__(self, options: Mapping[str, Sequence[Option]]):
        self._names = list(options)
        self._steps = [{each.tolerance: each for each in options[name]} for name in options]
        self._ladders = [sorted(steps) for steps in self._steps]

    def key(self, tolerances: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(tolerances[name] for name in self._names)

    def tolerances(self, key: Sequence[float]) -> dict[str, float]:
        return dict(zip(self._names, key, strict=True))

    def neighbours(self, key: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
        for layer, ladder in enumerate(self._ladders):
            place = ladder.index(key[layer])
            for other in (place - 1, place + 1):
                if 0 <= other < len(ladder):
                    yield (*key[:layer], ladder[other], *key[layer + 1 :])

    def expected(self, key: tuple[float, ...]) -> tuple[float, float]:
        """Weights, and a divergence as if the roots of the layers' added up; neither is zero."""
        chosen = [steps[tolerance] for steps, tolerance in zip(self._steps, key, strict=True)]
        saved = sum(
            before.parameters_per_output * each.inputs_dropped
            for before, each in itertools.pairwise(chosen)
        )
        weights = sum(each.parameters for each in chosen) - saved
        roots = sum(max(each.divergence, 0.0) ** 0.5 for each in chosen)
        return max(weights, 1), max(roots**2, 1e-12)


def _spread(
    predicted: Sequence[Allocation], trials: int, sizes: tuple[float, float]
) -> Iterator[Allocation]:
    """Allocations of a frontier at even distances in the logarithms of their sizes."""
    inside = [each for each in predicted if sizes[0] <= each.parameters <= sizes[1]]
    inside = [each for each in inside or predicted if each.divergence > 0]
    if not inside:
        return
    low, high = (math.log(max(inside[place].parameters, 1)) for place in (0, -1))
    steps = max(1, round(_FIRST_SHARE * trials) - 1)
    taken = set()
    for step in range(steps + 1):
        size = math.exp(low + (high - low) * step / steps)
        place = min(range(len(inside)), key=lambda at: abs(inside[at].parameters - size))
        if place not in taken:
            taken.add(place)
            yield inside[place]


def _unbeaten(allocations) -> list[Allocation]:
    """Those that none is both smaller and nearer than, the smallest first."""
    kept: list[Allocation] = []
    usable = [each for each in allocations if math.isfinite(each.divergence)]
    for each in sorted(usable, key=lambda each: (each.parameters, each.divergence)):
        if not kept or each.divergence < kept[-1].divergence:
            kept.append(each)
    return kept


def _neighbours(
    unbeaten: Sequence[Allocation],
    curves: Curves,
    known: Mapping[tuple[float, ...], Allocation],
    sizes: tuple[float, float],
) -> dict[tuple[float, ...], tuple[float, float]]:
    """Allocations beside the given ones that are not known yet, with the logarithms expected."""
    candidates: dict[tuple[float, ...], tuple[float, float]] = {}
    for each in unbeaten:
        if each.divergence <= 0:
            continue
        key = curves.key(each.tolerances)
        weights, divergence = curves.expected(key)
        for other in curves.neighbours(key):
            if other in known or not any(other):
                continue
            other_weights, other_divergence = curves.expected(other)
            size = max(each.parameters, 1) * other_weights / weights
            if not sizes[0] <= size <= sizes[1]:
                continue
            lost = each.divergence * other_divergence / divergence
            candidates.setdefault(other, (math.log(size), math.log(lost)))
    return candidates


def _height(point: tuple[float, float], allocations) -> float:
    """How far a point is above the line through those not beaten, in logarithms of divergence."""
    size, lost = point
    line = [
        (math.log(max(each.parameters, 1)), math.log(max(each.divergence, 1e-12)))
        for each in _unbeaten(allocations)
    ]
    if not line:
        return lost
    if size <= line[0][0]:
        return lost - line[0][1]
    if size >= line[-1][0]:
        return lost - line[-1][1]
    (left, high), (right, low) = next(
        pair for pair in itertools.pairwise(line) if pair[0][0] <= size <= pair[1][0]
    )
    share = (size - left) / (right - left) if right > left else 0.0
    return lost - (high + share * (low - high))
