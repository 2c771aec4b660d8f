"""What is said about a list of times: quartiles, ratios turn by turn, geometric means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Quartiles(NamedTuple):
    """First quartile, median, third quartile; linear between order statistics, as in NumPy."""

    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """The three quartiles of at least one value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values: expected at least one, got none")
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(times: Sequence[float], base: Sequence[float]) -> Quartiles:
    """Quartiles of time / base, taken within each turn: both met the same machine.

    Raises:
        ValueError: lists of different lengths, or none.
    """
    if len(times) != len(base):
        raise ValueError(f"times: expected {len(base)} of them, as in base, got {len(times)}")
    return quartiles([time / other for time, other in zip(times, base, strict=True)])


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm: the mean of ratios, whichever way they are taken.

    Raises:
        ValueError: no values, or one that is not positive.
    """
    if not values or min(values) <= 0.0:
        raise ValueError(f"values: expected at least one, all positive, got {list(values)}")
    return math.exp(math.fsum(map(math.log, values)) / len(values))
