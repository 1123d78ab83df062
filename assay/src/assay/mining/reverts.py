"""Is a commit the revert of another? By its words, by the inverse of an ancestor's patch, by what it takes away."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from assay.mining import history
from assay.mining.history import Commit
from assay.repository.lines import Lines

_SUBJECT = re.compile(r"""^(?:\[?revert\]?:?\s+|reverts\s+)["'“]?(?P<subject>.+?)["'”]?\s*$""", re.IGNORECASE)
_NUMBERS = re.compile(r"""["'”]?\s*\(#\d+\)\s*$""")
_NAMED = re.compile(r"\breverts? commit ([0-9a-f]{7,40})\b|\breverts? #?(?:pull request )?#(\d+)", re.IGNORECASE)
_ANCESTORS = 400
"""Commits of the changed paths among which an inverse patch is looked for."""
_ALIKE = 0.8
"""Share of an ancestor's lines above which a patch is its inverse: what was edited since keeps a few from matching."""
_LEAST_LINES = 4


@dataclass(frozen=True)
class Revert:
    """A commit that takes back another one."""

    how: str
    """subject, body or inverse."""
    words: str
    commit: str = ""
    """What is reverted, if it was found."""


def says(subject: str, body: str = "") -> bool:
    """Whether a commit's own words say that it is a revert."""
    return bool(_SUBJECT.match(subject) or _NAMED.search(body))


def found(repository: Path, one: Commit) -> list[Revert]:
    """All signs that a commit reverts an ancestor, and which. GitError if the commit's history cannot be read.

    What takes back a revert brings an optimisation back, and is none.
    """
    signs = []
    earlier: list[Commit] = []
    if one.parent and one.files:
        earlier = history.commits(repository, (one.parent,), paths=sorted(one.files), most=_ANCESTORS)
    if (match := _SUBJECT.match(one.subject)) and not says(match["subject"]):
        wanted = bare(match["subject"])
        named = next((old for old in earlier if bare(old.subject) == wanted), None)
        which = f"{named.name[:12]}, {named.subject!r}" if named else "a commit that is not among its ancestors"
        signs.append(Revert("subject", f"its subject says so: {one.subject!r} takes back {which}", _name(named)))
    if match := _NAMED.search(one.body):
        named = next((old for old in earlier if _is(old, match[1], match[2])), None)
        if named and says(named.subject, named.body):
            return signs
        signs.append(Revert("body", f"its message says so: {match[0]!r}", _name(named)))
    if inverse := _inverse(repository, one, earlier):
        old, share = inverse
        words = f"its patch is the inverse of {old.name[:12]}, {old.subject!r}: {share:.0%} of the lines agree"
        signs.append(Revert("inverse", words, old.name))
    return signs


def bare(subject: str) -> str:
    """A subject without numbers of pull requests and quotation marks at its end, to be compared."""
    while (shorter := _NUMBERS.sub("", subject).rstrip("\"'” ")) != subject:
        subject = shorter
    return subject.strip().lower()


def takes_away(changed: dict[str, Lines]) -> str:
    """How a patch takes code away together with its tests, in words; "" if it does not.

    Less code may well be faster. A patch that removes twice as many lines of source as it adds, and whose tests lose
    lines as well, removes something that worked.
    """
    sizes = {path: (len(one.new), len(one.gone)) for path, one in changed.items()}
    return removal(sizes)


def removal(sizes: dict[str, tuple[int, int]]) -> str:
    """The same from numbers of lines, (added, removed) by path."""
    source, checks = (_total(sizes, which) for which in (history.is_source, _checks))
    if source[1] < max(2 * source[0], 2 * _LEAST_LINES) or checks[1] <= checks[0]:
        return ""
    return (
        f"sources lose {source[1]} lines for {source[0]} new ones, and tests and benchmarks lose {checks[1]} "
        f"for {checks[0]}: what they tested is gone"
    )


def _checks(path: str) -> bool:
    return history.is_test(path) or history.is_benchmark(path)


def _total(sizes: dict[str, tuple[int, int]], which: object) -> tuple[int, int]:
    assert callable(which)
    chosen = [size for path, size in sizes.items() if which(path)]
    return sum(size[0] for size in chosen), sum(size[1] for size in chosen)


def _inverse(repository: Path, one: Commit, earlier: list[Commit]) -> tuple[Commit, float] | None:
    """The ancestor of whose source lines the patch takes back the most, and their share, if that is enough."""
    mine = history.lines(repository, one.parent, one.name)
    sources = {path for path in mine if history.is_source(path)}
    size = sum(len(mine[path].gone) + len(mine[path].new) for path in sources)
    best: tuple[Commit, float] | None = None
    for old in earlier:
        if says(old.subject, old.body):
            continue
        theirs = sum(sum(old.files[path]) for path in sources & set(old.files))
        if size < _LEAST_LINES or not size / 2 <= theirs + _LEAST_LINES or theirs > 3 * size:
            continue
        share = inverse_share(mine, history.lines(repository, old.parent, old.name, sorted(sources)))
        if share >= _ALIKE and (best is None or share > best[1]):
            best = old, share
    return best


def inverse_share(patch: dict[str, Lines], earlier: dict[str, Lines]) -> float:
    """The share of an earlier patch's lines, of sources in both, that a patch takes back; by the larger of the two."""
    taken = wanted = own = 0
    for path, one in patch.items():
        if not history.is_source(path):
            continue
        own += len(one.gone) + len(one.new)
        if path not in earlier:
            continue
        for mine, theirs in ((one.gone, earlier[path].new), (one.new, earlier[path].gone)):
            taken += sum((Counter(mine) & Counter(theirs)).values())
            wanted += len(theirs)
    return taken / max(wanted, own) if max(wanted, own) else 0.0


def _is(old: Commit, name: str | None, number: str | None) -> bool:
    if name:
        return old.name.startswith(name.lower())
    return number is not None and f"(#{number})" in old.subject


def _name(one: Commit | None) -> str:
    return one.name if one else ""
