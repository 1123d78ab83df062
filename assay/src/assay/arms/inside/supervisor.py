"""Stands over a command: opens its gate, waits for its end, counts what it leaves behind. Standard library only.

arms.py forks and calls `Order.supervise`; in a sandbox this file is process 1, started as a script by its path, and its
arguments are the numbers of the order as JSON, then the command. What the command starts stays below this process.
"""

import ctypes
import fcntl
import json
import os
import signal
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

TICK = os.sysconf("SC_CLK_TCK")
PDEATHSIG, _DUMPABLE, SUBREAPER = 1, 4, 36
LIBC = ctypes.CDLL(None, use_errno=True)
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_SET_PIPE_SIZE = 1031
_FCNTL: dict[str, dict[int, tuple[int, ...]]] = {
    "x86_64": {0xC000003E: (72, 72 | 0x40000000), 0x40000003: (55, 221)},
    "aarch64": {0xC00000B7: (25,), 0x40000028: (55, 221)},
}
"""By machine: the numbers of fcntl, by what seccomp calls each way of calling the kernel."""
_LOAD, _EQUAL, _RETURN, _ALLOW, _NOT_PERMITTED = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001


@dataclass
class Order:
    """What runs between fork and exec: the supervisor and its command."""

    command: list[str]
    place: str
    environment: dict[str, str]
    log: int
    fds: list[int]
    """They become 3, 4, ... in the command."""
    status: int
    gate: int
    stdin: int | None = None
    limits: dict[str, int] = field(default_factory=dict)
    """Of the command and each of its processes, by their names in `resource`, as hard ones."""

    def inherited(self) -> list[int]:
        """All descriptors that are needed to carry it out."""
        return [self.log, self.status, self.gate, *self.fds, *([] if self.stdin is None else [self.stdin])]

    def supervise(self) -> NoReturn:
        """Starts the command, tells of its end, and stays until it is killed."""
        started = os.fork()
        if started == 0:
            self.run()
        os.close(self.gate)
        for fd in self.fds:
            os.close(fd)
        while True:
            process, status, usage = os.wait3(0)
            if process == started:
                break
        left = len(below(os.getpid()))
        self.tell(
            status=os.waitstatus_to_exitcode(status),
            cpu_s=round(usage.ru_utime + usage.ru_stime, 6),
            rss_kib=usage.ru_maxrss,
            left=left,
        )
        while True:  # whatever is left stays below this process until the judge ends it; the dead are counted as ours
            try:
                os.wait()
            except ChildProcessError:
                signal.pause()

    def run(self) -> NoReturn:
        """Waits at the gate and becomes the command."""
        try:
            os.setsid()
            check("prctl", LIBC.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.chdir(self.place)
            self.limit()
            self.tell(ready=True)
            if os.read(self.gate, 1) != b"!":
                os._exit(1)
            # Above any number that a pipe of ours has, so that none is overwritten before it is moved.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in self.fds]
            os.dup2(os.open(os.devnull, os.O_RDONLY) if self.stdin is None else self.stdin, 0)
            os.dup2(self.log, 1)
            os.dup2(self.log, 2)
            self.status = fcntl.fcntl(self.status, fcntl.F_DUPFD_CLOEXEC, 100)
            for to, fd in enumerate(high, 3):
                os.dup2(fd, to)
            os.execvpe(self.command[0], self.command, self.environment)  # noqa: S606 - that is what it is for
        except OSError as problem:
            self.tell(error=f"cannot start {self.command[0]}: {problem.strerror}")
        os._exit(1)

    def limit(self) -> None:
        """Sets the limits, unless there are lower ones already."""
        import resource

        for name, most in self.limits.items():
            kind = getattr(resource, f"RLIMIT_{name}")
            soft, hard = (most if old == resource.RLIM_INFINITY else min(old, most) for old in resource.getrlimit(kind))
            resource.setrlimit(kind, (soft, hard))

    def tell(self, **what: Any) -> None:
        """A line to the judge."""
        os.write(self.status, json.dumps(what).encode() + b"\n")


def no_larger_pipes() -> bool:
    """From now on no pipe of this process and its children can be made larger; whether the kernel sees to it.

    A user's pages for pipes are counted together, so that few large pipes of one arm would leave others small ones.
    """
    table = _FCNTL.get(os.uname().machine, {})
    program: list[tuple[int, int, int, int]] = []
    for way, numbers in table.items():
        # Is it this way? Then each number in turn; at the first that fits the command is looked at.
        program += [(_LOAD, 0, 0, 4), (_EQUAL, 0, len(numbers) + 6, way), (_LOAD, 0, 0, 0)]
        program += [(_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
        program += [(_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 24), (_EQUAL, 0, 1, _SET_PIPE_SIZE)]
        program += [(_RETURN, 0, 0, _NOT_PERMITTED), (_RETURN, 0, 0, _ALLOW)]
    if not program:
        return False
    program.append((_RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    head = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    check("prctl", LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    return not LIBC.prctl(_SECCOMP, _FILTER, head, 0, 0)


def check(what: str, result: int) -> None:
    """RuntimeError unless a call of the C library gave 0."""
    if result:
        raise RuntimeError(f"{what}: {os.strerror(ctypes.get_errno())}")


def stat(process: int | str) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on, or of /proc/PID/task/TID/stat; None if it has ended."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - starts quickly
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def children(process: int, dead: bool = False) -> list[int]:
    """A process's children; those that are dead and only wait to be reaped if they are asked for."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{process}/task"):  # noqa: PTH208
            with open(f"/proc/{process}/task/{task}/children", encoding="ascii") as file:  # noqa: PTH123
                found += [int(child) for child in file.read().split()]
    except OSError:
        found = [] if stat(process) is None else _children_by_scan(process)
    return [child for child in found if (fields := stat(child)) and (dead or fields[0] not in "ZX")]


def _children_by_scan(process: int) -> list[int]:
    """Where the kernel keeps no lists of children."""
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    return [number for number in numbers if (fields := stat(number)) and int(fields[1]) == process]


def below(process: int) -> list[int]:
    """All living descendants."""
    found, parents = [], [process]
    while parents:
        parents = [child for parent in parents for child in children(parent)]
        found += parents
    return found


def cpu_seconds(process: int) -> float:
    """Of a process and its children that have ended, in steps of 10 ms."""
    fields = stat(process)
    return sum(int(ticks) for ticks in fields[11:15]) / TICK if fields else 0.0


def main(arguments: Sequence[str]) -> NoReturn:
    """Process 1 of a sandbox."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So that the command, which has the same user, can neither trace this process nor open its descriptors.
    check("prctl", LIBC.prctl(_DUMPABLE, 0, 0, 0, 0))
    order = Order(list(arguments[1:]), os.environ["PWD"], dict(os.environ), **json.loads(arguments[0]))
    for fd in order.inherited():
        os.set_inheritable(fd, False)  # the command gets what `run` gives it, above all not the status pipe
    no_larger_pipes()
    try:
        order.supervise()
    finally:
        os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
