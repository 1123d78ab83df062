"""What counts of instructions say, in words, from their row of RAW."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_LEAST, _TIMES = 1e-3, 3.0
"""Counts of equal code may differ by so much, or by three times what two builds of base differ by."""


def found(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Which source counted, what base executes over what candidate and control do, as log-ratios, and a sentence.

    None if RAW has no such row. Log-ratios are None where nothing could be counted.
    """
    row = next((row for row in rows if row["kind"] == "instructions"), None)
    if row is None:
        return None
    counts = row["counts"]
    ratios: dict[str, float | None] = {"candidate": None, "control": None}
    if counts and all(counts.values()):
        ratios = {arm: math.log(counts["base"] / counts[arm]) for arm in ratios}
    return {"source": row["source"], **ratios, "words": _words(row, ratios["candidate"], ratios["control"])}


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sentence, if there is one."""
    seen = found(rows)
    return [seen["words"]] if seen else []


def _words(row: Mapping[str, Any], candidate: float | None, control: float | None) -> str:
    if candidate is None or control is None:
        return f"instructions: not counted: {row['words'] or 'an arm executed none'}"
    floor = max(_LEAST, _TIMES * abs(control))
    word = "alike" if abs(candidate) <= floor else "fewer" if candidate > 0 else "more"
    per = "a run" if row["calls"] <= 1 else "a call"
    return (
        f"instructions: {word}: {row['counts']['candidate']:.6g} {per} against base's {row['counts']['base']:.6g}, "
        f"{math.expm1(-candidate):+.2%}; two builds of base differ by {abs(math.expm1(-control)):.3%} "
        f"({row['what']}); beside times, it decides nothing"
    )
