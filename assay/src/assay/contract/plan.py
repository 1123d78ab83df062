"""What plan.json holds: what is measured and how, frozen before the first sample."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from assay.contract.outcome import REQUIREMENTS
from assay.contract.schema import ADDED, Count, Digest, Number, Positive, document
from assay.contract.workload import Plan

VERSION = 3
_PER_ARM = {
    "required": ["base", "candidate", "control"],
    "propertyNames": {"enum": ["base", "candidate", "control", "reference"]},
}


@dataclass(frozen=True)
class AttemptName:
    """Which judgement of the ledger this is."""

    id: str
    number: Number


@dataclass(frozen=True)
class TaskFacts:
    """What a verdict needs of the task."""

    name: str
    digest: Digest
    delta: Positive
    require: Annotated[str, {"enum": list(REQUIREMENTS)}]


@dataclass(frozen=True)
class PatchFacts:
    """The guarded patch."""

    digest: Digest
    bytes: Count
    changed: list[str]
    restored: Annotated[list[str], {"description": "files outside the scope that are as in base again"}]
    left: Annotated[list[str], {"description": "new files that were left behind"}]


@dataclass(frozen=True)
class GatesAsked:
    """Gates by name."""

    asked: Annotated[list[Annotated[str, "gate"]], {"description": "what the task or the patch makes necessary"}]
    skipped: Annotated[list[Annotated[str, "gate"]], {"description": "what is left out on request"}]


@dataclass(frozen=True)
class CommandsFacts:
    """How files become something that runs."""

    setup: list[Annotated[list[str], {"minItems": 1}]]
    build: list[Annotated[list[str], {"minItems": 1}]]
    timeout_s: Positive
    where: Annotated[Literal["measured", "prepared"], ADDED] = "measured"


@dataclass(frozen=True)
class SandboxFacts:
    """What arms may see and use."""

    wanted: bool
    readable: list[str]
    devices: list[str]
    environment: dict[str, str]
    device: Literal["cpu", "gpu"]
    memory_bytes: int | None
    processes: int | None
    disk_bytes: Annotated[int | None, ADDED] = None


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """All of it; it lies beside trees/ and drivers/ and private/, and can be moved with them."""

    kind: Literal["plan"] = "plan"
    schema: Annotated[int, {"const": VERSION}] = VERSION
    assay: Annotated[str, {"description": "version that froze it"}]
    attempt: AttemptName
    task: TaskFacts
    patch: PatchFacts
    protocol: Digest
    gates: GatesAsked
    outcome: Annotated[
        str,
        {"enum": ["", "no_patch", "out_of_scope", "api_break", "task_invalid"]},
        {"description": "not empty: nothing is measured"},
    ]
    words: list[str]
    commits: Annotated[
        dict[str, Annotated[str, {"pattern": "^[0-9a-f]{40,64}$"}]], _PER_ARM, {"description": "git trees"}
    ]
    trees: Annotated[dict[str, Digest], _PER_ARM, {"description": "digests of the folders in trees/"}]
    drivers: Digest
    private: Annotated[Digest, {"description": "of private/: what makes inputs, shown to no arm"}]
    commands: CommandsFacts
    budget_s: Positive
    sandbox: SandboxFacts
    workloads: Annotated[
        dict[str, Plan],
        {
            "minProperties": 1,
            "description": "by name; the task's own files as drivers/FOLDER/FILE.py:NAME or private/...",
        },
    ]


def schema(optional: tuple[str, ...]) -> dict[str, Any]:
    """The JSON schema of plan.json. `optional`: names of the gates that a task may ask for."""
    words = "What is measured and how, frozen before the first sample."
    gate = {"enum": list(optional)}
    return document(f"assay-plan-{VERSION}", f"plan.json, version {VERSION}", words, (PlanFile,), gate=gate)
