"""What else ran, and what held the machine back: foreign processor time, throttling, clocks. GPUs: gpu.py."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_TICK = os.sysconf("SC_CLK_TCK")
FOREIGN = "foreign processor time"
_CPUS = Path("/sys/devices/system/cpu")


def busy_seconds() -> float | None:
    """Seconds since start in which the processors that this process may use did anything, or were taken by the host.

    Pinned to some processors, the judge and its arms neither use the others nor ask what happens there. None where
    /proc is missing.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for name, *fields in (line.split() for line in lines):
        if name in ours:
            user, nice, system, _, _, irq, softirq, stolen = (int(field) for field in fields[:8])
            ticks += user + nice + system + irq + softirq + stolen
    return ticks / _TICK


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


@dataclass(frozen=True)
class Load:
    """A moment of the machine, to be compared with a later one."""

    busy: float | None
    own: float
    throttled: int

    @classmethod
    def now(cls) -> "Load":
        """The present one."""
        return cls(busy_seconds(), own_seconds(), throttle_count())

    def foreign_since(self) -> float | None:
        """Processor seconds that others have used since; None where it cannot be seen. Counted in steps of 10 ms."""
        now = Load.now()
        if self.busy is None or now.busy is None:
            return None
        return max(0.0, now.busy - self.busy - (now.own - self.own))

    def disturbances(self, elapsed_s: float, most_foreign: float) -> tuple[Evidence, list[str]]:
        """Evidence of what has happened since, for RAW, and why it spoils a block; no reasons if it does not.

        `most_foreign`: processor seconds of others that are allowed, a second.
        """
        foreign, reasons = self.foreign_since(), []
        if foreign is not None and foreign > most_foreign * elapsed_s + 2 / _TICK:
            reasons.append(f"{FOREIGN}: {foreign:.2f} s in {elapsed_s:.2f} s")
        if throttle_count() > self.throttled:
            reasons.append("a processor was slowed for its heat")
        clock = clock_mhz()
        evidence = Evidence(
            None if foreign is None else round(foreign, 3),
            None if clock is None else round(clock),
        )
        return evidence, reasons


def wait_for_calm(patience_s: float, most: float = 0.05) -> float:
    """Waits until others use less than `most` of a processor for half a second, or patience ends; the seconds taken."""
    start = time.monotonic()
    while time.monotonic() - start < patience_s:
        now = Load.now()
        time.sleep(0.5)
        foreign = now.foreign_since()
        if foreign is None or foreign <= 0.5 * most:
            break
    return time.monotonic() - start
