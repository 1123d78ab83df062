"""Where a value stands in a TOML text: tomllib keeps no positions, and errors should name a line."""

import re
from collections.abc import Sequence

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


def line_of(text: str, place: Sequence[str | int]) -> int:
    """The line on which a value of a TOML text is given, or the nearest one above it in the structure.

    tomllib keeps no positions. Table headers and keys at the beginning of a line are found; what stands inside an
    inline table is looked up on the lines of its key, and taken to be there.
    """
    best, at = 1, 0
    table: tuple[str | int, ...] = ()
    counts: dict[tuple[str | int, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            names = _parts(header[2])
            if header[1] == "[[":
                parent = _indexed(names[:-1], counts)
                counts[(*parent, names[-1])] = counts.get((*parent, names[-1]), -1) + 1
            table = _indexed(names, counts)
            here: tuple[str | int, ...] = table
        elif key:
            here = (*table, *_parts(key[1]))
        else:
            here = ()
        if here and len(here) > at and tuple(place[: len(here)]) == here:
            best, at = number, len(here)
    inside = [part for part in place[at:] if isinstance(part, str)]
    for number, line in enumerate(text.splitlines()[best - 1 :], best):
        if number > best and (_HEADER.match(line) or _KEY.match(line)):
            break
        if inside and re.search(rf"\b{re.escape(inside[-1])}\b\s*=", line):
            return number
    return best


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def _indexed(names: Sequence[str], counts: dict[tuple[str | int, ...], int]) -> tuple[str | int, ...]:
    """A table's name with the numbers of the arrays that it lies in."""
    found: tuple[str | int, ...] = ()
    for name in names:
        found = (*found, name)
        if found in counts:
            found = (*found, counts[found])
    return found
