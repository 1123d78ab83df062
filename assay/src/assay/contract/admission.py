"""What an admission says: whether a task is one, on this machine and until when, with every reason and its source."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from assay.contract.schema import Digest, document
from assay.contract.verdict import TaskName

VERSION = 1
LEVELS = ("L0", "L1", "L2", "L3", "L4")


@dataclass(frozen=True)
class Reason:
    """One thing that is known of the task."""

    name: str
    kind: Literal["measured", "static", "declared"]
    finding: Annotated[
        Literal["for", "against", "open", "noted"],
        {"description": "open: it could not be shown; noted: it decides nothing"},
    ]
    words: str
    source: Annotated[str, {"description": "an attempt of the ledger, a commit, or file and line"}]


@dataclass(frozen=True)
class Leak:
    """How much of the reference a prompt gives away."""

    level: Annotated[str, {"enum": list(LEVELS)}]
    lines: Annotated[float | None, {"description": "of the reference's added lines; null: the reference is not known"}]
    targets: Annotated[float | None, {"description": "of the source files that the reference changes"}]
    message: bool
    statistics: bool
    prompt: Digest


@dataclass(frozen=True, kw_only=True)
class Admission:
    """`admission.json`: valid for one task, reference and machine, until it expires."""

    kind: Literal["admission"] = "admission"
    schema: Annotated[int, {"const": VERSION}] = VERSION
    assay: str
    outcome: Literal["admitted", "rejected", "undecided"]
    task: TaskName
    reference: Annotated[str, {"description": "a commit, or the digest of a patch; empty: not known"}]
    reasons: list[Reason]
    leak: Leak | None
    machine: Annotated[dict[str, Any], {"description": "on which it was measured; {} if nothing was"}] = field(
        default_factory=dict
    )
    sandboxed: bool
    made: Annotated[str, {"description": "UTC"}]
    expires: Annotated[str, {"description": "UTC; empty unless admitted"}]


def schema() -> dict[str, Any]:
    """The JSON schema of an admission."""
    words = "Whether a task is one: admitted only on measured evidence, for one machine, until it expires."
    return document(f"assay-admission-{VERSION}", f"An admission, version {VERSION}", words, (Admission,))
