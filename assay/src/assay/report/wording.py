"""How figures are written for people: changes as per cent or as a factor, levels of intervals, quantities."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

_FACTOR = math.log(2)
"""A change from here on, either way, is a factor: +45620.64 % tells nobody anything."""


def change(log_ratio: float, *, as_factor: bool | None = None) -> str:
    """A log-ratio of base over candidate: per cent with its sign, or from twice as fast or slow on a factor, ×4.6.

    `as_factor` says which, so that an estimate and its interval are written alike; infinity is "unbounded".
    """
    if math.isinf(log_ratio):
        return "unbounded"
    if abs(log_ratio) >= _FACTOR if as_factor is None else as_factor:
        return f"×{_three(math.exp(log_ratio))}"
    return f"{math.expm1(log_ratio):+.2%}"


def changes(estimate: float, interval: Sequence[float | None]) -> tuple[str, str, str]:
    """An estimate and the ends of its interval, all per cent or all factors as the estimate is; null is unbounded."""
    factor = abs(estimate) >= _FACTOR
    low, high = (-math.inf if interval[0] is None else interval[0], math.inf if interval[1] is None else interval[1])
    shown = [change(value, as_factor=factor) for value in (estimate, low, high)]
    return shown[0], shown[1], shown[2]


def beside_margin(verdict: str, material: bool, low: float | None, high: float | None, delta: float) -> str:
    """Where the interval of a difference lies beside the margin: ", beyond the margin"; "" for other verdicts.

    An interval that is open to one side has an end of None or infinity.
    """
    if verdict not in ("faster", "slower"):
        return ""
    if material:
        return ", beyond the margin"
    margin = math.log1p(delta)
    inside = low is not None and high is not None and -margin <= low and high <= margin
    return ", within the margin" if inside else ", not shown to be beyond the margin"


def level(alpha: float) -> str:
    """The level of an interval in per cent, which is never rounded up to 100: 0.0005 is 99.95 %."""
    error = Decimal(f"{100 * alpha:.2g}")
    return f"{(Decimal(100) - error).normalize():f} %"


def quantity(name: str, value: float) -> str:
    """A figure with its unit, by the figure's name; seconds unless that says otherwise."""
    if name == "memory":
        return f"{value / 1024:.1f} MiB"
    if name == "processors":
        return f"{value:.2f}"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value * 1e9:.4g} ns"


def worse(found: Sequence[Mapping[str, Any]]) -> str:
    """What got worse beside the figure that is judged, in words; "" if nothing did."""
    shown = []
    for one in found:
        before, after = (quantity(one["name"], one[arm]) for arm in ("base", "candidate"))
        shown.append(f"{_NAMES.get(one['name'], one['name'])} {before} to {after}")
    return f"worse: {'; '.join(shown)}" if shown else ""


_NAMES = {"first": "first call", "processors": "processors used", "cpu": "processor time"}


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1e}"
