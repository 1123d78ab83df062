"""What a gate is: a check beside speed, which says in a word and in a sentence what it found."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from assay.arms.commands import disk_is_full
from assay.contract.errors import ArmError, OverBudgetError
from assay.contract.frozen import Frozen
from assay.contract.outcome import INFRA

if TYPE_CHECKING:  # tasks are read with pydantic, which is not there where plans are measured
    from assay.contract.task import Read, Task

OUT_OF_BUDGET = f"{INFRA}budget"
SKIPPED, NOT_ASKED = "skipped", "not_asked"


class Found(NamedTuple):
    """What a gate found: "" as outcome if it was passed, SKIPPED if it was left out on request, NOT_ASKED if there is
    nothing that it could look at, which is no pass.
    """

    outcome: str
    words: str

    @property
    def passed(self) -> bool:
        """Whether the next gate is tried."""
        return self.outcome in ("", SKIPPED, NOT_ASKED)


LEFT_OUT = Found(SKIPPED, "left out on request")


class Where(Enum):
    """On which machine a gate is tried, where a plan is prepared on one and measured on another."""

    PREPARED = "it needs the task and its packages"
    MEASURED = "it needs a compiler or a device of that machine"
    BOTH = "trees are built anew on each"


@dataclass(frozen=True)
class Given:
    """What a gate may look at, and how long."""

    frozen: Frozen
    sandboxed: bool
    write: Callable[[Path], object]
    """Puts the candidate's files, as they were handed in, into a folder that is not there yet."""
    renew: Callable[[], object] = lambda: None
    """Makes the arms' trees anew, with nothing built in them; nothing where they are new already."""
    seconds: float = math.inf
    """What is left of the budget of all gates."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What is set in arms beside the task's own, as it is while they are timed: which GPU is ours."""
    build_jobs: int = 0
    """How many trees are built beside each other; 0: all, at most one per two processors."""
    begun: float = field(default_factory=time.monotonic)
    read: "Read | None" = None
    """The task; None on a machine that only measures."""

    def jobs(self, trees: int) -> int:
        """How many of so many trees are built beside each other."""
        return self.build_jobs or max(1, min(trees, len(os.sched_getaffinity(0)) // 2))

    def most(self, seconds: float) -> float:
        """So many seconds, or what is left of the budget. OverBudgetError if nothing is."""
        left = self.seconds - (time.monotonic() - self.begun)
        if left <= 0:
            raise OverBudgetError("the task's seconds of gates are spent")
        return min(seconds, left)


@dataclass(frozen=True)
class Gate:
    """A row of the table."""

    name: str
    run: Callable[[Given], Found]
    where: Where
    rejects: tuple[str, ...] = ()
    """The outcomes of its own that count against a candidate. It may also say those of every verdict."""
    asked: Callable[["Task", Sequence[str]], bool] | None = None
    """Whether a task, or the paths that a patch changes, make it necessary; None: it always is, and is never left out.

    A gate that was asked for and not run leaves a patch not evaluated.
    """
    otherwise: str = ""
    """In words, what is not looked at where nobody asks for it."""
    ahead: Callable[[Given], Found] | None = None
    """What of it is done where a plan is prepared, if the task says that trees are built there."""
    installs: tuple[str, ...] = ()
    """Packages that it imports."""

    def tried(self, given: Given) -> Found:
        """What it finds; what fails on a full disk, and an arm that could not be started, is the infrastructure's."""
        if self.asked is not None and self.name not in given.frozen.content["gates"]["asked"]:
            return Found(NOT_ASKED, self.otherwise)
        if given.seconds <= 0:
            return Found(OUT_OF_BUDGET, f"{self.name}: the task's seconds of gates are spent")
        try:
            found = self.run(given)
            if not found.passed and disk_is_full(given.frozen.folder):
                return Found(f"{INFRA}{self.name}", f"the disk is full; {found.words}")
            return found
        except OverBudgetError as problem:
            return Found(problem.outcome, f"{self.name}: {problem}")
        except ArmError as problem:
            return Found(f"{INFRA}{self.name}", str(problem))
