"""Kernel objects that reach out of a sandbox are found by a differ before, while and after an arm has run."""

import ctypes
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from assay.arms.process import Running
from assay.arms.sandbox import PLACE, Entry, environment
from assay.contract.box import Box
from assay.experiment.blocks import Blocks
from assay.machine.objects import HELD, Object, held, snapshot

MAKES = """
import ctypes, fcntl, os, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
shared = open(os.__file__, "rb")
own = open(os.environ["HOME"] + "/own", "w")
made = {
    "flock": lambda: fcntl.flock(shared, fcntl.LOCK_SH),
    "own": lambda: fcntl.flock(own, fcntl.LOCK_EX),
    "posix": lambda: fcntl.lockf(shared, fcntl.LOCK_SH),
    "System V shm": lambda: libc.shmget(4711, 4096, 0o1666),
    "System V sem": lambda: libc.semget(4711, 1, 0o1666),
    "abstract": lambda: socket.socket(socket.AF_UNIX).bind("\\0assay-test"),
    "shared memory": lambda: open("/dev/shm/assay-test", "w"),
    "inotify": lambda: libc.inotify_add_watch(libc.inotify_init(), os.__file__.encode(), 0xFFF),
}
kept = [made[name]() for name in sys.argv[1:]]
print("made", flush=True)
time.sleep(60)
"""
ALL = ("flock", "own", "posix", "System V shm", "System V sem", "abstract", "shared memory", "inotify")


class Arm:
    """Something in a sandbox that makes objects and waits."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.log: Any = tempfile.TemporaryFile()  # noqa: SIM115
        box = Box(folder)
        self.running = Running(
            "candidate",
            [sys.executable, "-S", "-c", MAKES, *names],
            folder,
            PLACE,
            environment(box),
            log=self.log.fileno(),
            namespaces=False,
            wrap=Entry(box),
        )
        self.running.release()
        stop = time.monotonic() + 20
        while self._said() != b"made\n":
            assert time.monotonic() < stop, self._said()
            time.sleep(0.02)

    def _said(self) -> bytes:
        self.log.seek(0)
        return bytes(self.log.read())

    def end(self) -> None:
        self.running.end()
        self.log.close()


def ours(found: set[Object]) -> list[str]:
    """Kinds of objects, without those of other processes of this machine that come and go."""
    return sorted(one.kind for one in found)


@pytest.mark.sandbox
def test_what_a_sandbox_lets_out_and_that_nothing_stays(tmp_path: Path) -> None:
    before = snapshot()
    arm = Arm(tmp_path, *ALL)
    try:
        members = arm.running.members()
        new = {one for one in snapshot(members) - before if one.owner in (*members, 0)}
        assert not [one for one in new if one.kind.startswith(("System V", "abstract", "shared", "message"))], new
        assert {one.kind for one in new} >= {"flock read", "posix read", "inotify"}
        words = held(members)
        assert len(words) == 2 and all(one.startswith(HELD) and one.endswith("os.py") for one in words), words
    finally:
        arm.end()
    assert not [one for one in snapshot() - before if one.owner in members]


@pytest.mark.sandbox
@pytest.mark.parametrize("name", ["own", "inotify", "abstract"])
def test_what_is_an_arms_own_is_not_held_against_it(name: str, tmp_path: Path) -> None:
    arm = Arm(tmp_path, name)
    try:
        assert held(arm.running.members()) == []
    finally:
        arm.end()


def test_the_differ_sees_what_is_made_outside_of_a_sandbox(tmp_path: Path) -> None:
    """The control: shared memory of System V stays when its maker has ended."""
    before = snapshot()
    libc = ctypes.CDLL(None)
    number = libc.shmget(0, 4096, 0o1600)
    try:
        new = snapshot() - before
        assert ("System V shm", str(number)) in {(one.kind, one.name) for one in new}
    finally:
        libc.shmctl(number, 0, None)


def test_who_holds_locks_while_frozen_is_tampering() -> None:
    words = f"{HELD}a flock advisory on /usr/lib/x"
    escapes: dict[str, list[str]] = {"base": [], "candidate": [words], "control": []}
    block = {"differing": [], "reasons": ["an arm held a lock"], "primary": {}, "escapes": escapes}
    blocks = Blocks()
    for _ in range(14):
        blocks.add(block)
    seen = blocks.decision(0.02)
    assert seen is not None and seen.verdict == "tampered" and words in seen.reason
