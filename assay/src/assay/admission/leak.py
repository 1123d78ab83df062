"""How much of the reference a prompt gives away, as a level that is kept with every result.

L0: nothing. L1: names of files that the reference changes. L2: sizes of its changes, or a few of its lines. L3: its
message, or a tenth of its added lines. L4: half of its added lines, which is the answer.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from assay.contract.admission import Leak
from assay.mining import history, reverts
from assay.mining.prompt import Prompt
from assay.repository.lines import Lines

ANSWER, MUCH = 0.5, 0.1
_LEAST_LETTERS = 8
"""Of a line: brackets and `else:` are in every prompt."""
_STATISTICS = re.compile(r"\b\d+ files? changed|\|\s+\d+\s+[+-]+\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Reference:
    """What a prompt should not tell."""

    lines: frozenset[str]
    """Added lines of sources, without space, and without those that the change only moves."""
    paths: tuple[str, ...]
    subject: str = ""

    @classmethod
    def of(cls, changed: dict[str, Lines], subject: str = "") -> "Reference":
        """The reference that a patch is."""
        sources = {path: one for path, one in changed.items() if history.is_source(path)}
        gone = {_squeezed(text) for one in sources.values() for text in one.gone}
        new = {_squeezed(text) for one in sources.values() for text in one.new}
        return cls(frozenset(text for text in new - gone if len(text) >= _LEAST_LETTERS), tuple(sources), subject)

    @classmethod
    def of_commit(cls, repository: Path, commit: str) -> "Reference":
        """The reference that a commit is."""
        one = history.commit(repository, commit)
        return cls.of(history.lines(repository, one.parent, one.name), one.subject)


def audit(text: str, reference: Reference) -> Leak:
    """How much of a reference stands in a prompt's text."""
    squeezed = _squeezed(text)
    lines = _share(one in squeezed for one in reference.lines)
    targets = _share(path in text for path in reference.paths)
    bare = reverts.bare(reference.subject)
    message = bool(bare) and _squeezed(bare) in squeezed.lower()
    statistics = any(path.rpartition("/")[2] in line for line in _bars(text) for path in reference.paths)
    return Leak(_level(lines, targets, message, statistics), lines, targets, message, statistics, digest(text))


def of_prompt(prompt: Prompt, text: str) -> Leak:
    """What a prompt gives away by its own parts, where the reference is not known: a lower bound."""
    message = bool(prompt.of("message") or prompt.of("example"))
    statistics = bool(prompt.of("statistics"))
    level = _level(0.0, 1.0 if prompt.targets else 0.0, message, statistics)
    return Leak(level, None, None, message, statistics, digest(text))


def digest(text: str) -> str:
    """Identity of a prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def words(leak: Leak) -> str:
    """In a sentence."""
    if leak.lines is None or leak.targets is None:
        found = ["message or example" if leak.message else "", "sizes" if leak.statistics else ""]
        return f"at least {leak.level}: it shows the reference's {', '.join(filter(None, found)) or 'files'}"
    more = [name for name, there in (("its message", leak.message), ("its sizes", leak.statistics)) if there]
    return (
        f"{leak.level}: {leak.lines:.0%} of the added lines, {leak.targets:.0%} of the changed files"
        f"{''.join(f', {name}' for name in more)}"
    )


def _level(lines: float, targets: float, message: bool, statistics: bool) -> str:
    if lines >= ANSWER:
        return "L4"
    if lines >= MUCH or message:
        return "L3"
    if lines or statistics:
        return "L2"
    return "L1" if targets else "L0"


def _bars(text: str) -> list[str]:
    return [line for line in text.split("\n") if _STATISTICS.search(line)]


def _share(found: Iterable[bool]) -> float:
    every = list(found)
    return sum(every) / len(every) if every else 0.0


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
