"""What reports of a campaign share: its rows, the leaderboard in words, effects in words, the patch of a cell."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.report import wording
from assay.report.scores import Line


@dataclass(frozen=True)
class Whole:
    """A campaign's rows and what they come to."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    void: Sequence[str]
    """Why nothing counts, a line per canary that failed."""
    left_out: Sequence[str]
    """Canaries that could not be made."""
    board: Sequence[Line]
    level: float
    kept: Collection[str]
    """Keys of cells whose `faster` Holm's procedure keeps."""


def lines(whole: Whole) -> list[str]:
    """The leaderboard in a few lines of text."""
    found = []
    for line in whole.board:
        figures = "; ".join(f"{name} {words}" for name, words in board_words(line, whole.level))
        found.append(f"{line.who}: {figures}")
    return found


def board_words(line: Line, level: float) -> list[tuple[str, str]]:
    """A line of the leaderboard: what each figure is called, and itself.

    Held are calls of `faster` that Holm's procedure keeps; spoilt is what infrastructure left without an outcome.
    """
    low, high = line.share
    found = [("succeeded", f"{line.successes} of {line.attempts} [{low:.0%}, {high:.0%}]")]
    for k, value in line.pass_at.items():
        found.append((f"pass@{k}", "-" if value is None else f"{value:.0%}"))
    found += [(f"held at {level:.0%}", str(line.holds)), ("spoilt", str(line.spoilt))]
    cost = [f"{line.seconds:.0f} s"]
    reported = (("tokens", line.tokens), ("money", line.money))
    cost += [f"{value:g} {name}" for name, value in reported if value is not None]
    return [*found, ("cost", ", ".join(cost))]


def effects(row: Mapping[str, Any]) -> str:
    """What a cell's workloads say, in words."""
    found = []
    for one in row["workloads"]:
        if one["estimate"] is None:
            found.append(f"{one['name']}: {one['verdict']}")
            continue
        change, low, high = wording.changes(one["estimate"], (one["low"], one["high"]))
        found.append(f"{one['name']}: {change} [{low}, {high}]")
    return "; ".join(found)


def patch_of(folder: Path, row: Mapping[str, Any]) -> bytes:
    """The patch that was judged: the guarded one if there is a judgement, else what was handed in."""
    names = [f"{row['attempt']}/patch.diff"] if row["attempt"] else []
    names += [f"{row['folder']}/run-{row['tries']}/patch.diff", f"{row['folder']}/patch.diff"]
    return next((path.read_bytes() for name in names if (path := folder / name).is_file()), b"")
