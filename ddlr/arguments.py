"""Arguments as callers have them: numbers of Python, numpy or torch, and choices among words."""

import math
from collections.abc import Sequence
from numbers import Integral, Real


def as_number(
    value: object, name: str, *, highest: float = math.inf, positive: bool = False
) -> float:
    """A finite number from 0 upwards as an int or a float of Python; these stay as they are.

    Parameters
    ----------
    value : object
        A number of Python or numpy, or a tensor or an array without dimensions.
    name : str
        Name of the argument, for the error.
    highest : float
        The largest value that is allowed.
    positive : bool
        Whether 0 is refused.

    Raises
    ------
    ValueError
        If the value is no number or out of range; bool, nan and infinity are no numbers here.
    """
    number = _plain(value)
    if (
        number is None
        or not 0 <= number <= highest
        or not math.isfinite(number)
        or (positive and number == 0)
    ):
        allowed = "from 0 upwards" if highest == math.inf else f"between 0 and {highest}"
        allowed = "a positive number" if positive else f"a number {allowed}"
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    return number


def as_whole_number(value: object, name: str, *, lowest: int = 0) -> int:
    """A whole number from `lowest` upwards as an int; 1e4 is one. Raises as `as_number` does."""
    number = _plain(value)
    if number is None or not math.isfinite(number) or number != int(number) or number < lowest:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {lowest} upwards")
    return int(number)


def _plain(value: object) -> int | float | None:
    """A number of Python's own types, or None where the value is no number."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def one_of(value: object, name: str, choices: Sequence[str]) -> str:
    """A value that has to be one of some words.

    Raises
    ------
    ValueError
        If it is not; names the argument, the value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {tuple(choices)}")
    return value
