"""Which size to try next, on the way to the smallest one whose error is within a radius."""

import math
from collections.abc import Mapping

RESOLUTION = 1.01
"""The answer is within the radius; one so many times smaller was not."""

_TINY = 1e-9
# The error goes about so with the number of nonzeros, in logarithms.
_SLOPE = -0.6
_GROWTH = 2.0
# Of the smallest size that is enough: the next one, while none has missed.
_LEAST, _MOST = 0.1, 0.8


def log_ratio(error: float, radius: float) -> float:
    """The logarithm of an error relative to a radius, finite also where one of them is 0."""
    ratio = error / radius if radius else math.inf if error else 0.0
    return math.log(min(max(ratio, _TINY), 1 / _TINY))


def extrapolated(error: float) -> float:
    """By what factor a size has to change for its error to meet the radius, by experience."""
    return math.exp(error / -_SLOPE)


def next_size(errors: Mapping[int, float], missed: int, kept: int) -> int:
    """Where the logarithm of the error is expected to meet that of the radius, from below.

    By interpolation between a size that is not enough and one that is; before there is one that
    is, somewhat below where it seems to be, and at most twice as much. It lies between both sizes,
    and by a factor of `RESOLUTION` away from them where there is room for that.

    Parameters
    ----------
    errors : mapping of int to float
        `log_ratio` of the sizes that were tried.
    missed, kept : int
        The largest size that was not enough, or 0, and the smallest that is, or the whole.
    """
    if missed in errors and kept in errors:
        share = errors[missed] / (errors[missed] - min(errors[kept], -_TINY))
        guess = missed * (kept / missed) ** min(max(share, 0.1), 0.9)
    elif missed in errors:
        guess = missed * min(extrapolated(errors[missed]), _GROWTH)
    elif kept in errors:
        guess = kept * min(max(extrapolated(errors[kept]), _LEAST), _MOST)
    else:
        guess = kept / _GROWTH
    guess = min(max(guess, RESOLUTION * missed), kept / RESOLUTION)
    return min(max(round(guess), missed + 1), kept - 1)
