"""What a measurement must have for itself: locks of this machine's processors and GPUs, shared by all judges of a user.

Building and testing take a lock together with others, measuring takes it alone.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from assay.machine import gpu


def names(device: str) -> list[str]:
    """The locks that a measurement needs: of the processors that it may use, and of a GPU's, if it needs one."""
    return [f"cpu{number}" for number in sorted(os.sched_getaffinity(0))] + (["gpu"] if device == "gpu" else [])


@contextlib.contextmanager
def held(device: str, *, alone: bool, waiting: Callable[[str], None] = lambda _: None) -> Iterator[dict[str, str]]:
    """Holds the locks, alone or with others; yields environment variables that say which GPU is ours.

    It is the first that is free, of those that CUDA_VISIBLE_DEVICES numbers or of all.

    `waiting` hears what is waited for. Locks are taken in one order, so that no two judges wait for each other, and end
    with the process, however it ends.
    """
    folder = Path(tempfile.gettempdir()) / f"assay-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(f"locks: expected {folder} to be this user's folder")
    with contextlib.ExitStack() as stack:
        found: dict[str, str] = {}
        for name in names(device):
            gpus = [f"gpu{state.index}" for state in gpu.states(gpu.visible(os.environ))]
            places = gpus or ["gpu"] if name == "gpu" else [name]
            taken = _first(folder, places, alone, stack, waiting)
            if name == "gpu" and taken != "gpu":
                found |= {"CUDA_VISIBLE_DEVICES": taken.removeprefix("gpu"), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        yield found


def _first(
    folder: Path, places: list[str], alone: bool, stack: contextlib.ExitStack, waiting: Callable[[str], None]
) -> str:
    """Takes the first lock that is free, else waits for the first of all; its name."""
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    for place in places:
        file = os.open(folder / place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        stack.callback(os.close, file)
        return place
    waiting(places[0])
    file = os.open(folder / places[0], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    stack.callback(os.close, file)
    fcntl.flock(file, kind)
    return places[0]
