"""What is kept of a run: run.json, with a public schema, beside prompt, output, network log, patch and kept files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from assay.agents.outcome import Outcome
from assay.contract.schema import Count, Digest, Number, document

VERSION = 1
FILE = "run.json"
PROMPT, OUTPUT, NETWORK, PATCH, KEPT = "prompt.md", "output.log", "network.jsonl", "patch.diff", "kept"
"""Names in a run's folder."""


@dataclass(frozen=True)
class Named:
    """A task or an agent, by its name and its content."""

    name: str
    digest: Digest


@dataclass(frozen=True)
class PromptFacts:
    """What the agent was told."""

    template: str
    digest: Digest
    level: Annotated[str, {"enum": ["L0", "L1", "L2", "L3", "L4"], "description": "how much of the reference it tells"}]
    tells: list[str]


@dataclass(frozen=True)
class UsedFacts:
    """What the run used; null where the agent reports nothing."""

    seconds: Annotated[float, {"minimum": 0}]
    tokens: float | None
    money: float | None


@dataclass(frozen=True)
class NetworkFacts:
    """What the proxy saw."""

    connections: Annotated[Count, {"description": "to hosts that the template names"}]
    sent: Annotated[Count, {"description": "bytes"}]
    received: Annotated[Count, {"description": "bytes"}]
    refused: Annotated[list[str], {"description": "host:port of others that were asked for"}]


@dataclass(frozen=True)
class ChangedFacts:
    """The judge's own patch."""

    digest: Digest
    bytes: Count
    files: list[str]
    left: Annotated[list[str], {"description": "new files that were left behind unseen"}]
    refused: Annotated[list[str], {"description": "what could not be taken, in words"}]


@dataclass(frozen=True)
class Redacted:
    """Places in which a key stood that is now `[redacted]`."""

    patch: Count
    output: Count
    network: Count
    kept: Count


@dataclass(frozen=True, kw_only=True)
class Run:
    """One attempt of an agent at a task, before it is judged."""

    kind: Literal["agent-run"] = "agent-run"
    schema: Annotated[int, {"const": VERSION}] = VERSION
    assay: str
    task: Named
    agent: Named
    prompt: PromptFacts
    number: Annotated[Number, {"description": "of this agent's attempts at this task"}]
    started: str
    outcome: Annotated[str, {"enum": list(Outcome)}]
    words: str
    status: Annotated[int | None, {"description": "exit status; null if it was ended or never began"}]
    left_running: Annotated[Count, {"description": "processes that still ran at its end; they were killed"}]
    used: UsedFacts
    network: NetworkFacts
    patch: ChangedFacts
    redacted: Redacted
    kept: list[str] = field(default_factory=list)


def schema() -> dict[str, Any]:
    """The JSON schema of run.json."""
    title = f"A run of an agent, version {VERSION}"
    return document(f"assay-agent-run-{VERSION}", title, "How an agent's attempt at a task ended.", (Run,))


def paths(folder: Path) -> list[Path]:
    """Every file that a finished run leaves."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
