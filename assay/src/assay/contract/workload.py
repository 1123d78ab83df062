"""What is fixed before the first sample: the workload and the protocol's options, and their digest."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from assay.contract.schema import ADDED
from assay.statistics.looks import LOOKS

Kind = Literal["command", "call", "asv", "pyperf", "pytest"]
FIGURES = {"command": ("wall", "memory"), "worker": ("steady", "first", "import", "memory")}
"""What is measured of a process, and which of it may be declared primary."""
NAMED = ("target", "inputs", "chain", "canonical")
"""Fields of a workload that name a function."""


def fraction(text: str, name: str) -> float:
    """A margin as it is typed, 0.02 or 2%, as a fraction. ValueError for none.

    A bare number of 1 or more is asked about, since 5 may be meant as 5 %.
    """
    number, sign, _ = text.strip().partition("%")
    try:
        value = float(number) / (100 if sign else 1)
    except ValueError:
        raise ValueError(f"{name}: expected a fraction or per cent, as 0.02 or 2%, got {text!r}") from None
    if 1 <= value < math.inf and not sign:
        words = f"is {100 * value:g} % meant? {text}% is {value / 100:g}; write {100 * value:g}% if so"
        raise ValueError(f"{name}: {words}")
    return value


@dataclass(frozen=True)
class Workload:
    """What an arm runs: a command, whose whole process is timed, or a callable inside a worker."""

    __pydantic_config__ = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True, "allow_inf_nan": False}  # noqa: RUF012
    # For tasks, which are read with pydantic; it is not imported here.

    kind: Kind
    command: tuple[str, ...] = ()
    prepare: Annotated[tuple[str, ...], ADDED] = ()
    """A command that is run before each timed run of `command`, in the same place, and is in no figure."""
    target: str = ""
    """`module:function` or `file.py:function`; asv: `file.py:Class.time_method`; pyperf: `script.py:benchmark name`.

    pytest: `file.py::test`, a test that calls pytest-benchmark's fixture.
    """
    inputs: str = ""
    """`module:function`, called with a seed: a tuple is taken as arguments, a dict as keywords, else one argument."""
    constant: bool = False
    """The same input for every call, sent once; else every call gets new values at new addresses."""
    chain: str = ""
    """`module:function`: (input, output) -> the next input. With `links` calls in a request."""
    links: int = 1
    loops: Annotated[int, ADDED] = 0
    """Calls a request without `chain`: 0 makes them as many as a call of microseconds needs, 1 never more than one.

    Each has an input of its own, which it cannot read before the output of the call before is known. Constant inputs
    and benchmarks are called again and again.
    """
    clock: Literal["judge", "cuda"] = "judge"
    """cuda: events inside the worker around `links` calls, which is cooperative: the worker could lie."""
    graph: bool = False
    """Whether those calls are captured into a CUDA graph first."""
    compare: bool = True
    """Whether outputs of a call are sent back and compared between the arms of a block."""
    canonical: Annotated[str, ADDED] = ""
    """`file.py:function`: output -> what of it is compared, as where an order is free. It runs in the judge's process.

    It gets decoded values, with NumPy arrays for tensors. An output of the candidate that it cannot take is wrong.
    """
    rtol: float = 0.0
    atol: float = 0.0
    case: int = 0
    """asv: index into the product of the benchmark's parameters."""
    python: str = ""
    """The workers' interpreter; "" is the judge's own."""
    paths: tuple[str, ...] = (".", "src")
    """Folders of the tree that go in front of the worker's sys.path."""
    rounds: int = 8
    """The workers of a block live together and take turns so many times, frozen in between; 1: one after another."""
    calls: int = 0
    """Timed calls of a worker in a block; 0: calibrated to about 20 ms, at least 3, and one a round."""
    warmups: int = 1

    @property
    def worker(self) -> bool:
        """Whether a worker runs it, instead of a process of its own for every sample."""
        return self.kind != "command"

    @property
    def repeats(self) -> bool:
        """Whether all calls have one input."""
        return self.constant or self.kind != "call"

    def keeps(self, loops: int) -> bool:
        """Whether a worker is sent the one input of all calls before they are timed."""
        return self.constant or (self.repeats and loops > 1)

    @property
    def may_loop(self) -> bool:
        """Whether a request may hold a loop of calls: outputs have to be the same bits, and the clock the judge's."""
        exact = not (self.rtol or self.atol or self.canonical)
        return self.loops != 1 and self.links == 1 and self.clock == "judge" and exact

    @property
    def compares(self) -> bool:
        """Whether outputs are compared: those of a command or of a benchmark are nobody's to see."""
        return self.kind == "call" and self.compare

    def checked(self) -> "Workload":
        """Itself, if it makes sense; ValueError names the field."""
        if self.kind == "command":
            if not self.command:
                raise ValueError("COMMAND: expected a command after --, got none")
            return self
        if self.prepare:
            raise ValueError("--prepare: expected a command with it; callables have a setup of their own")
        if ":" not in self.target:
            raise ValueError(f"--{self.kind}: expected NAME:CALLABLE, got {self.target!r}")
        for name in NAMED[1:]:
            if getattr(self, name) and ":" not in getattr(self, name):
                raise ValueError(f"--{name}: expected NAME:FUNCTION, got {getattr(self, name)!r}")
        for name, least in (("rounds", 1), ("links", 1), ("loops", 0), ("calls", 0), ("warmups", 1), ("case", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected at least {least}, got {getattr(self, name)}")
        if self.canonical and not self.canonical.partition(":")[0].endswith(".py"):
            raise ValueError(f"--canonical: expected FILE.py:FUNCTION, got {self.canonical!r}")
        if self.links > 1 and not self.chain and self.clock == "judge":
            raise ValueError("--links: expected --chain with it, so that no call can be left out")
        if self.loops > 1 and not self.may_loop:
            raise ValueError("--loops: expected no --links, --rtol, --atol, --canonical or --clock cuda with it")
        if self.clock == "cuda" and self.chain:
            raise ValueError("--chain: expected the judge's clock, got --clock cuda")
        if self.graph and self.clock != "cuda":
            raise ValueError("--graph: expected --clock cuda with it")
        if not all(0 <= value < math.inf for value in (self.rtol, self.atol)):
            raise ValueError(f"--rtol, --atol: expected finite numbers from 0 on, got {self.rtol}, {self.atol}")
        return self


@dataclass(frozen=True)
class Plan:
    """The workload and how it is judged."""

    workload: Workload
    delta: float = 0.02
    seed: int = 0
    timeout_s: float = 600.0
    most_foreign: float = 0.1
    """Processor seconds of others, a second of a block: above it the block is left out."""
    primary: str = ""
    """The figure that gets the verdict; "" is the first of its kind in FIGURES."""
    isolation: str = "auto"
    workloads: int = 1
    """How many are judged together: each look's level is divided by it."""
    most_start_s: Annotated[float, ADDED] = 0.25
    """Seconds that import and first call may take longer than base's, if that is more than twice as long."""
    unchecked: Annotated[bool, ADDED] = False
    """Whether the task says that outputs need not be compared."""
    trusted: Annotated[bool, ADDED] = False
    """Whether workers are trusted: what a patched one could spare beside sending is then no bound of `faster`."""
    instructions: Annotated[Literal["", "best", "perf", "valgrind", "bytecode"], ADDED] = ""
    """By what instructions are counted at the end: the best that the machine allows, or one; "": not at all."""
    looks: tuple[tuple[int, float], ...] = field(default=tuple((look.blocks, look.alpha) for look in LOOKS), init=False)

    def checked(self) -> "Plan":
        """Itself with the primary figure named; ValueError names what makes no sense."""
        self.workload.checked()
        for name, value in (
            ("delta", self.delta),
            ("timeout", self.timeout_s),
            ("most-foreign", self.most_foreign),
            ("most-start", self.most_start_s),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"--{name}: expected a positive, finite number, got {value}")
        if self.workloads < 1:
            raise ValueError(f"workloads: expected at least 1, got {self.workloads}")
        figures = FIGURES["worker" if self.workload.worker else "command"]
        if self.primary and self.primary not in figures:
            raise ValueError(f"--primary: expected one of {', '.join(figures)}, got {self.primary}")
        return replace(self, primary=self.primary or figures[0])

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Plan":
        """A plan as `asdict` and JSON leave it."""
        lists = {name: tuple(value) for name, value in found["workload"].items() if isinstance(value, list)}
        others = {name: value for name, value in found.items() if name not in ("workload", "looks")}
        return cls(Workload(**{**found["workload"], **lists}), **others)

    def digest(self) -> str:
        """Identity of the protocol and its options."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
