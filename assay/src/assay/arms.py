"""One arm's process, held so that nothing of it escapes: its own view of the files, a gate, freezing, and an end.

Between the judge and a command stands a supervisor. Where namespaces are to be had it is process 1 of a new pid
namespace, and the arm's tree is mounted at the same place for every arm; elsewhere it is a child subreaper, to which
whatever the command leaves behind falls, and a symbolic link stands at a place of equal length. All processes of an arm
are therefore descendants of one, whatever they fork. Everything dies with the judge (PR_SET_PDEATHSIG).
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

_TICK = os.sysconf("SC_CLK_TCK")
_PDEATHSIG, _SUBREAPER = 1, 36
_NEW_MOUNTS, _NEW_PIDS, _NEW_USER = 0x00020000, 0x20000000, 0x10000000
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18
_LIBC = ctypes.CDLL(None, use_errno=True)


class ArmError(RuntimeError):
    """A run did not end with status 0 in time; `arm` says whose."""

    def __init__(self, arm: str, words: str) -> None:
        super().__init__(f"{arm}: {words}")
        self.arm = arm


@dataclass(frozen=True)
class Ended:
    """What the supervisor saw of a command's end."""

    status: int
    cpu_s: float
    rss_kib: int
    left: int
    """Processes that still ran when the command had ended; they are killed."""


class Running:
    """A command that waits at its gate, runs, is frozen or has ended."""

    def __init__(
        self,
        arm: str,
        command: Sequence[str],
        tree: Path,
        place: Path,
        environment: Mapping[str, str],
        *,
        log: int,
        fds: Sequence[int] = (),
        namespaces: bool,
    ) -> None:
        """Starts the supervisor; the command itself starts with `release`.

        Args:
            arm: named in errors only; the command does not see it.
            command: program and arguments; the program is looked up in `environment`'s PATH.
            tree: shown at `place`, which is an empty directory, or nothing where there are no namespaces.
            place: the command's current directory.
            environment: all of it.
            log: descriptor for its stdout and stderr; stdin is empty.
            fds: descriptors that become 3, 4, ...
            namespaces: as `namespaces_work` says.
        """
        self.arm, self._text = arm, b""
        self._frozen: list[int] = []
        self._layers = 2 if namespaces else 1
        if not namespaces:
            place.unlink(missing_ok=True)
            place.symlink_to(tree.resolve(), target_is_directory=True)
        status_in, status_out = os.pipe()
        gate_in, gate_out = os.pipe()
        self.root = os.fork()
        if self.root == 0:
            try:
                child = _Child(list(command), tree, place, dict(environment), log, list(fds), status_out, gate_in)
                child.start(namespaces)
            finally:
                os._exit(127)
        os.close(status_out)
        os.close(gate_in)
        self._status, self._gate = status_in, gate_out

    def release(self) -> float:
        """Opens the gate; the moment before, on the judge's clock."""
        now = time.perf_counter()
        os.write(self._gate, b"!")
        return now

    def wait(self, timeout_s: float) -> Ended:
        """The command's end. Raises ArmError if it does not come in time or the command could not be started."""
        stop = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._status, select.POLLIN)
        while not self._text.endswith(b"\n"):
            if not poller.poll(max(0.0, stop - time.monotonic()) * 1000):
                raise ArmError(self.arm, f"did not end within {timeout_s:g} s")
            more = os.read(self._status, 4096)
            if not more:
                raise ArmError(self.arm, "its supervisor was killed")
            self._text += more
        seen = json.loads(self._text.splitlines()[0])
        if "error" in seen:
            raise ArmError(self.arm, seen["error"])
        return Ended(**seen)

    def members(self) -> list[int]:
        """All processes of the arm below its supervisor, the command's own first."""
        supervisors = [self.root] if self._layers == 1 else _children(self.root)
        return [process for one in supervisors for process in _below(one)]

    def cpu_seconds(self) -> float:
        """Processor seconds of all living members and of their children that have ended, in steps of 10 ms."""
        return sum(_cpu_seconds(process) for process in self.members())

    def peak_kib(self) -> int:
        """The largest resident set that a living member has had."""
        return max((_peak_kib(process) for process in self.members()), default=0)

    def freeze(self) -> float:
        """Stops every member; until none is new, since a process may fork while others are being stopped.

        Returns their processor seconds: `thaw` finds the same, if they were stopped indeed.
        """
        self._frozen = self._signal(signal.SIGSTOP)
        return sum(_cpu_seconds(process) for process in self._frozen)

    def thaw(self) -> float:
        """Lets every member go on; their processor seconds just before."""
        used = sum(_cpu_seconds(process) for process in self._frozen)
        for process in self._frozen:
            _kill(process, signal.SIGCONT)
        return used

    def _signal(self, what: signal.Signals) -> list[int]:
        done: list[int] = []
        while new := [process for process in self.members() if process not in done]:
            for process in new:
                _kill(process, what)
            done += new
        return done

    def end(self) -> None:
        """Kills whatever is left, and returns when it is gone. May be called twice."""
        if self.root < 0:
            return
        self._signal(signal.SIGKILL)  # _children leaves the dead out, so this ends
        if self._layers == 2:
            for child in _children(self.root):
                _kill(child, signal.SIGKILL)  # process 1: the kernel ends its namespace
        else:
            while _children(self.root, dead=True):
                time.sleep(0.0005)  # until the supervisor has reaped them, so that their time counts as ours
            _kill(self.root, signal.SIGKILL)
        os.waitpid(self.root, 0)
        self.root = -1
        os.close(self._status)
        os.close(self._gate)


