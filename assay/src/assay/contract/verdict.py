"""What a verdict says. Changes are log-ratios of base over candidate: above 0 is faster."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from assay.contract.outcome import INFRA, REQUIREMENTS, Outcome
from assay.contract.plan import PatchFacts
from assay.contract.rows import BESIDE, Interval
from assay.contract.schema import ADDED, Count, Digest, Number, document

VERSION = 1
Word = Annotated[str, "outcome"]


@dataclass(frozen=True)
class TaskName:
    """Which task it was."""

    name: str
    digest: Digest
    delta: float


@dataclass(frozen=True)
class AttemptCount:
    """Which attempt it was, of how many."""

    id: str
    number: Annotated[Number, {"description": "of this task, patch, environment and protocol"}]
    of_patch: Annotated[Number, {"description": "all attempts at this task with this patch that the ledger knows"}]


@dataclass(frozen=True)
class GateFound:
    """What a gate found: "" is passed, skipped is left out on request, not_asked had nothing to look at."""

    name: Annotated[str, "gate"]
    outcome: Annotated[str, "found"]
    words: str


@dataclass(frozen=True)
class Change:
    """An estimate with its interval."""

    estimate: float
    interval: Interval
    alpha: float


@dataclass(frozen=True)
class Worse:
    """A figure beside the one that is judged, which is larger than base's by more than the margin."""

    name: Annotated[str, {"enum": list(BESIDE)}]
    base: Annotated[float, {"description": "seconds; KiB of memory; number of processors"}]
    candidate: float
    interval: Annotated[Interval, {"description": "of the log-ratio of candidate over base, at 99.9 %"}]


@dataclass(frozen=True)
class Instructions:
    """Counts of instructions beside the times; they decide nothing. Log-ratios of base over an arm."""

    source: str
    candidate: float | None
    control: float | None
    words: str


@dataclass(frozen=True)
class WorkloadFound:
    """What one workload's blocks say."""

    name: str
    verdict: Word
    reason: str
    estimate: float | None
    interval: Interval
    blocks: Count
    alpha: float
    material: bool
    detectable: float | None
    p: Annotated[float, {"description": "over all looks"}]
    holm: Annotated[bool, {"description": "called by Holm's procedure alone"}]
    reference: Change | None
    worse: Annotated[list[Worse], ADDED] = field(default_factory=list)
    instructions: Annotated[Instructions | None, ADDED] = None
    advice: Annotated[list[str], {"description": "what can be done where this shows nothing"}, ADDED] = field(
        default_factory=list
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judgement came to."""

    kind: Literal["verdict"] = "verdict"
    schema: Annotated[int, {"const": VERSION}] = VERSION
    assay: str
    outcome: Word
    words: list[str]
    require: Annotated[str, {"enum": list(REQUIREMENTS)}]
    status: Annotated[int, {"enum": [0, 1, 3, 4, 5], "description": "exit status"}]
    task: TaskName
    patch: PatchFacts
    protocol: Digest
    attempt: AttemptCount
    gates: list[GateFound]
    workloads: list[WorkloadFound]
    joint: Annotated[Change | None, {"description": "geometric mean of several workloads"}]
    trust: Annotated[list[str], {"description": "sandboxed or unsandboxed first"}]
    environment: Annotated[
        dict[str, Any], {"description": "of the machine that judged; {} if measured elsewhere"}, ADDED
    ] = field(default_factory=dict)


def schema(gates: tuple[str, ...], rejections: tuple[str, ...], untried: tuple[str, ...]) -> dict[str, Any]:
    """The JSON schema of a verdict, with the gates' names, what they reject with, and the words for those not tried."""
    words = "|".join(re.escape(word) for word in (*Outcome, *rejections))
    outcome = {"pattern": f"^({words}|{re.escape(INFRA)}[a-z_]+)$"}
    found = {"pattern": f"^(|{'|'.join(untried)}|{words}|{re.escape(INFRA)}[a-z_]+)$"}
    title, about = (
        f"A verdict, version {VERSION}",
        "What a judgement came to; changes are log-ratios, above 0 is faster.",
    )
    more = {"outcome": outcome, "found": found, "gate": {"enum": list(gates)}}
    return document(f"assay-verdict-{VERSION}", title, about, (Verdict,), **more)
