"""A finished cell of a campaign: one attempt at a task, or one canary. A line of its journal follows this."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from assay.contract.schema import Count, Digest, Number, document

VERSION = 1


@dataclass(frozen=True)
class Task:
    """Which task it was."""

    name: str
    digest: Digest
    delta: float


@dataclass(frozen=True)
class Who:
    """Whose attempt it was."""

    kind: Literal["agent", "prediction", "canary"]
    name: str
    digest: Digest


@dataclass(frozen=True)
class Workload:
    """What one workload's blocks say, as in the verdict; log-ratios, above 0 is faster."""

    name: str
    verdict: str
    estimate: float | None
    low: float | None
    high: float | None
    blocks: Count
    p: float


@dataclass(frozen=True)
class Cost:
    """What the attempt took; null where the agent reports nothing."""

    agent_s: Annotated[float, {"minimum": 0}]
    judge_s: Annotated[float, {"minimum": 0}]
    tokens: float | None
    money: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished cell."""

    kind: Literal["cell"] = "cell"
    schema: Annotated[int, {"const": VERSION}] = VERSION
    key: Digest
    task: Task
    who: Who
    number: Number
    tries: Annotated[
        Number, {"description": "runs of the agent that it took, those that infrastructure spoilt included"}
    ]
    run: Annotated[str, {"description": "outcome of the agent's run; empty without an agent"}]
    outcome: Annotated[str, {"description": "of the judgement, or infra.* of the run that was spoilt at last"}]
    words: list[str]
    status: Annotated[int, {"enum": [0, 1, 3, 4, 5], "description": "exit status; 0: what the task requires was shown"}]
    level: Annotated[str, {"description": "leak level of the prompt; empty without a prompt"}]
    template: str
    expect: Annotated[str, {"description": "of a canary: faster, slower, nothing or rejected"}]
    workloads: list[Workload]
    cost: Cost
    patch: Annotated[str, {"description": "digest; empty if there is none"}]
    attempt: Annotated[
        str, {"description": "folder of the judgement, relative to the campaign's; empty if there is none"}
    ]
    folder: Annotated[str, {"description": "folder of the cell, relative to the campaign's"}]


def schema() -> dict[str, Any]:
    """The JSON schema of a line."""
    return document(f"assay-cell-{VERSION}", f"A cell, version {VERSION}", "One attempt of a campaign.", (Row,))
