"""What a few repeated measurements say: 95 % intervals of a mean, a standard deviation and a correlation, and a slope."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
FEWEST_OF_CORRELATION = 4  # pairs from which Fisher's transformation has an error


class Interval(NamedTuple):
    """An estimate and where it lies with 95 % confidence; NaN for what so few values do not tell."""

    estimate: float
    low: float
    high: float
    number: int  # of values that it is of

    def __neg__(self) -> "Interval":
        return Interval(-self.estimate, -self.high, -self.low, self.number)


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values; of one value no interval, of none no mean."""
    from scipy import special

    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = float(special.stdtrit(count - 1, (1 + LEVEL) / 2)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def deviation_interval(values: Sequence[float]) -> Interval:
    """Standard deviation of independent values, and its interval when they are normal (chi-squared)."""
    from scipy import special

    count = len(values)
    if count < 2:
        return Interval(math.nan, math.nan, math.nan, count)
    deviation, freedom = float(np.std(values, ddof=1)), count - 1
    low, high = (
        deviation * math.sqrt(freedom / float(special.chdtri(freedom, share)))
        for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    )
    return Interval(deviation, low, high, count)


def correlation_interval(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Pearson's r of independent pairs, and its interval by Fisher's transformation; NaN where one side is constant."""
    from scipy import special

    count = len(x)
    if count < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return Interval(math.nan, math.nan, math.nan, count)
    r = float(np.corrcoef(x, y)[0, 1])
    if count < FEWEST_OF_CORRELATION:
        return Interval(r, math.nan, math.nan, count)
    if abs(r) >= 1:
        return Interval(r, r, r, count)
    half = float(special.ndtri((1 + LEVEL) / 2)) / math.sqrt(count - 3)
    return Interval(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), count)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares through points; NaN where all have one x."""
    return float(np.polyfit(x, y, 1)[0]) if len(set(x)) > 1 else math.nan
