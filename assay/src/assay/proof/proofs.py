"""The parts of the full proof: a row per condition. Each is a file of experiments, which the same command continues."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from assay.proof import campaign, goals

Told = Callable[[str], None]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Proof:
    """Experiments of one condition, and what they have to come to."""

    words: str
    experiments: int
    """How many make it complete."""
    experiment: Callable[[int, Told], dict[str, Any]]
    """One of them, by its number."""
    summary: Callable[[Rows], dict[str, Any]]
    met: Callable[[Mapping[str, Any]], list[str]]
    """What of it is broken, in words."""
    lines: Callable[[Mapping[str, Any]], list[str]]
    """Its counts, in words."""


def _planted(condition: str, number: int, told: Told) -> dict[str, Any]:
    with campaign.load(condition):
        return campaign.experiment(number, condition, told)


def _planted_lines(counts: Mapping[str, Any]) -> list[str]:
    found = [f"{counts['void']} void; null called: {counts['null_called']} (allowed {counts['null_allowed']})"]
    for arm, one in counts["planted"].items():
        held = f"{one['covered']} of {one['valid']} (needed {one['needed']})"
        found.append(f"{arm}: 95 % interval holds the truth in {held}; called slower in {one['found']}")
    return found


def _verdicts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{number} {word}" for word, number in counts["verdicts"].items())


def _busy_lines(counts: Mapping[str, Any]) -> list[str]:
    in_time = f"{counts['in_time']} called faster within {goals.MOST_S:.0f} s"
    return [
        f"{_verdicts(counts)}; {in_time}",
        f"half took {counts['median_s']:.0f} s at most, the longest {counts['longest_s']:.0f} s",
    ]


def _short_lines(counts: Mapping[str, Any]) -> list[str]:
    loops = ", ".join(map(str, counts["loops"]))
    called = f"null called: {counts['null_called']} (allowed {counts['null_allowed']})"
    return [f"{_verdicts(counts)}; {called}; calls in loops of {loops}"]


PROOFS = {
    **{
        condition: Proof(
            words,
            200,
            partial(_planted, condition),
            campaign.summary,
            partial(campaign.met, condition),
            _planted_lines,
        )
        for condition, words in campaign.CONDITIONS.items()
    },
    "busy": Proof(
        "a tenth less to do in calls of 20 ms, beside a process that is busy half of each 0.1 s",
        50,
        goals.beside_load,
        goals.busy_summary,
        goals.busy_met,
        _busy_lines,
    ),
    "short": Proof(
        "two equal trees and calls of 2 µs in automatic loops",
        200,
        goals.short,
        goals.short_summary,
        goals.short_met,
        _short_lines,
    ),
}
