"""What a history says: judgements of pairs of commits, and the commits that changed something."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from assay.contract.rows import Interval
from assay.contract.schema import Count, Number, Positive, document

VERSION = 1
Name = Annotated[str, {"pattern": "^[0-9a-f]{40,64}$"}]
Index = Annotated[int, {"minimum": 0, "description": "of a commit, oldest first"}]


@dataclass(frozen=True)
class Commit:
    """A commit of the range; the first one is what the range starts from."""

    name: Name
    date: str
    subject: str


@dataclass(frozen=True)
class Pair:
    """A judgement: the later commit against the earlier one. Log-ratios of earlier over later: below 0 is slower."""

    before: Index
    after: Index
    verdict: str
    estimate: float | None
    interval: Interval
    alpha: float
    blocks: Count
    voids: Annotated[Count, {"description": "earlier attempts at it that were void"}]
    raw: Annotated[str, {"description": "file of RAW, relative to the history's folder"}]


@dataclass(frozen=True)
class Step:
    """A commit that changed something, or, where `first` is not `last`, commits of which one did."""

    first: Index
    last: Index
    kind: Literal["slower", "faster"]
    estimate: float
    interval: Interval
    shown: Annotated[bool, {"description": "whether the commit was judged against the one before it, alone"}]
    words: str


@dataclass(frozen=True, kw_only=True)
class History:
    """`history.json`."""

    kind: Literal["history"] = "history"
    schema: Annotated[int, {"const": VERSION}] = VERSION
    assay: str
    outcome: Literal["unfinished", "regressed", "improved", "unchanged", "undecided"]
    subject: Annotated[str, {"description": "what was measured"}]
    plan: Annotated[str, {"description": "digest of the options, without seeds"}]
    delta: Positive
    most: Annotated[Number, {"description": "judgements that were allowed, by which every level was divided"}]
    commits: list[Commit]
    pairs: list[Pair]
    steps: list[Step]
    broken: Annotated[dict[str, str], {"description": "commits that could not be run, by index, and why"}]
    open: Annotated[list[str], {"description": "what could not be shown"}]


def schema() -> dict[str, Any]:
    """The JSON schema of a history."""
    words = "Which commits of a range changed how long something takes."
    return document(f"assay-history-{VERSION}", f"A history, version {VERSION}", words, (History,))
