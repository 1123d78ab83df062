"""What one arm has of the machine: a cgroup where one may be made, else a look at every wait of the judge.

No limit on address space: a CUDA context reserves hundreds of GB of it.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from assay.contract.box import OURS, Limits

_ROOT = Path("/sys/fs/cgroup")
_FILES = {"memory": "memory.max", "pids": "pids.max"}
_DISK_S = 1.0
_STALE_S = 3600.0
"""Age of a group that a killed judge has left behind."""


class Group:
    """The cgroups of one arm; `folders` is empty where none may be made."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.folders: list[Path] = []
        self._on_disk, self._look_at_disk = 0, time.monotonic() + _DISK_S
        values = {"memory": limits.memory_bytes, "pids": limits.most_processes and limits.most_processes + OURS}
        wanted = {controller: value for controller, value in values.items() if value is not None}
        for groups in _places(wanted):
            try:
                for parent, names in groups:
                    _sweep(parent)
                    self.folders.append(Path(tempfile.mkdtemp(prefix="assay-", dir=parent)))
                    for name in names:
                        file = "memory.limit_in_bytes" if parent.is_relative_to(_ROOT / "memory") else _FILES[name]
                        (self.folders[-1] / file).write_text(str(wanted[name]))
                return
            except OSError:  # not ours to make, or the controller is not switched on here
                self.end()

    def enter(self) -> None:
        """Called by the process that is to be limited, and all that it starts with it."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text("0")

    def exceeded(self, members: Sequence[int], log: int, now: bool = False) -> str:
        """What an arm has too much of, in words; "" if nothing. `log`: descriptor of what it prints.

        Disk and pipes are looked at once a second, or `now`.
        """
        limits = self.limits
        if limits.disk_bytes is not None:
            printed, looks = os.fstat(log).st_size, time.monotonic() >= self._look_at_disk
            if now or looks:  # a look takes a while where there are many files
                start = time.monotonic()
                self._on_disk = sum(map(_bytes_below, limits.folders))
                self._look_at_disk = time.monotonic() + max(_DISK_S, 20 * (time.monotonic() - start))
            if (used := printed + self._on_disk) > limits.disk_bytes:
                return f"wrote {used} bytes, more than {limits.disk_bytes}"
            if (now or looks) and (words := self.piped(members)):
                return words
        if self.folders:
            killed = any(_killed(folder) for folder in self.folders)
            return f"used more than {limits.memory_bytes} bytes of memory" if killed else ""
        if limits.most_processes is not None and len(members) > limits.most_processes:
            return f"had {len(members)} processes, more than {limits.most_processes}"
        if limits.memory_bytes is not None and (used := sum(map(_own_bytes, members))) > limits.memory_bytes:
            return f"used {used} bytes of memory, more than {limits.memory_bytes}"
        return ""

    def piped(self, members: Sequence[int]) -> str:
        """Whether members have too many pipes, in words; "" if not."""
        most = self.limits.most_pipes
        had = 0 if most is None else len(_pipes(members))
        return f"had {had} pipes, more than {most}" if most is not None and had > most else ""

    def end(self) -> None:
        """Removes the groups, whose processes have been killed; a dying one is waited for."""
        while self.folders:
            folder, stop = self.folders.pop(), time.monotonic() + 5
            while True:
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() > stop:
                        break  # an empty group that could not be removed harms nobody
                    time.sleep(0.001)


def _places(wanted: Mapping[str, int]) -> Iterator[list[tuple[Path, list[str]]]]:
    """Where groups may be made, and for which controllers: below this process's own, else at the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines() if wanted else []
    except OSError:
        lines = []
    own = {
        name: path.lstrip("/") for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")
    }
    if "" in own and (_ROOT / "cgroup.controllers").exists():  # version 2: one group for all
        yield from ([(parent, list(wanted))] for parent in dict.fromkeys([_ROOT / own[""], _ROOT]))
    elif wanted and own.keys() >= wanted.keys():
        yield [(_ROOT / name / own[name], [name]) for name in wanted]


def _sweep(parent: Path) -> None:
    """Removes old groups that nobody is in."""
    for folder in parent.glob("assay-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_S:
                folder.rmdir()


def _killed(folder: Path) -> bool:
    """Whether the kernel has killed for want of memory in this group."""
    for name in ("memory.events", "memory.oom_control"):
        try:
            lines = (folder / name).read_text().splitlines()
        except OSError:
            continue
        return any(line.startswith("oom_kill ") and int(line.split()[1]) > 0 for line in lines)
    return False


def _pipes(processes: Sequence[int]) -> set[str]:
    """Names of all pipes that processes have open."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for entry in Path("/proc", str(process), "fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(str(entry.readlink()))
    return {name for name in found if name.startswith("pipe:")}


def _bytes_below(folder: Path) -> int:
    """What a folder takes on disk."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found += Path(place, name).lstat().st_blocks * 512
    return found


def _own_bytes(process: int) -> int:
    """What a process holds alone: not its files and libraries."""
    try:
        lines = Path("/proc", str(process), "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
