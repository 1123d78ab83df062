"""What one arm's processes get: their tree, what they may read and use, and how much of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MOST_PROCESSES = 16384
"""Of an arm that declares none: many enough for a build, too few to bring a machine down."""
OURS = 4
"""bwrap's two processes, the supervisor and the command's fork, beside what is allowed."""
MOST_DISK = 16 << 30
"""Bytes that an arm may write that declares none."""
_PAGE = 4096
MOST_FILES = 8192
"""Open files of one process, pipes among them."""
PIPE_PAGES = 16
"""Of a pipe that was not made larger."""
MOST_PIPES = 512
"""Of an arm: the kernel counts a user's pages for pipes, and who has them all leaves none to the judge."""


@dataclass(frozen=True)
class Limits:
    """None: not limited. In a cgroup threads count as processes."""

    memory_bytes: int | None = None
    most_processes: int | None = None
    disk_bytes: int | None = None
    folders: tuple[Path, ...] = ()
    """What counts as disk, beside what a command prints."""
    most_pipes: int | None = None

    def hard(self, own_user: bool) -> dict[str, int]:
        """What the kernel itself keeps each process to, by the names of `resource`; no core is written in any case.

        `own_user`: whether processes are counted apart from others of this user, so that their number can be limited.
        """
        found = {"CORE": 0, "NOFILE": MOST_FILES}
        if self.disk_bytes is not None:
            found["FSIZE"] = self.disk_bytes + _PAGE  # so that who is stopped by it has written too much
        if own_user and self.most_processes is not None:
            found["NPROC"] = self.most_processes + OURS
        return found


UNDECLARED = Limits(None, MOST_PROCESSES, MOST_DISK, (), MOST_PIPES)
"""Of an arm that declares nothing and has no sandbox."""


@dataclass(frozen=True)
class Box:
    """One arm's sandbox (arms/sandbox.py)."""

    tree: Path
    """Shown at one place in every sandbox."""
    writable: bool = False
    """Whether the tree may be written: while it is set up and built, and not after."""
    readable: tuple[Path, ...] = ()
    """A declared toolchain: files and folders that are shown read-only at their own paths."""
    devices: tuple[Path, ...] = ()
    """Device nodes, shown at their own paths."""
    cache: Path | None = None
    """A folder of this arm alone, for all caches; without it they are empty at every start."""
    home: Path | None = None
    """A folder that is HOME and may be written; without it HOME is empty at every start."""
    placed: tuple[tuple[Path, str], ...] = ()
    """Files, folders and sockets that are shown read-only at other paths than their own."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What is set beside what the sandbox itself sets."""
    memory_bytes: int | None = None
    most_processes: int | None = None
    """Without it MOST_PROCESSES."""
    disk_bytes: int | None = None
    """Of its cache, of its tree while it may be written, and of what it prints; without it MOST_DISK."""

    @property
    def limits(self) -> Limits:
        """On its processes."""
        folders = (self.tree if self.writable else None, self.cache, self.home)
        writable = tuple(folder for folder in folders if folder is not None)
        return Limits(
            self.memory_bytes, self.most_processes or MOST_PROCESSES, self.disk_bytes or MOST_DISK, writable, MOST_PIPES
        )
