"""Where in a row of commits did something change? Halves of a region that changed are judged until one commit is left.

A region is judged by its ends, so that changes inside it which cancel each other are not seen: `points` divides the
range first. The number of judgements is bounded before the first one. Every level is divided by that bound, so that
however the search goes on, and however often it looks, a range in which nothing changed is called with the level of one
judgement at most (Bonferroni). What the bound leaves open is said, and is no finding.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

from assay.contract.timeline import Step


class Found(Protocol):
    """A judgement of one commit against an earlier one."""

    @property
    def verdict(self) -> str: ...
    @property
    def estimate(self) -> float | None: ...
    @property
    def interval(self) -> list[float | None]: ...


class BrokenError(Exception):
    """A commit cannot be run."""

    def __init__(self, index: int, words: str) -> None:
        super().__init__(words)
        self.index = index


class _SpentError(Exception):
    """The judgements that were allowed are spent."""


def bound(commits: int, points: int, changes: int) -> int:
    """Judgements that are allowed: one per part, and for each change the halvings down to a commit and one more.

    Args:
        commits: of the range, without the one that it starts from.
        points: parts that the range is divided into first.
        changes: how many changes may be followed down to their commits.
    """
    halvings = math.ceil(math.log2(max(1, -(-commits // points))))
    return points + changes * (halvings + 1)


def parts(commits: int, points: int) -> list[tuple[int, int]]:
    """The parts of a range, as pairs of indices; no more of them than there are commits."""
    points = min(points, commits)
    ends = [round(i * commits / points) for i in range(points + 1)]
    return list(pairwise(ends))


@dataclass
class Search:
    """A search in a row of commits, the index 0 being what the range starts from."""

    commits: int
    ask: Callable[[int, int], Found]
    """Judges the second commit against the first. BrokenError for one that cannot be run."""
    margin: float
    """A log-ratio: what changed by less is not followed."""
    most: int
    """Judgements that are allowed."""
    asked: int = 0
    steps: list[Step] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)

    def run(self, points: int) -> None:
        """Finds what it can; `steps` and `open` say what."""
        for low, high in parts(self.commits, points):
            try:
                found = self._judged(low, high)
            except (_SpentError, BrokenError) as problem:
                self.open.append(f"{low} to {high}: {self._why(problem)}")
                continue
            if self._changed(found):
                self._follow(low, high, found, direct=True)
            elif found.verdict == "undecided":
                self.open.append(f"{low} to {high}: neither a difference nor its absence was shown")

    def _judged(self, low: int, high: int) -> Found:
        if self.asked >= self.most:
            raise _SpentError
        try:
            found = self.ask(low, high)
        except BrokenError as problem:
            self.broken[problem.index] = str(problem)
            raise
        self.asked += 1
        return found

    def _changed(self, found: Found) -> bool:
        return found.verdict in ("faster", "slower") and abs(_estimate(found)) > self.margin

    def _follow(self, low: int, high: int, found: Found, *, direct: bool) -> None:
        """Goes down into a region that changed; `direct`: `found` is its own judgement, not that of a larger one."""
        try:
            if high - low == 1:
                own = found if direct else self._judged(low, high)
                self._note(low, high, own if self._changed(own) else found, shown=self._changed(own))
                return
            left, middle = self._left(low, high)
        except (_SpentError, BrokenError) as problem:
            self._note(low, high, found, shown=False, why=self._why(problem))
            return
        if left is None:
            self._note(low, high, found, shown=False, why="the commits between cannot be run")
        elif not self._changed(left):
            self._follow(middle, high, found, direct=False)
        else:
            self._follow(low, middle, left, direct=True)
            if abs(_estimate(found) - _estimate(left)) > self.margin:
                self._rest(middle, high)

    def _rest(self, low: int, high: int) -> None:
        """The other half, where what was found in the first does not account for all."""
        try:
            right = self._judged(low, high)
        except (_SpentError, BrokenError) as problem:
            self.open.append(f"{low} to {high}: may have changed, too: {self._why(problem)}")
            return
        if self._changed(right):
            self._follow(low, high, right, direct=True)

    def _left(self, low: int, high: int) -> tuple[Found | None, int]:
        """The first half of a region, as equal as commits that can be run allow; None if there is none such."""
        for middle in _middles(low, high):
            if middle not in self.broken:
                try:
                    return self._judged(low, middle), middle
                except BrokenError as problem:
                    if problem.index != middle:
                        raise
        return None, low

    def _note(self, low: int, high: int, found: Found, *, shown: bool, why: str = "") -> None:
        estimate = _estimate(found)
        words = "" if shown else why or "it was not shown alone, and follows from its neighbours"
        kind: Literal["slower", "faster"] = "slower" if estimate < 0 else "faster"
        self.steps.append(Step(low + 1, high, kind, estimate, found.interval, shown, words))

    def _why(self, problem: Exception) -> str:
        if isinstance(problem, _SpentError):
            return f"all {self.most} judgements that were allowed are done"
        return f"a commit cannot be run: {problem}"


def _middles(low: int, high: int) -> Iterator[int]:
    """Indices between two others, those in the middle first."""
    middle = (low + high) // 2
    for i in range(high - low):
        for one in dict.fromkeys((middle - i, middle + i)):
            if low < one < high:
                yield one


def _estimate(found: Found) -> float:
    return 0.0 if found.estimate is None else found.estimate
