"""What a campaign's rows come to: a line per agent, and which verdicts hold over the whole family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.contract.outcome import INFRA
from assay.statistics.shares import pass_at, wilson
from assay.statistics.signed_rank import holm


@dataclass(frozen=True)
class Line:
    """One agent, or whoever made predictions."""

    who: str
    kind: str
    attempts: int
    """That say something of it."""
    spoilt: int
    """By infrastructure, void or a task that makes no sense: they count for nobody."""
    successes: int
    share: tuple[float, float]
    """Wilson's 95 % interval of the share of successes."""
    pass_at: Mapping[int, float | None]
    """k -> mean over tasks; None if a task has fewer attempts."""
    holds: int
    """Successes called `faster` that Holm's procedure keeps, over the whole campaign."""
    seconds: float
    tokens: float | None
    money: float | None


def counts(row: Mapping[str, Any]) -> bool:
    """Whether a row says something of whoever made the attempt."""
    return not row["outcome"].startswith(INFRA) and row["outcome"] not in ("void", "task_invalid")


def kept(rows: Sequence[Mapping[str, Any]], level: float) -> set[str]:
    """Keys of cells called `faster` whose call Holm's procedure keeps, among all measured attempts.

    A cell's p-value is the smallest of its workloads times their number. A cell that stopped at its first look has at
    least 0.0024, so that at a level of 5 % at most twenty such cells are kept together.
    """
    measured = [row for row in rows if row["who"]["kind"] != "canary" and counts(row) and row["workloads"]]
    values = [min(1.0, len(row["workloads"]) * min(one["p"] for one in row["workloads"])) for row in measured]
    passed = holm(values, level)
    return {row["key"] for row, held in zip(measured, passed, strict=True) if held and row["outcome"] == "faster"}


def leaderboard(rows: Sequence[Mapping[str, Any]], ks: Sequence[int], level: float) -> list[Line]:
    """A line per agent, best first."""
    held, lines = kept(rows, level), []
    for kind, who in dict.fromkeys((row["who"]["kind"], row["who"]["name"]) for row in rows):
        own = [row for row in rows if (row["who"]["kind"], row["who"]["name"]) == (kind, who)]
        if kind == "canary":
            continue
        seen = [row for row in own if counts(row)]
        successes = sum(row["status"] == 0 for row in seen)
        tokens = [row["cost"]["tokens"] for row in own if row["cost"]["tokens"] is not None]
        money = [row["cost"]["money"] for row in own if row["cost"]["money"] is not None]
        lines.append(
            Line(
                who,
                kind,
                len(seen),
                len(own) - len(seen),
                successes,
                wilson(successes, len(seen)),
                {k: _pass(seen, {row["task"]["name"] for row in own}, k) for k in ks},
                sum(row["key"] in held for row in seen if row["status"] == 0),
                sum(row["cost"]["agent_s"] for row in own),
                sum(tokens) if tokens else None,
                sum(money) if money else None,
            )
        )
    return sorted(lines, key=lambda line: (-line.successes / max(1, line.attempts), line.who))


def _pass(rows: Sequence[Mapping[str, Any]], tasks: set[str], k: int) -> float | None:
    values = []
    for task in tasks:
        own = [row for row in rows if row["task"]["name"] == task]
        value = pass_at(k, len(own), sum(row["status"] == 0 for row in own))
        if value is None:
            return None
        values.append(value)
    return sum(values) / len(values)
