"""Which of an arm's quotas the kernel itself keeps here: each is tried, in a sandbox or without one."""

import os
import sys
import tempfile
from pathlib import Path

from assay.arms import sandbox
from assay.arms.groups import Group
from assay.arms.process import Running, namespaces_work
from assay.contract.box import Box, Limits

_DISK, _PROCESSES, _MEMORY = 1 << 20, 12, 64 << 20
_TRIES = """
import fcntl, os, signal, sys
def written(*paths, size):
    for path in paths:
        with open(path, "wb") as file: file.write(bytes(size))
def forked():
    for _ in range(40):
        if os.fork() == 0:
            signal.pause()
tried = {
    "each file": lambda: written(sys.argv[1] + "/one", size=SIZE * 3 // 2),
    "all files of /tmp together": lambda: written("/tmp/1", "/tmp/2", size=SIZE * 3 // 4),
    "all files of a cache together": lambda: written(sys.argv[1] + "/1", sys.argv[1] + "/2", size=SIZE * 3 // 4),
    "the size of a pipe": lambda: fcntl.fcntl(os.pipe()[0], 1031, 1 << 20),
    "open files of a process": lambda: [os.dup(0) for _ in range(9000)],
    "number of processes": forked,
}
for name, what in tried.items():
    if name.partition(" of ")[2].startswith("/tmp") and len(sys.argv) > 2: continue
    try: what()
    except OSError: print(name, flush=True)
os.killpg(0, signal.SIGKILL)
""".replace("SIZE", str(_DISK))
WHAT = (
    "each file",
    "all files of /tmp together",
    "all files of a cache together",
    "the size of a pipe",
    "open files of a process",
    "number of processes",
    "memory",
)
"""What an arm may have so much of, beside the number of its pipes, which are counted by the judge."""
SANDBOX_ALONE = ("all files of /tmp together", "the size of a pipe")
"""Those that nobody keeps or looks at where the kernel does not, or there is no sandbox."""


def kept(*, sandboxed: bool) -> list[str]:
    """Those of WHAT that the kernel keeps; the judge looks at the others. ArmError if nothing can be started here."""
    with tempfile.TemporaryDirectory(prefix="assay-") as folder, tempfile.TemporaryFile() as log:
        tree, cache, place = (Path(folder, name) for name in ("tree", "cache", "place"))
        tree.mkdir()
        cache.mkdir()
        box = Box(tree, cache=cache, disk_bytes=_DISK, most_processes=_PROCESSES)
        command = [sys.executable, "-S", "-c", _TRIES, str(sandbox.CACHE if sandboxed else cache)]
        place = sandbox.PLACE if sandboxed else place
        space = not sandboxed and namespaces_work()
        if space:
            place.mkdir()  # where its tree is mounted
        running = Running(
            "quotas",
            command if sandboxed else [*command, "no /tmp of its own"],
            tree,
            place,
            sandbox.environment(box) if sandboxed else os.environ,
            log=log.fileno(),
            namespaces=space,
            wrap=sandbox.Entry(box) if sandboxed else None,
            limits=box.limits,
        )
        try:
            running.release()
            while running.members():
                os.sched_yield()
        finally:
            running.end()
        log.seek(0)
        found = log.read().decode().splitlines()
    group = Group(Limits(memory_bytes=_MEMORY))
    found += ["memory"] if group.folders else []
    group.end()
    return [name for name in WHAT if name in found]
