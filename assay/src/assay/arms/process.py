"""One arm's process, held so that nothing of it escapes: its own view of the files, a gate, freezing, and an end.

Between the judge and a command stands a supervisor (inside/supervisor.py). In a sandbox it is process 1 of that.
Without one, where namespaces are to be had, it is process 1 of a new pid namespace, and the arm's tree is mounted at
the same place for every arm. Elsewhere it is a child subreaper, to which whatever the command leaves behind falls, and
a symbolic link stands at a place of equal length. All processes of an arm are therefore descendants of one.
Everything dies with the judge (PR_SET_PDEATHSIG).
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from assay.arms import turns
from assay.arms.groups import Group
from assay.arms.inside.supervisor import (
    LIBC,
    PDEATHSIG,
    SUBREAPER,
    TICK,
    Order,
    below,
    check,
    children,
    cpu_seconds,
)
from assay.arms.looks import awake, own_kib, peak_kib, runnable
from assay.contract.box import Limits
from assay.contract.errors import ArmError, LateError

Wrap = Callable[[list[str], Mapping[str, str]], list[str]]
"""The supervisor's arguments and the environment -> program and arguments that start it inside a sandbox."""
PYTHON, PREFIX = os.path.normpath(sys.executable), os.path.normpath(sys.prefix)
"""The interpreter and its environment; a sandbox has no folders to go back through that `..` in a path may name."""
MOST_FROZEN_S = 2 / TICK
"""Processor seconds that a frozen arm may seem to use: two steps of their count."""
_WATCH_S, _WEIGH_S, _START_S = 0.2, 0.005, 60.0
_FIRST, _ABOVE = 100, 200
"""Numbers of descriptors on the way into a sandbox, and those above which they are put aside meanwhile."""
_COUNTS_PER_NAMESPACE = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (5, 14)
"""Whether the kernel counts a user's processes per namespace of users; before, it counts all of them."""
_NEW_MOUNTS, _NEW_PIDS, _NEW_USER = 0x00020000, 0x20000000, 0x10000000
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18


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
        stdin: int | None = None,
        namespaces: bool,
        wrap: Wrap | None = None,
        limits: Limits | None = None,
        weighs: bool = False,
    ) -> None:
        """Starts the supervisor; the command itself starts with `release`.

        Args:
            arm: named in errors only; the command does not see it.
            command: program and arguments; the program is looked up in `environment`'s PATH.
            tree: shown at `place`, which is an empty directory, or nothing where there are no namespaces.
            place: the command's current directory.
            environment: all of it.
            log: descriptor for its stdout and stderr.
            fds: descriptors that become 3, 4, ...
            stdin: descriptor; without it stdin is empty.
            namespaces: as `namespaces_work` says.
            wrap: how the sandbox is entered (sandbox.py), which then shows the tree at `place` itself.
            limits: on memory, processes and disk; `wait` and `watch` see to them.
            weighs: memory is what is measured: that of all members together is read 200 times a second.
        """
        self.arm, self._text = arm, b""
        self._told: dict[str, Any] = {}
        self._frozen: dict[int, float] = {}
        self._log, self._weighs, self._heaviest = log, weighs, 0
        self.every_s = _WEIGH_S if weighs else _WATCH_S
        """How long nobody may wait without a look at the members."""
        self._watched = time.monotonic()
        self.woken = False
        """Whether a member that had been stopped was found at work, ever."""
        self._layers, self.sandboxed = 2 if namespaces or wrap else 1, wrap is not None
        if wrap and not os.getuid():
            self._layers = 3  # see _confine
        if self._layers == 1:
            place.unlink(missing_ok=True)
            place.symlink_to(tree.resolve(), target_is_directory=True)
        status_in, status_out = os.pipe()
        gate_in, gate_out = os.pipe()
        self.group = Group(limits or Limits())
        hard = self.group.limits.hard(own_user=_COUNTS_PER_NAMESPACE and self._layers > 1)
        self.root = os.fork()
        if self.root == 0:
            try:
                order = Order(
                    list(command), str(place), dict(environment), log, list(fds), status_out, gate_in, stdin, hard
                )
                self.group.enter()
                _start(order, tree, namespaces, wrap)
            finally:
                os._exit(127)
        os.close(status_out)
        os.close(gate_in)
        self._status, self._gate = status_in, gate_out

    def release(self) -> float:
        """Opens the gate once the command stands there; the moment before, on the judge's clock.

        Raises ArmError if it does not come so far within a minute. What else goes wrong is told by `wait`.
        """
        self._told = self._told or turns.alone(self._line(_START_S, "start"))
        now = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):
            os.write(self._gate, b"!")
        return now

    def wait(self, timeout_s: float) -> Ended:
        """The command's end. Raises ArmError if it does not come in time or the command could not be started."""
        return turns.alone(self.ending(timeout_s))

    def ending(self, timeout_s: float) -> turns.Steps[Ended]:
        """As `wait`, beside others (turns.py)."""
        while not self._told or "ready" in self._told:
            self._told = yield from self._line(timeout_s, "end")
            self.watch()
            if not self._told:
                raise ArmError(self.arm, "its supervisor was killed", infra=True)
        if "error" in self._told:
            raise ArmError(self.arm, self._told["error"], infra="supervised" in self._told["error"])
        return Ended(**self._told)

    def _line(self, timeout_s: float, what: str) -> turns.Steps[dict[str, Any]]:
        """What the supervisor says next; {} if it never will. ArmError if it says nothing in time."""
        stop = time.monotonic() + timeout_s
        while b"\n" not in self._text:
            if not (yield turns.Wait(self._status, min(time.monotonic() + self.every_s, stop))):
                self.watch()
                if time.monotonic() >= stop:
                    raise LateError(self.arm, f"did not {what} within {timeout_s:g} s", killed=True)
                continue
            more = os.read(self._status, 4096)
            if not more:
                return {}
            self._text += more
        line, _, self._text = self._text.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told

    def watch(self, now: bool = False) -> None:
        """Kills all members and raises ArmError if they use too much; disk and pipes: once a second, or `now`."""
        self._watched = time.monotonic()
        members = self.members()
        if self._weighs:
            self._heaviest = max(self._heaviest, sum(map(own_kib, members)))
        self._killed_for(self.group.exceeded(members, self._log, now))

    def _killed_for(self, words: str) -> None:
        """Kills all members and raises ArmError if there are words of what they have too much of."""
        if words:
            self._signal(signal.SIGKILL)
            raise ArmError(self.arm, words, killed=True)

    def watch_in_time(self) -> None:
        """As `watch`, unless that was done a moment ago: for callers that never wait for long."""
        if time.monotonic() - self._watched >= self.every_s:
            self.watch()

    def members(self) -> list[int]:
        """All processes of the arm below its supervisor, the command's own first."""
        return [process for one in self._supervisors()[-1] for process in below(one)]

    def _supervisors(self) -> list[list[int]]:
        """Those of each layer, `root` first; a layer may have none yet."""
        layers = [[self.root]]
        for _ in range(self._layers - 1):
            layers.append([child for one in layers[-1] for child in children(one)])
        return layers

    def _innermost(self) -> list[int]:
        """The supervisors of the last layer that has any yet; `root` itself only if it is the only layer.

        Those around them reap them and end by themselves. If one of those were killed first, the kernel would end what
        is inside without counting its processor time as the judge's, and it would look foreign.
        """
        layers = self._supervisors()
        return next((layer for layer in reversed(layers[1:]) if layer), [] if layers[1:] else [self.root])

    def cpu_seconds(self) -> float:
        """Processor seconds of all living members and of their children that have ended, in steps of 10 ms."""
        return sum(cpu_seconds(process) for process in self.members())

    def runnable(self) -> bool:
        """Whether a thread of a living member runs or waits for a processor."""
        return any(map(runnable, self.members()))

    def peak_kib(self) -> int:
        """The most that all members together were seen to have, at least the largest peak of a living one."""
        return max(self._heaviest, max((peak_kib(process) for process in self.members()), default=0))

    def freeze(self) -> float:
        """Stops every member; until none is new, since a process may fork while others are being stopped.

        Returns their processor seconds: `thaw` finds the same, if they were stopped indeed. ArmError if they have so
        many pipes that others, whose turn it is, would have to do with less.
        """
        self._frozen = {process: cpu_seconds(process) for process in self._signal(signal.SIGSTOP)}
        self._killed_for(self.group.piped(list(self._frozen)))
        return sum(self._frozen.values())

    def thaw(self) -> float:
        """Lets every member go on; the processor seconds of all just before, of those that came meanwhile, too.

        A stopped process can be slow to stop inside the kernel. One that has used time since and is not stopped even
        now was woken: `woken` remembers it.
        """
        used = {process: cpu_seconds(process) for process in self.members()}
        for process, seconds in used.items():
            self.woken |= seconds - self._frozen.get(process, seconds) > MOST_FROZEN_S and awake(process)
            _kill(process, signal.SIGCONT)
        return sum(used.values())

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
        self._signal(signal.SIGKILL)  # `children` leaves the dead out, so this ends
        while any(children(one, dead=True) for one in self._supervisors()[-1]):
            time.sleep(0.0005)  # until the supervisor has reaped them, so that their time counts as ours
        while os.waitpid(self.root, os.WNOHANG)[0] == 0:
            for process in self._innermost():
                _kill(process, signal.SIGKILL)
            time.sleep(0.0005)
        self.root = -1
        self.group.end()
        os.close(self._status)
        os.close(self._gate)


