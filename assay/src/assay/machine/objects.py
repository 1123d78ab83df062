"""Kernel objects that reach out of a process: locks, leases, shared memory, sockets by name, watches on files.

A sandbox has namespaces of its own for most of them. What is left are locks and leases on files that others can open,
too. A frozen arm that holds one could make others wait.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_OWN = ("/assay/", "/dev/", "/proc/", "pipe:", "socket:", "anon_inode:")
"""Where files lie, as an arm in a sandbox sees them, that no other arm can open."""

HELD = "while frozen it held "


class Object(NamedTuple):
    """One of them."""

    kind: str
    name: str
    owner: int
    """Process number, 0 where the kernel does not tell."""


def snapshot(processes: Iterable[int] = ()) -> set[Object]:
    """All that can be seen from here; watches on files of the given processes only."""
    found = {*_locks(), *_system_v(), *_by_name()}
    return found | {watch for process in processes for watch in _watches(process)}


def held(processes: Iterable[int]) -> list[str]:
    """Locks and leases that processes in a sandbox hold on files outside of it, in words."""
    ours = set(processes)
    found = []
    for lock in _locks():
        path = _path(lock) if lock.owner in ours else ""
        if path and not path.startswith(_OWN) and not _in_own_memory(lock):
            found.append(f"{HELD}a {lock.kind} on {path}")
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _locks() -> Iterator[Object]:
    for line in _lines("/proc/locks"):
        fields = [field for field in line.split() if field != "->"]  # a waiter
        if len(fields) >= 6:
            yield Object(f"{fields[1].lower()} {fields[3].lower()}", fields[5], int(fields[4]))


def _in_own_memory(lock: Object) -> bool:
    """Whether the file lies on a sandbox's own /tmp, below which a task may show files of others."""
    try:
        device = Path("/proc", str(lock.owner), "root", "tmp").stat().st_dev
    except OSError:
        return False
    major, minor, _ = lock.name.split(":")
    return (os.major(device), os.minor(device)) == (int(major, 16), int(minor, 16))


def _path(lock: Object) -> str:
    """Where the file of a lock lies, as its holder sees it."""
    inode = lock.name.rpartition(":")[2]
    try:
        for entry in Path("/proc", str(lock.owner), "fd").iterdir():
            if str(entry.stat().st_ino) == inode:
                return str(entry.readlink())
    except OSError:
        return ""  # it has ended
    return f"inode {lock.name}"


def _system_v() -> Iterator[Object]:
    for kind in ("shm", "sem", "msg"):
        for line in _lines(f"/proc/sysvipc/{kind}")[1:]:
            fields = line.split()
            yield Object(f"System V {kind}", fields[1], int(fields[4]) if kind == "shm" else 0)


def _by_name() -> Iterator[Object]:
    for line in _lines("/proc/net/unix")[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7].startswith("@"):
            yield Object("abstract socket", fields[7], 0)
    for folder, kind in (("/dev/shm", "shared memory"), ("/dev/mqueue", "message queue")):  # noqa: S108
        if Path(folder).is_dir():
            yield from (Object(kind, path.name, 0) for path in Path(folder).iterdir())
    for line in _lines("/proc/keys"):
        yield Object("key", line.split()[0], 0)


def _watches(process: int) -> Iterator[Object]:
    folder = Path("/proc", str(process), "fdinfo")
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        for line in _lines(str(entry)):
            if line.startswith(("inotify ", "fanotify ")):
                yield Object(line.split()[0], " ".join(line.split()[1:4]), process)
