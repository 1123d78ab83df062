"""The protocol's looks, and the verdict on the blocks that one of them sees."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from assay.statistics.signed_rank import Floats, Interval, exact_interval, hodges_lehmann


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

    Raises ValueError for lengths that differ, times that are not positive, fewer blocks than the first look has or more
    than the last, a margin or a number of contaminated blocks that is none.
    """
    times = [np.log(_positive("base", base)), np.log(_positive("candidate", candidate))]
    if control is not None:
        times.append(np.log(_positive("control", control)))
    lengths = [len(array) for array in times]
    if len(set(lengths)) > 1:
        raise ValueError(f"candidate, control: expected as many blocks as base, {lengths[0]}, got {lengths[1:]}")
    if not 0 < delta < math.inf:
        raise ValueError(f"delta: expected a positive fraction, got {delta}")
    if contaminated < 0:
        raise ValueError(f"contaminated: expected a number of blocks, got {contaminated}")
    if lengths[0] > looks[-1].blocks:
        raise ValueError(f"base: expected at most {looks[-1].blocks} blocks, those of the last look, got {lengths[0]}")
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


def _positive(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not (array > 0).all() or not np.isfinite(array).all():
        raise ValueError(f"{name}: expected a vector of positive, finite seconds, got {array!r}")
    return array
