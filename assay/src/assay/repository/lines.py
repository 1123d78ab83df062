"""A patch as lines: which lines of which file it takes away and which it adds. Text in, numbers out; nothing is run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_FILE = re.compile(r"^diff --git (?:\"?a/(?P<a>.*?)\"?) (?:\"?b/(?P<b>.*?)\"?)$")
_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@dataclass
class Lines:
    """One file's change: (number, text) of lines that are gone from before, and of lines that are new after."""

    removed: list[tuple[int, str]] = field(default_factory=list)
    added: list[tuple[int, str]] = field(default_factory=list)

    @property
    def gone(self) -> list[str]:
        """Texts of the removed lines, without space around them and without empty ones."""
        return [text.strip() for _, text in self.removed if text.strip()]

    @property
    def new(self) -> list[str]:
        """Texts of the added lines, likewise."""
        return [text.strip() for _, text in self.added if text.strip()]


def parsed(patch: str) -> dict[str, Lines]:
    """Every file that a unified diff names, by its path after the change (before it, for a file that is gone).

    Lines of a hunk are counted, so that a line of a file that looks like a header is none. Binary files have no lines.
    """
    found: dict[str, Lines] = {}
    lines = iter(patch.split("\n"))
    now: Lines | None = None
    for line in lines:
        if head := _FILE.match(line):
            now = found.setdefault(head["b"], Lines())
        elif line.startswith("+++ ") and not line.startswith("+++ /dev/null"):
            path = line[4:].split("\t")[0].strip().strip('"').removeprefix("b/")
            now = found.setdefault(path, Lines())
        elif now is not None and (hunk := _HUNK.match(line)):
            _hunk(lines, now, *(int(number or 1) for number in hunk.groups()))
    return found


def _hunk(lines: Iterator[str], into: Lines, old: int, old_left: int, new: int, new_left: int) -> None:
    while old_left > 0 or new_left > 0:
        line = next(lines, None)
        if line is None:
            return  # the patch was cut short
        sign, text = line[:1], line[1:]
        if sign == "-":
            into.removed.append((old, text))
        elif sign == "+":
            into.added.append((new, text))
        elif sign == "\\":
            continue
        old, old_left = (old + 1, old_left - 1) if sign != "+" else (old, old_left)
        new, new_left = (new + 1, new_left - 1) if sign != "-" else (new, new_left)