@dataclass
class _Child:
    """What runs between fork and exec, in up to three processes: outside, supervisor, command."""

    command: list[str]
    tree: Path
    place: Path
    environment: dict[str, str]
    log: int
    fds: list[int]
    status: int
    gate: int

    def start(self, namespaces: bool) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the judge hears it and ends us
        first = 3
        for fd in sorted({self.log, self.status, self.gate, *self.fds}):
            os.closerange(first, fd)  # other arms' pipes among them: a worker must see the end of its own
            first = fd + 1
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))
        try:
            _check("prctl", _LIBC.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
            if not namespaces:
                _check("prctl", _LIBC.prctl(_SUBREAPER, 1, 0, 0, 0))
                self.supervise()
            _unshare()
            _mount(str(self.tree.resolve()), str(self.place), None, _BIND | _RECURSIVE)
            inner = os.fork()
            if inner == 0:
                _check("prctl", _LIBC.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
                _mount("proc", "/proc", "proc", 0)
                self.supervise()
        except (OSError, RuntimeError) as problem:
            self.tell(error=f"cannot be supervised: {problem}")
            os._exit(1)
        os.close(self.status)
        for fd in self.fds:
            os.close(fd)
        os.waitpid(inner, 0)
        os._exit(0)

    def supervise(self) -> NoReturn:
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
        left = len(_below(os.getpid()))
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
        try:
            os.setsid()
            _check("prctl", _LIBC.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.chdir(self.place)
            if os.read(self.gate, 1) != b"!":
                os._exit(1)
            # Above any number that a pipe of ours has, so that none is overwritten before it is moved.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in self.fds]
            with Path(os.devnull).open("rb") as nothing:
                os.dup2(nothing.fileno(), 0)
            os.dup2(self.log, 1)
            os.dup2(self.log, 2)
            status = fcntl.fcntl(self.status, fcntl.F_DUPFD_CLOEXEC, 100)
            for to, fd in enumerate(high, 3):
                os.dup2(fd, to)
            self.status = status
            os.execvpe(self.command[0], self.command, self.environment)
        except OSError as problem:
            self.tell(error=f"cannot start {self.command[0]}: {problem.strerror}")
        os._exit(1)

    def tell(self, **what: Any) -> None:
        os.write(self.status, json.dumps(what).encode() + b"\n")


def _unshare() -> None:
    """New mount and pid namespaces; as an ordinary user inside a new user namespace with the same ids."""
    user, group = os.getuid(), os.getgid()
    flags = _NEW_MOUNTS | _NEW_PIDS | (_NEW_USER if user else 0)
    _check("unshare", _LIBC.unshare(flags))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    words = (source.encode(), target.encode(), kind.encode() if kind else None)
    _check(f"mount at {target}", _LIBC.mount(*words, ctypes.c_ulong(flags), None))


def _check(what: str, result: int) -> None:
    if result:
        raise RuntimeError(f"{what}: {os.strerror(ctypes.get_errno())}")


@cache
def namespaces_work() -> bool:
    """Whether this user may make mount and pid namespaces here; tried once, with /bin/true or what stands for it."""
    with tempfile.TemporaryDirectory(prefix="assay-") as folder, tempfile.TemporaryFile() as log:
        place = Path(folder) / "tree"
        place.mkdir()
        running = Running("probe", ["true"], Path("/"), place, os.environ, log=log.fileno(), namespaces=True)
        try:
            running.release()
            return running.wait(10).status == 0
        except ArmError:
            return False
        finally:
            running.end()


def _kill(process: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, what)


def _stat(process: str) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None if it has ended."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _children(process: int, dead: bool = False) -> list[int]:
    """A process's children; those that are dead and only wait to be reaped if they are asked for."""
    try:
        tasks = os.listdir(f"/proc/{process}/task")
        lists = [Path(f"/proc/{process}/task/{task}/children").read_text().split() for task in tasks]
        found = [int(child) for one in lists for child in one]
    except OSError:
        found = [] if _alive(process) is None else _children_by_scan(process)
    return [child for child in found if (state := _alive(child)) and (dead or state not in "ZX")]


def _children_by_scan(process: int) -> list[int]:
    """Where the kernel keeps no lists of children."""
    names = [name for name in os.listdir("/proc") if name.isdigit()]
    return [int(name) for name in names if (fields := _stat(name)) and int(fields[1]) == process]


def _alive(process: int) -> str | None:
    """The state letter; None if there is no such process."""
    fields = _stat(str(process))
    return fields[0] if fields else None


def _below(process: int) -> list[int]:
    """All living descendants."""
    found, parents = [], [process]
    while parents:
        parents = [child for parent in parents for child in _children(parent)]
        found += parents
    return found


def _cpu_seconds(process: int) -> float:
    fields = _stat(str(process))
    return sum(int(ticks) for ticks in fields[11:15]) / _TICK if fields else 0.0


def _peak_kib(process: int) -> int:
    try:
        lines = Path("/proc", str(process), "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
