"""Estimate, test and interval of one sample: the Walsh averages and the exact signed-rank test.

Data are log-ratios, one per block: log(time of base / time of candidate), so above 0 means faster. Where nothing
differs they are symmetric about 0, however skewed times are, because the arms of a block run in random order. The
estimate is that of Hodges and Lehmann (1963), the median of the Walsh averages. The test is Wilcoxon's signed-rank
test (1945) with its exact distribution. The interval is that test inverted, so it excludes 0 exactly when the test
rejects 0. The mean and its t-interval are not used: a few disturbed blocks make its power fall as blocks are added.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MAX_BLOCKS = 1000


@dataclass(frozen=True)
class Interval:
    """A closed interval; infinite where so few blocks cannot reach the level."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside."""
        return value < self.low or value > self.high

    def within(self, bound: float) -> bool:
        """Whether the whole interval lies strictly between -bound and bound."""
        return -bound < self.low and self.high < bound

    @property
    def width(self) -> float:
        """The length."""
        return self.high - self.low


def walsh_averages(values: ArrayLike) -> Floats:
    """The averages of all pairs, each value with itself included, ascending: [..., n] -> [..., n (n + 1) / 2]."""
    array = np.asarray(values, dtype=np.float64)
    first, second = np.triu_indices(array.shape[-1])
    averages: Floats = np.sort((array[..., first] + array[..., second]) / 2, axis=-1)
    return averages


def hodges_lehmann(values: ArrayLike) -> float:
    """The median of the Walsh averages of [n] values. Raises ValueError for none or for values that are not finite."""
    return float(np.median(walsh_averages(_checked(values))))


@cache
def rank_sum_counts(n: int) -> tuple[int, ...]:
    """How many of the 2^n sign patterns give each signed-rank sum from 0 to n (n + 1) / 2: exact integers."""
    counts = [1]
    for rank in range(1, n + 1):
        longer = counts + [0] * rank
        for total, count in enumerate(counts):
            longer[total + rank] += count
        counts = longer
    return tuple(counts)


@cache
def depth(n: int, alpha: float) -> int:
    """The largest k with 2 P(signed-rank sum <= k) <= alpha under the null; -1 if there is none."""
    allowed = alpha * 2**n / 2
    cumulated, k = 0, -1
    for count in rank_sum_counts(n):
        cumulated += count
        if cumulated > allowed:
            break
        k += 1
    return k


def exact_interval(values: ArrayLike, alpha: float) -> Interval:
    """The interval of level 1 - alpha (at least) for the centre of [n] symmetrically distributed values.

    It consists of the values that the exact signed-rank test of level alpha does not reject.
    """
    array = _checked(values)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a number in (0, 1), got {alpha}")
    k = depth(len(array), alpha)
    if k < 0:
        return Interval(-math.inf, math.inf)
    averages = walsh_averages(array)
    return Interval(float(averages[k]), float(averages[-1 - k]))


def p_value(values: ArrayLike) -> float:
    """Two-sided exact p-value of the centre 0: the smallest alpha whose interval excludes 0, and at most 1.

    Walsh averages of exactly 0 speak for the null on both sides.
    """
    array = _checked(values)
    averages = walsh_averages(array)
    least = min(int((averages <= 0).sum()), int((averages >= 0).sum()))
    return float(min(1.0, 2 * sum(rank_sum_counts(len(array))[: least + 1]) / 2 ** len(array)))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses Holm's procedure (1979) rejects with family-wise level alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = [False] * len(p_values)
    for step, i in enumerate(order):
        if p_values[i] > alpha / (len(p_values) - step):
            break
        rejected[i] = True
    return rejected


def _checked(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not 1 <= len(array) <= MAX_BLOCKS:
        raise ValueError(f"values: expected a vector of 1 to {MAX_BLOCKS} numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("values: expected finite numbers, got infinities or NaN")
    return array
