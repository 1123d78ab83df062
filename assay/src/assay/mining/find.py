"""Commits that claim to make something faster, each with its evidence. A claim is where a task begins, and no more."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from assay.contract.mined import Claim, Evidence
from assay.mining import history, reverts
from assay.mining.history import Commit

CLAIMS = (
    r"\b(?:speed[- ]?ups?|sped[- ]up|speed(?:s|ing)?[- ]up|\d+(?:\.\d+)?[x×]|faster|quicker|optimi[sz]\w*"
    r"|perf(?:ormance)?\b|accelerat\w*|fast[- ]?path|overhead|memoi[sz]\w*|vectori[sz]\w*|costly|expensive"
    r"|(?:cut|reduce|less|fewer|avoid|skip) (?:\w+ ){0,3}"
    r"(?:allocations?|copies|copying|latency|calls|checks?|time|cost))"
)
_CLAIM = re.compile(CLAIMS, re.IGNORECASE)
_TIME = r"[\d.]+ ?(?:ns|[uµm]s|s)\b"
FIGURE = re.compile(
    r"\b\d+(?:\.\d+)? ?[x×]\b|\d+(?:\.\d+)?(?:[-–][\d.]+)? ?%"
    rf"|(?:before|after|main|master|base(?:line)?)[^\n]{{0,40}}?{_TIME}|{_TIME} ?(?:->|→|to|vs\.?) ?{_TIME}",
    re.IGNORECASE,
)
_LONGEST = 100
_KNOWN = 12
"""Digits of a commit's name in words."""


@dataclass
class Search:
    """How many commits were looked at, so that what is left out is told."""

    read: int = 0
    claimed: int = 0
    no_source: int = 0
    found: list[Claim] = field(default_factory=list)


def find(
    repository: Path, *, since: str = "", paths: Sequence[str] = (), grep: str = "", revision: str = "HEAD"
) -> Search:
    """Claims of the main line, newest first. `grep` takes the place of the words that claim something.

    ValueError for an expression that is none, GitError for a repository that cannot be read.
    """
    try:
        words = re.compile(grep, re.IGNORECASE) if grep else _CLAIM
    except re.error as problem:
        raise ValueError(f"--grep: expected a regular expression, got {grep!r}: {problem}") from None
    search = Search()
    every = history.commits(repository, (revision,), since=since, paths=paths)
    taken_back = _taken_back(every)
    for one in every:
        search.read += 1
        evidence = list(_evidence(one, words, taken_back))
        if not any(found.kind in ("subject", "body") for found in evidence):
            continue
        search.claimed += 1
        sources = sorted(path for path in one.files if history.is_source(path))
        if not sources or not one.parent:
            search.no_source += 1
            continue
        added, removed = (sum(one.files[path][i] for path in sources) for i in (0, 1))
        search.found.append(
            Claim(
                commit=one.name,
                parent=one.parent,
                date=one.date,
                subject=one.subject,
                sources=sources,
                added=added,
                removed=removed,
                evidence=evidence,
            )
        )
    return search


def _evidence(one: Commit, words: re.Pattern[str], taken_back: dict[str, Commit]) -> Iterator[Evidence]:
    if match := words.search(one.subject):
        yield Evidence("subject", match[0])
    elif match := words.search(one.body):
        yield Evidence("body", line_around(one.body, match.start()))
    for match in list(FIGURE.finditer(f"{one.subject}\n{one.body}"))[:3]:
        yield Evidence("figure", line_around(f"{one.subject}\n{one.body}", match.start()))
    for kind, which in (("benchmark", history.is_benchmark), ("test", history.is_test)):
        for path in sorted(filter(which, one.files)):
            yield Evidence(kind, path)  # type: ignore[arg-type]
    if reverts.says(one.subject, one.body):
        yield Evidence("revert", f"it says that it takes back another commit: {one.subject}"[:_LONGEST])
    if later := taken_back.get(reverts.bare(one.subject)):
        yield Evidence(
            "reverted", f"{later.name[:_KNOWN]} says that it takes this one back: {later.subject}"[:_LONGEST]
        )


def _taken_back(every: Sequence[Commit]) -> dict[str, Commit]:
    """Reverts by the subject of what they take back."""
    found = {}
    for one in every:
        if match := re.match(r"(?i)^revert:?\s+(.+)$", one.subject):
            found[reverts.bare(match[1].lstrip("\"'“"))] = one
    return found


def line_around(text: str, at: int) -> str:
    """The line of a text in which a place lies, shortened."""
    start, end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
    return text[start : end if end >= 0 else None].strip()[:_LONGEST]