def _start(order: Order, tree: Path, namespaces: bool, wrap: Wrap | None) -> None:
    """Runs in the forked child: becomes the supervisor, or puts it into namespaces or a sandbox. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the judge hears it and ends us
    first = 3
    for fd in sorted(set(order.inherited())):
        os.closerange(first, fd)  # other arms' pipes among them: a worker must see the end of its own
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
    try:
        check("prctl", LIBC.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        if wrap is not None:
            _confine(order)
            _enter(order, wrap)
        if not namespaces:
            check("prctl", LIBC.prctl(SUBREAPER, 1, 0, 0, 0))
            order.supervise()
        _unshare()
        _mount(str(tree.resolve()), order.place, None, _BIND | _RECURSIVE)
        _become_process_1(order)
        _mount("proc", "/proc", "proc", 0)
        order.supervise()
    except (OSError, RuntimeError) as problem:
        order.tell(error=f"cannot be supervised: {problem}")
        os._exit(1)


def _confine(order: Order) -> None:
    """Goes on as process 1 of a pid namespace, in which bubblewrap makes its own.

    If the judge is killed while bubblewrap divides, its inner half would wait for the outer one for ever; here the
    kernel ends both. An ordinary user may not make one without a user namespace, of which bubblewrap needs the first.
    """
    if not os.getuid():
        check("unshare", LIBC.unshare(_NEW_PIDS))
        _become_process_1(order)


def _become_process_1(order: Order) -> None:
    """Goes on in a child, the first of a new pid namespace; this process waits for it and ends."""
    inner = os.fork()
    if inner:
        os.close(order.status)
        for fd in order.fds:
            os.close(fd)
        os.waitpid(inner, 0)
        os._exit(0)
    check("prctl", LIBC.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    gate = select.poll()
    gate.register(order.gate, select.POLLHUP)
    if gate.poll(0):  # the judge died before this process could hear of it
        os._exit(1)


def _enter(order: Order, wrap: Wrap) -> NoReturn:
    """Becomes the sandbox's program, in which the supervisor is process 1."""
    # The command can read its supervisor's arguments: the numbers say nothing of how many other arms there are.
    moved = {fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in order.inherited()}
    place = {fd: os.dup2(high, number) for number, (fd, high) in enumerate(moved.items(), _FIRST)}
    numbers = {
        "log": place[order.log],
        "fds": [place[fd] for fd in order.fds],
        "status": place[order.status],
        "gate": place[order.gate],
        "stdin": None if order.stdin is None else place[order.stdin],
        "limits": order.limits,
    }
    for fd in {*order.inherited(), *moved.values()}.difference(place.values()):
        os.close(fd)
    command = wrap([json.dumps(numbers), *order.command], order.environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(place[order.log], 1)
    os.dup2(place[order.log], 2)
    os.execve(command[0], command, {})


def _unshare() -> None:
    """New mount and pid namespaces; as an ordinary user inside a new user namespace with the same ids."""
    user, group = os.getuid(), os.getgid()
    flags = _NEW_MOUNTS | _NEW_PIDS | (_NEW_USER if user else 0)
    check("unshare", LIBC.unshare(flags))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    words = (source.encode(), target.encode(), kind.encode() if kind else None)
    check(f"mount at {target}", LIBC.mount(*words, ctypes.c_ulong(flags), None))


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
