"""What a run has used, by its own report: numbers that the template's expressions find in what the agent says."""

import re
from dataclasses import dataclass
from pathlib import Path

from assay.agents.outcome import Outcome
from assay.agents.template import Budget, Reported, Usage

_UNITS = {"k": 1e3, "K": 1e3, "m": 1e6, "M": 1e6}


@dataclass(frozen=True)
class Used:
    """None: the agent said nothing of it."""

    tokens: float | None = None
    money: float | None = None

    def over(self, budget: Budget) -> tuple[Outcome, str] | None:
        """Which budget is spent, and in words how far; None if none is."""
        if budget.tokens is not None and self.tokens is not None and self.tokens > budget.tokens:
            return Outcome.TOKENS, f"it reported {self.tokens:.0f} tokens, more than {budget.tokens}"
        if budget.money is not None and self.money is not None and self.money > budget.money:
            return Outcome.MONEY, f"it reported a cost of {self.money:.4f}, more than {budget.money:g}"
        return None


def used(usage: Usage, output: bytes, home: Path) -> Used:
    """What is known of a run's consumption so far."""
    return Used(*(None if one is None else _figure(one, output, home) for one in (usage.tokens, usage.money)))


def inside(home: Path, name: str) -> Path | None:
    """A file below HOME; None if there is none, or if a link leads out of it."""
    path = home / name
    return path if path.is_file() and path.resolve().is_relative_to(home.resolve()) else None


def _figure(reported: Reported, output: bytes, home: Path) -> float | None:
    text = output
    if reported.file:
        path = inside(home, reported.file)
        text = path.read_bytes() if path else b""
    values = [value for match in re.findall(reported.pattern.encode(), text) if (value := _number(match)) is not None]
    if not values:
        return None
    return sum(values) if reported.combine == "sum" else values[-1]


def _number(match: bytes | tuple[bytes, ...]) -> float | None:
    """The sum of a match's groups."""
    total = 0.0
    for group in (match,) if isinstance(match, bytes) else match:
        word = group.decode(errors="replace").replace(",", "")
        scale = _UNITS.get(word[-1:], 1.0)
        try:
            total += float(word[:-1] if scale != 1.0 else word) * scale
        except ValueError:
            return None
    return total
