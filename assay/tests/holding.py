"""Arms' processes for the tests of how they are held, and what is to be found of processes afterwards."""

import os
import sys
from pathlib import Path

from assay.arms import sandbox
from assay.arms.process import Running
from assay.contract.box import Box


def start(folder: Path, mode: str, command: list[str], log: int, fds: tuple[int, ...] = ()) -> Running:
    """A command in the tree of a folder, held by "links", "namespaces" or the "sandbox"; it waits at its gate."""
    box = Box(folder / "tree", writable=True)
    return Running(
        "arm",
        command,
        folder / "tree",
        sandbox.PLACE if mode == "sandbox" else folder / mode,
        sandbox.environment(box) if mode == "sandbox" else os.environ,
        log=log,
        fds=fds,
        namespaces=mode == "namespaces",
        wrap=sandbox.Entry(box) if mode == "sandbox" else None,
    )


def python(code: str) -> list[str]:
    """The command that runs this code."""
    return [sys.executable, "-S", "-c", code]


def gone(process: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def processes(mark: str, store: Path) -> list[str]:
    """Everything that has the mark in its environment, names the store, or has a folder of it mounted."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            texts = [(folder / name).read_bytes() for name in ("cmdline", "environ", "mountinfo")]
        except OSError:
            continue
        if texts[0] and (mark.encode() in texts[1] or any(str(store).encode() in text for text in texts)):
            found.append(texts[0].replace(b"\0", b" ").decode(errors="replace"))
    return found
