"""What else ran, and what held the machine back: foreign processor time, throttling, clocks. GPUs: gpu.py."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from assay.machine import others

_TICK = os.sysconf("SC_CLK_TCK")
FOREIGN = "foreign processor time"
HOST = "the host"
"""Who takes time that a virtual processor was denied."""
_CPUS = Path("/sys/devices/system/cpu")


def busy_seconds() -> float | None:
    """Seconds since start in which the processors that this process may use did anything, or were taken by the host.

    Pinned to some processors, the judge and its arms neither use the others nor ask what happens there. None where
    /proc is missing.
    """
    counts = by_processor()
    return None if counts is None else sum(count.busy + count.stolen for count in counts.values())


class Count(NamedTuple):
    """Seconds since start of one processor."""

    busy: float
    stolen: float
    """Taken by the host of a virtual machine."""


def by_processor() -> dict[int, Count] | None:
    """Of each processor that this process may use; None where /proc is missing."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    found = {}
    for name, *fields in (line.split() for line in lines if line.startswith("cpu")):
        if name[3:].isdigit() and int(name[3:]) in os.sched_getaffinity(0):
            user, nice, system, _, _, irq, softirq, stolen = (int(field) for field in fields[:8])
            found[int(name[3:])] = Count((user + nice + system + irq + softirq) / _TICK, stolen / _TICK)
    return found


def own_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def throttle_count() -> int:
    """How often a processor has been slowed for its heat since start; 0 where that is not counted."""
    return sum(_number(path) or 0 for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))


def clock_mhz() -> float | None:
    """Mean frequency of the processors at this moment; None where it is not shown."""
    found = [value for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq") if (value := _number(path))]
    return sum(found) / len(found) / 1000 if found else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


class Evidence(NamedTuple):
    """What a block's row says of the machine; None where it cannot be seen."""

    foreign_cpu_s: float | None
    clock_mhz: int | None
    others: dict[str, float]
    """Who used most of it: processor seconds by name."""


class Foreign(NamedTuple):
    """What others have used."""

    seconds: float | None
    """Processor seconds, counted in steps of 10 ms; None where they cannot be seen."""
    by: dict[str, float]
    """Of those who used most, by name."""


@dataclass(frozen=True)
class Load:
    """A moment of the machine, to be compared with a later one."""

    busy: float | None
    stolen: float
    own: float
    throttled: int
    others: Mapping[int, others.Process]

    @classmethod
    def now(cls) -> "Load":
        """The present one."""
        counts = by_processor()
        stolen = sum(count.stolen for count in counts.values()) if counts else 0.0
        return cls(busy_seconds(), stolen, own_seconds(), throttle_count(), others.processes())

    def foreign_since(self) -> float | None:
        """Processor seconds that others have used since; None where it cannot be seen. Counted in steps of 10 ms."""
        return self._until(Load.now()).seconds

    def since(self) -> Foreign:
        """What others have used since, and who they are."""
        return self._until(Load.now())

    def _until(self, now: "Load") -> Foreign:
        by = others.most(self.others, now.others, {HOST: now.stolen - self.stolen})
        if self.busy is None or now.busy is None:
            return Foreign(None, by)
        return Foreign(max(0.0, now.busy - self.busy - (now.own - self.own)), by)

    def disturbances(self, elapsed_s: float, most_foreign: float) -> tuple[Evidence, list[str]]:
        """Evidence of what has happened since, for RAW, and why it spoils a block; no reasons if it does not.

        `most_foreign`: processor seconds of others that are allowed, a second.
        """
        seen, reasons = self.since(), []
        foreign = seen.seconds
        if foreign is not None and foreign > most_foreign * elapsed_s + 2 / _TICK:
            reasons.append(f"{FOREIGN}: {foreign:.2f} s in {elapsed_s:.2f} s{others.named(seen.by)}")
        if throttle_count() > self.throttled:
            reasons.append("a processor was slowed for its heat")
        clock = clock_mhz()
        evidence = Evidence(
            None if foreign is None else round(foreign, 3), None if clock is None else round(clock), seen.by
        )
        return evidence, reasons


def wait_for_calm(
    patience_s: float, most: float = 0.05, told: Callable[[Foreign, float], None] = lambda *_: None
) -> float:
    """Waits until others use less than `most` of a processor for half a second, or patience ends; the seconds taken.

    `told` hears what others used in a period, and how many seconds that lasted.
    """
    start = time.monotonic()
    while time.monotonic() - start < patience_s:
        now, begun = Load.now(), time.monotonic()
        time.sleep(0.5)
        foreign = now.since()
        told(foreign, time.monotonic() - begun)
        if foreign.seconds is None or foreign.seconds <= 0.5 * most:
            break
    return time.monotonic() - start
