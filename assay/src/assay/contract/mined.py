"""What mining writes: commits that claim to be faster, what a record or a prompt said, what a new task lacks."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from assay.contract.schema import Count, Number, document

VERSION = 1


@dataclass(frozen=True)
class Evidence:
    """Why a commit is listed."""

    kind: Literal["subject", "figure", "body", "benchmark", "test", "revert", "reverted"]
    words: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A commit that claims to make something faster: a line of `assay task find --json`."""

    kind: Literal["claim"] = "claim"
    schema: Annotated[int, {"const": VERSION}] = VERSION
    commit: str
    parent: str
    date: Annotated[str, {"description": "of the commit, with its offset"}]
    subject: str
    sources: Annotated[list[str], {"description": "files that are neither tests, benchmarks, builds nor documents"}]
    added: Count
    removed: Count
    evidence: list[Evidence]


@dataclass(frozen=True)
class Part:
    """A part of what was read, and what became of it."""

    name: str
    first: Annotated[Number, {"description": "line of the file"}]
    last: Number
    became: Annotated[str, {"description": "a place in the task, or empty: it was dropped"}]
    words: Annotated[str, {"description": "what it says, or why it was dropped"}]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """`imported.json` beside a task: what a record or a prompt said, line by line, and what is not known."""

    kind: Literal["imported"] = "imported"
    schema: Annotated[int, {"const": VERSION}] = VERSION
    source: Annotated[str, {"enum": ["ISO-Bench", "GSO", "SWE-Perf", "SWE-fficiency", "prompt", "commit"]}]
    file: str
    parts: list[Part]
    unknown: Annotated[list[str], {"description": "what could not be found out"}]


def schema() -> dict[str, Any]:
    """The JSON schema of both files."""
    words = "What mining writes: claims of commits, and what became of a record or a prompt."
    return document(f"assay-mined-{VERSION}", f"What mining writes, version {VERSION}", words, (Claim, Imported))
