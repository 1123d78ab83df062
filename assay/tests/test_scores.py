"""Shares, pass@k and the leaderboard: known values, and infrastructure that counts for nobody."""

from typing import Any

import pytest

from assay.report import scores
from assay.statistics.shares import pass_at, wilson


@pytest.mark.parametrize(
    ("successes", "attempts", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (18, 39, 0.3157, 0.6143),
    ],
)
def test_wilson(successes: int, attempts: int, low: float, high: float) -> None:
    assert wilson(successes, attempts) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_its_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    for wrong in ((2, 1), (-1, 1)):
        with pytest.raises(ValueError, match="successes: expected 0 to 1"):
            wilson(*wrong)
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1"):
        wilson(1, 1, 1.0)


def test_wilson_covers() -> None:
    """The share of samples whose interval holds the truth, exactly, is near the level for every truth."""
    import math

    n = 40
    for truth in (0.1, 0.3, 0.5, 0.8):
        chances = [math.comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in range(n + 1)]
        covered = sum(chance for k, chance in enumerate(chances) if wilson(k, n)[0] <= truth <= wilson(k, n)[1])
        assert 0.92 < covered < 0.98


def test_pass_at_is_the_share_of_all_choices() -> None:
    from itertools import combinations

    for attempts in range(1, 7):
        for successes in range(attempts + 1):
            for k in range(1, attempts + 1):
                choices = list(combinations([True] * successes + [False] * (attempts - successes), k))
                assert pass_at(k, attempts, successes) == pytest.approx(sum(map(any, choices)) / len(choices))
    assert pass_at(3, 2, 1) is None
    with pytest.raises(ValueError, match="pass@k: expected k from 1 on"):
        pass_at(0, 2, 1)


def row(
    key: str, who: str, outcome: str, status: int, task: str = "t", p: float = 0.001, **more: Any
) -> dict[str, Any]:
    workload = {"name": "w", "verdict": outcome, "estimate": 0.1, "low": 0.05, "high": 0.2, "blocks": 12, "p": p}
    measured = [workload] if outcome in ("faster", "slower", "undecided") else []
    cost = {"agent_s": 2.0, "judge_s": 1.0, "tokens": 5.0, "money": None}
    found = {"key": key, "who": {"kind": "agent", "name": who}, "outcome": outcome, "status": status, "cost": cost}
    return {**found, "task": {"name": task, "delta": 0.02}, "workloads": measured}


def test_a_leaderboard() -> None:
    rows = [
        row("1", "a", "faster", 0),
        row("2", "a", "infra.provider", 3),
        row("3", "a", "incorrect", 1),
        row("4", "a", "faster", 0, "u"),
        row("5", "a", "void", 3, "u"),
        row("6", "b", "undecided", 5, p=0.4),
        row("7", "b", "task_invalid", 4),
        {**row("8", "null", "faster", 0), "who": {"kind": "canary", "name": "null"}},
    ]
    first, second = scores.leaderboard(rows, (1, 2), 0.05)
    assert (first.who, first.attempts, first.spoilt, first.successes) == ("a", 3, 2, 2)
    assert first.pass_at == {1: pytest.approx(0.75), 2: None} and first.holds == 2 and first.tokens == 25
    assert (second.who, second.attempts, second.spoilt, second.successes, second.money) == ("b", 1, 1, 0, None)
    assert first.share == wilson(2, 3)


def test_holm_over_the_whole_campaign() -> None:
    rows = [row(str(i), "a", "faster", 0, p=0.004) for i in range(12)]
    assert scores.kept(rows, 0.05) == {str(i) for i in range(12)}
    assert scores.kept([*rows, row("12", "a", "undecided", 5, p=0.5)], 0.05) == set()
    assert scores.kept([row("1", "a", "slower", 1, p=0.0001), row("2", "a", "faster", 0, p=0.02)], 0.05) == {"2"}
    two = row("1", "a", "faster", 0, p=0.03)
    assert scores.kept([{**two, "workloads": two["workloads"] * 2}], 0.05) == set()
