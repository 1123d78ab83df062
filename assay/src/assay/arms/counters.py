"""Programs that count the instructions of another one, and what they print at its end.

Noise of the machine does not change how many instructions a program executes, or by next to nothing.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

_TRIED_S = 60.0


@dataclass(frozen=True)
class Counter:
    """A way to count."""

    name: str
    words: str
    """What counts, for a report."""
    prefix: tuple[str, ...] = ()
    """In front of a command; none for what counts inside the worker."""
    printed: str = ""
    """Expression for what it prints when a process has ended: the count is its group."""
    runs: int = 1
    """How often a count is taken: where the kernel or other processes blur it a little, the median is taken."""

    def read(self, output: str) -> int:
        """The sum over all processes of a command. ValueError if nothing was counted."""
        found = [int(re.sub(r"[,.]", "", one)) for one in re.findall(self.printed, output)]
        if not found:
            last = output.strip().splitlines()[-1:] or ["nothing"]
            raise ValueError(f"{self.name}: expected a count of instructions, got {last[0]!r}")
        return sum(found)


COUNTERS = {
    one.name: one
    for one in (
        Counter(
            "perf",
            "the processor's counter",
            ("perf", "stat", "-x,", "-e", "instructions:u", "--"),
            r"(?m)^(\d+),[^,]*,instructions:u\b",
            runs=3,
        ),
        Counter(
            "valgrind",
            "valgrind",
            (
                *("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"),
                *("--trace-children=yes", "--vgdb=no"),
            ),
            r"(?m)^==\d+== I +refs: +([\d,.]+)",
        ),
        Counter("bytecode", "CPython's bytecode; work in C is not counted"),
    )
}
"""The best first."""


@cache
def refusal(name: str) -> str:
    """Why a counter cannot be had here, in words; "" if it can."""
    counter = COUNTERS[name]
    if not counter.prefix:
        return ""
    if shutil.which(counter.prefix[0]) is None:
        return f"{counter.prefix[0]}: expected it on PATH, found none"
    command = [*counter.prefix, sys.executable, "-I", "-S", "-c", "pass"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TRIED_S)
        counter.read(done.stderr)
    except (OSError, ValueError, subprocess.TimeoutExpired) as problem:
        return str(problem)
    return ""


def best(wanted: str, *, worker: bool, refused: Callable[[str], str] = refusal) -> tuple[Counter | None, Sequence[str]]:
    """The counter that was asked for, or the best that this machine allows, and why better ones cannot be had.

    None if there is none. Bytecode can be counted in a worker only.
    """
    names = list(COUNTERS) if wanted == "best" else [wanted]
    why: list[str] = []
    for name in names:
        words = "bytecode: it is counted in workers, not in commands" if not worker and name == "bytecode" else ""
        if not (words := words or refused(name)):
            return COUNTERS[name], why
        why.append(words)
    return None, why
