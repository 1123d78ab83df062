"""What can be done where a measurement showed nothing, from the rows of RAW."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from assay.contract.outcome import NOTHING
from assay.machine import load
from assay.machine.conditions import VERY_PATIENT_S

_ONE_THREAD = 1.1
"""Processors that all arms of a block together use, at most, where code works with one thread."""
_ROUNDS = 32


def advice(verdict: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about a `void` or a machine that is too noisy; none for other verdicts.

    `rows`: of RAW, the header first. Fields that earlier RAW does not have count as unknown.
    """
    if verdict not in NOTHING or not rows:
        return []
    header, blocks = rows[0], [row for row in rows if row["kind"] == "block"]
    reasons = [words for row in blocks for words in row["reasons"]]
    loaded = sum(words.startswith(load.FOREIGN) for words in reasons)
    found = [_who(blocks)] if loaded else []
    if loaded and header.get("patience_s", 0.0) < VERY_PATIENT_S:
        found.append("--patient lets each block wait until others rest")
    if len(header.get("processors", [])) > 1 and _one_thread(blocks):
        found.append("--pin keeps judge and arms on the quietest processor, for code with one thread as this")
    if loaded:
        found.append("--isolate keeps others off that processor, where control groups may be made")
    if any("outlived" in words or "frozen" in words for words in reasons):
        found.append("processes that an arm leaves behind, or that work while it is frozen, have to end with its call")
    if not loaded and header["plan"]["workload"].get("rounds", 1) < _ROUNDS and header.get("calls"):
        found.append(f"--rounds {_ROUNDS} (`rounds` of a workload) lets the arms of a block take more turns")
    if not header["plan"].get("instructions"):
        found.append("--instructions (`instructions` of a workload) counts them in each arm, which load hardly changes")
    found.append("`assay doctor` says how small an effect this machine could show")
    return found


def _who(blocks: Sequence[Mapping[str, Any]]) -> str:
    """How much others used in blocks that were left out, and who."""
    left_out = [row for row in blocks if row["reasons"] and row.get("foreign_cpu_s") is not None]
    seconds = sum(row["elapsed_s"] for row in left_out) or 1.0
    used: dict[str, float] = {}
    for row in left_out:
        for name, one in row.get("others", {}).items():
            used[name] = used.get(name, 0.0) + one
    who = ", ".join(f"{name} {one / seconds:.2f}" for name, one in sorted(used.items(), key=lambda pair: -pair[1])[:3])
    foreign = sum(row["foreign_cpu_s"] for row in left_out) / seconds
    return f"others used {foreign:.2f} of a processor in blocks that were left out{f': {who}' * bool(who)}"


def _one_thread(blocks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the arms, which take turns, never used more than one processor."""
    shares = [sum(row["cpu_s"].values()) / row["elapsed_s"] for row in blocks if row.get("cpu_s") and row["elapsed_s"]]
    return bool(shares) and statistics.median(shares) <= _ONE_THREAD
