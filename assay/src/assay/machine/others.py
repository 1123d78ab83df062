"""Which processes use the processors beside the judge and its arms."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from assay.arms.inside.supervisor import TICK, below

_SHOWN = 3
_LAST_PROCESSOR = 36
"""Of the fields of /proc/PID/stat behind the name."""


class Process(NamedTuple):
    """One that neither is the judge nor descends from it."""

    name: str
    """As the kernel shortens it. It is anybody's word: escape it before it is shown."""
    seconds: float
    """Processor seconds since it started."""
    processor: int
    """On which it ran last."""


def processes() -> dict[int, Process]:
    """All foreign processes, by number."""
    ours = {os.getpid(), *below(os.getpid())}
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (number := int(folder.name)) in ours:
            continue
        try:
            text = (folder / "stat").read_text(errors="replace")
        except OSError:
            continue
        head, _, rest = text.rpartition(")")
        fields = rest.split()
        seconds = (int(fields[11]) + int(fields[12])) / TICK
        found[number] = Process(head.partition("(")[2], seconds, int(fields[_LAST_PROCESSOR]))
    return found


def most(before: Mapping[int, Process], after: Mapping[int, Process], more: Mapping[str, float]) -> dict[str, float]:
    """Processor seconds between two moments of the busiest few, by name; `more` counts beside the processes.

    Processes count that ran last on a processor that this process may use.
    """
    used, allowed = dict(more), os.sched_getaffinity(0)
    for number, process in after.items():
        if process.processor in allowed:
            earlier = before[number].seconds if number in before else 0.0
            used[process.name] = used.get(process.name, 0.0) + process.seconds - earlier
    busiest = sorted(used.items(), key=lambda pair: -pair[1])[:_SHOWN]
    return {name: round(seconds, 2) for name, seconds in busiest if seconds >= 1 / TICK}


def named(by: Mapping[str, float]) -> str:
    """Who used how much, in words for the end of a sentence; empty if nobody was seen."""
    words = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in by.items())
    return f" ({words})" if words else ""
