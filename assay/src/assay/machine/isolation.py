"""A control group that gives judge and arms a processor before all others, where this user may make one.

Version 2 takes the processor out of everybody else's reach (an isolated partition of cpusets), if the kernel agrees.
Both versions give the group the largest weight, so that others get next to nothing while an arm works.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from assay.contract.errors import IsolationError

ROOT = Path("/sys/fs/cgroup")
_WEIGHT_1, _WEIGHT_2 = 1 << 18, 10_000
"""The largest that each version has."""


@contextmanager
def group(processor: int, root: Path = ROOT) -> Iterator[str]:
    """Moves this process, and so what it starts meanwhile, into a group of its own; what was achieved, in words.

    Raises IsolationError in words where that is not allowed. Afterwards this process is where it was before.
    """
    second = (root / "cgroup.controllers").exists()
    parent = root if second else root / "cpu"
    folder: Path | None = None
    before = _own(parent, second)
    try:
        if second:
            for name in ("cpu", "cpuset"):
                with suppress(OSError):  # not every kernel has both
                    (parent / "cgroup.subtree_control").write_text(f"+{name}")
        folder = Path(tempfile.mkdtemp(prefix="assay-", dir=parent))
        words = _second(folder, processor) if second else _first(folder)
        (folder / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as problem:
        if folder is not None:
            folder.rmdir()
        words = f"expected a control group that this user may make in {parent}, got {problem.strerror}"
        raise IsolationError(f"--isolate: {words}; --pin needs none") from None
    try:
        yield words
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        with suppress(OSError):  # an empty group that could not be removed harms nobody
            folder.rmdir()


def _first(folder: Path) -> str:
    (folder / "cpu.shares").write_text(str(_WEIGHT_1))
    return f"weight {_WEIGHT_1}"


def _second(folder: Path, processor: int) -> str:
    (folder / "cpu.weight").write_text(str(_WEIGHT_2))
    try:
        (folder / "cpuset.cpus").write_text(str(processor))
        (folder / "cpuset.cpus.partition").write_text("isolated")
        if (folder / "cpuset.cpus.partition").read_text().strip() == "isolated":
            return f"weight {_WEIGHT_2}, processor {processor} for nobody else"
        (folder / "cpuset.cpus.partition").write_text("member")
    except OSError:
        pass
    return f"weight {_WEIGHT_2}"


def _own(parent: Path, second: bool) -> Path:
    """The group that this process is in."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return parent
    for _, names, path in lines:
        if (not names) if second else "cpu" in names.split(","):
            return parent / path.lstrip("/")
    return parent
