"""One procedure for estimate, test and interval, and the verdict that follows from it.

Data are log-ratios, one a block: log(time of base / time of candidate), so above 0 means faster. Where nothing differs
they are symmetric about 0, however skewed times are, because the arms of a block run in random order. The estimate is
that of Hodges and Lehmann (1963), the median of the Walsh averages; the test is Wilcoxon's signed-rank test (1945) with
its exact distribution; the interval is that test inverted, so it excludes 0 exactly when the test rejects 0. The mean
and its t-interval are not used: a few blocks that the machine disturbed make its power fall as blocks are added.
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


@dataclass(frozen=True)
class Look:
    """A number of blocks at which the experiment may stop, and the level of the test there."""

    blocks: int
    alpha: float


LOOKS = (Look(12, 0.001), Look(24, 0.001), Look(40, 0.003))
"""The protocol's: the levels add up to 0.005 (Bonferroni), so looking three times costs no more than that."""
VOID_ALPHA = 0.001
MOST_CONTAMINATED = 0.25


@dataclass(frozen=True)
class Judgement:
    """What one workload's blocks say."""

    verdict: str
    """faster, slower, equivalent, undecided or void; "continue" before the last look."""
    reason: str
    estimate: float
    """Log-ratio, base over candidate: 0.02 is about 2 % faster."""
    interval: Interval
    """At the level of the look."""
    blocks: int
    alpha: float
    material: bool
    """Whether the interval lies beyond the margin delta altogether."""
    detectable: float
    """Half the width of the 95 % interval: an effect that blocks like these would have shown."""


def judge(
    base: ArrayLike,
    candidate: ArrayLike,
    control: ArrayLike | None = None,
    *,
    delta: float = 0.02,
    contaminated: int = 0,
    looks: Sequence[Look] = LOOKS,
) -> Judgement:
    """The verdict at the last look that these blocks reach.

    Args:
        base: [blocks] seconds of the base tree, clean blocks only.
        candidate: [blocks] seconds of the candidate.
        control: [blocks] seconds of A', a second build of base, which decides whether the blocks judge anything. It is
            not averaged with base: the mean of two skewed times less a third is not symmetric when nothing differs.
        delta: the margin of "equivalent" and "material", as a fraction.
        contaminated: blocks left out because something else ran.

    Raises ValueError for lengths that differ, times that are not positive, or fewer blocks than the first look has.
    """
    times = [np.log(_positive("base", base)), np.log(_positive("candidate", candidate))]
    if control is not None:
        times.append(np.log(_positive("control", control)))
    lengths = [len(array) for array in times]
    if len(set(lengths)) > 1:
        raise ValueError(f"candidate, control: expected as many blocks as base, {lengths[0]}, got {lengths[1:]}")
    if delta <= 0:
        raise ValueError(f"delta: expected a positive fraction, got {delta}")
    reached = [look for look in looks if look.blocks <= lengths[0]]
    if not reached:
        raise ValueError(f"base: expected at least {looks[0].blocks} blocks, got {lengths[0]}")
    look, last = reached[-1], reached[-1] == looks[-1]
    n, margin = look.blocks, math.log1p(delta)
    arms = [array[:n] for array in times]
    reason = _void(arms, n, margin, contaminated, last)
    ratios = arms[0] - arms[1]
    interval = exact_interval(ratios, look.alpha)
    material = interval.low > margin or interval.high < -margin
    if reason:
        verdict = "void"
    elif interval.low > 0:
        verdict, reason = "faster", "the interval lies above 0"
    elif interval.high < 0:
        verdict, reason = "slower", "the interval lies below 0"
    elif not last:
        verdict, reason = "continue", "the interval holds 0 and more blocks are allowed"
    elif exact_interval(ratios, 0.1).within(margin):
        verdict, reason = "equivalent", f"the 90 % interval lies within {delta:.3g} of no change"
    else:
        verdict, reason = "undecided", "neither a difference nor its absence was shown"
    detectable = exact_interval(ratios, 0.05).width / 2
    return Judgement(verdict, reason, hodges_lehmann(ratios), interval, n, look.alpha, material, detectable)


def _void(arms: list[Floats], n: int, margin: float, contaminated: int, last: bool) -> str:
    """Why these blocks judge nothing; "" if they do."""
    if contaminated > MOST_CONTAMINATED * (n + contaminated):
        return f"{contaminated} of {n + contaminated} blocks were contaminated"
    if len(arms) < 3:
        return ""
    null = arms[0] - arms[2]
    if exact_interval(null, VOID_ALPHA).excludes(0):
        return "two builds of base differ"
    if last and exact_interval(null, 0.05).width > 2 * margin:
        return "two builds of base scatter by more than the margin"
    return ""


def _checked(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not 1 <= len(array) <= MAX_BLOCKS:
        raise ValueError(f"values: expected a vector of 1 to {MAX_BLOCKS} numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("values: expected finite numbers, got infinities or NaN")
    return array


def _positive(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not (array > 0).all() or not np.isfinite(array).all():
        raise ValueError(f"{name}: expected a vector of positive, finite seconds, got {array!r}")
    return array
