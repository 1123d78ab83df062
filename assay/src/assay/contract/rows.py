"""Rows of RAW, a text file of JSON lines: a header, a block per line as they end, then a verdict or a failure."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from assay.contract.outcome import MEASURED
from assay.contract.schema import ADDED, Count, Digest, Number, document
from assay.contract.workload import Plan

VERSION = 3
Arm = {"enum": ["base", "candidate", "control", "reference"]}
_PER_ARM = {"required": ["base", "candidate", "control"], "propertyNames": Arm}
Paths = Annotated[dict[str, str], _PER_ARM]
NotNegative = Annotated[float, {"minimum": 0}]
Numbers = Annotated[dict[str, NotNegative], _PER_ARM]
BESIDE = ("import", "first", "memory", "processors", "cpu")
"""Figures that are told beside the one that is judged, if they got worse; cpu: processor seconds of a block."""
Interval = Annotated[list[float | None], {"minItems": 2, "maxItems": 2}]


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first row, written before the first sample that counts."""

    kind: Literal["header"] = "header"
    schema: Annotated[int, {"const": VERSION}] = VERSION
    protocol: Annotated[Digest, {"description": "digest of the plan"}]
    plan: Plan
    trees: Paths
    isolation: Literal["sandbox", "namespaces", "links"]
    clock: Literal["judge", "cooperative"]
    calibrated: Annotated[dict[str, float], {"description": "seconds; bytes of the longest reply"}]
    calls: Annotated[Count, {"description": "timed requests of an arm in a block; 0 for commands"}]
    loops: Annotated[Number, {"description": "calls a request; all seconds are those of one call"}, ADDED]
    machine: Annotated[dict[str, Any], {"required": ["system", "processor", "processors", "python", "gpus"]}]
    started: Annotated[str, {"description": "UTC"}]
    processors: Annotated[list[Count], {"description": "numbers of those that judge and arms may use"}, ADDED]
    patience_s: Annotated[NotNegative, {"description": "how long a block waits for others to rest"}, ADDED]


@dataclass(frozen=True)
class Mismatch:
    """A timed call whose output is not base's, in words that may be anybody's."""

    call: Annotated[Count, {"description": "index among the block's calls, those that are not timed included"}]
    input: str
    base: Annotated[str, {"description": "what base returned"}]
    candidate: Annotated[str, {"description": "what the candidate returned"}]
    where: Annotated[str, {"description": "where they differ"}]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Every arm once. The primary figures count if there are no reasons against it."""

    kind: Literal["block"] = "block"
    number: Count
    order: Annotated[list[Annotated[str, Arm]], {"minItems": 3, "maxItems": 4}]
    reasons: Annotated[list[str], {"description": "why the block is left out; empty: it counts"}]
    elapsed_s: NotNegative
    foreign_cpu_s: Annotated[float | None, {"description": "processor seconds of others meanwhile"}]
    others: Annotated[
        dict[str, NotNegative], {"description": "processor seconds of those who used most of it, by name"}, ADDED
    ]
    clock_mhz: float | None
    primary: Annotated[Numbers, {"description": "what is judged: seconds, or KiB for memory"}]
    figures: Annotated[dict[str, dict[str, float]], _PER_ARM]
    cpu_s: Numbers
    left: Annotated[Numbers, {"description": "processes that outlived the arm's own"}]
    escapes: Annotated[
        dict[str, list[str]],
        _PER_ARM,
        {"description": "what its processes did outside its turn; tampering if only the candidate's do so"},
        ADDED,
    ]  # fmt: skip
    calls: Annotated[dict[str, list[float]], _PER_ARM, {"description": "seconds of every timed call"}]
    gpus: Annotated[dict[str, list[dict[str, Any]]], _PER_ARM, {"description": "states at the end of the arm"}]
    transport_s: Annotated[
        NotNegative,
        {"description": "what sending takes in base's worker: taken out of all arms' primary figures; 0 in loops"},
        ADDED,
    ]
    spared_s: Annotated[
        NotNegative,
        {"description": "what an arm that has patched its worker could spare beside, as base's worker measures it"},
        ADDED,
    ]
    late_s: Annotated[
        float,
        {"description": "what a call of the candidate takes longer, beside base's, when the next follows at once"},
        ADDED,
    ] = 0.0
    inputs: Annotated[str, {"description": "digest of the block's inputs; empty for commands"}]
    compared: Annotated[Count, {"description": "calls whose outputs were compared, those that are not timed included"}]
    differing: Annotated[list[int], {"description": "calls whose output differs from base's"}]
    mismatch: Annotated[Mismatch | None, {"description": "the first of them"}, ADDED] = None
    elsewhere: Annotated[
        str, {"description": "how calls by another program than assay's worker differ from base's, in words"}, ADDED
    ] = ""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How many instructions each arm executes; it decides nothing."""

    kind: Literal["instructions"] = "instructions"
    source: Annotated[str, {"enum": ["", "perf", "valgrind", "bytecode"]}]
    what: Annotated[str, {"description": "what was counted, in words"}]
    calls: Annotated[Count, {"description": "how many were counted in each arm; 1 is a whole command"}]
    counts: Annotated[dict[str, NotNegative], {"description": "by arm, of one call; empty: none were counted"}]
    words: Annotated[str, {"description": "why a better source, or any, was not to be had"}]


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Measuring went on."""

    kind: Literal["resumed"] = "resumed"
    started: Annotated[str, {"description": "UTC"}]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The last row where there can be no verdict."""

    kind: Literal["failed"] = "failed"
    outcome: Annotated[str, {"enum": ["incorrect", "tampered", "task_invalid", "infra.run", "infra.budget"]}]
    words: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The last row. JSON knows no infinity: what is not known, or not bounded, is null."""

    kind: Literal["verdict"] = "verdict"
    verdict: Annotated[str, {"enum": [str(word) for word in MEASURED]}]
    reason: str
    estimate: Annotated[float | None, {"description": "log of base over candidate"}]
    interval: Annotated[Interval, {"description": "of the log-ratio, at level 1 - alpha; null: unbounded"}]
    blocks: Count
    alpha: float
    material: bool
    detectable: float | None


def schema() -> dict[str, Any]:
    """The JSON schema of a row."""
    words = "RAW is a text file of JSON lines: one header, then a block per line, then at most one verdict or failure."
    models = (Header, Block, Counted, Resumed, Failed, Judged)
    return document(f"assay-raw-{VERSION}", f"A line of RAW, version {VERSION}", words, models)
