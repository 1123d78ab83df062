"""What else ran: processor time of the machine less our own, and processes that outlived their arm."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float | None:
    """Processor seconds spent on anything since start, or taken by the host; None where /proc is missing."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, stolen = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + stolen) / _TICK


def own_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass(frozen=True)
class Load:
    """A moment of the machine, to be compared with a later one."""

    busy: float | None
    own: float

    @classmethod
    def now(cls) -> "Load":
        """The present one."""
        return cls(busy_seconds(), own_seconds())

    def foreign_since(self) -> float | None:
        """Processor seconds that others have used since; None where it cannot be seen. Counted in steps of 10 ms."""
        now = Load.now()
        if self.busy is None or now.busy is None:
            return None
        return max(0.0, now.busy - self.busy - (now.own - self.own))


def survivors(session: int) -> list[int]:
    """Processes that still run in a session whose leader has ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def end_session(session: int) -> int:
    """Kills what is left of a session; how many processes that were."""
    left = survivors(session)
    for process in left:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(left)
