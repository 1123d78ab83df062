"""Words that the blocks of one grid meet at."""

from collections.abc import Iterator
from threading import Lock

import torch

from moeyard.cuda.compile import check, outside_capture


def barrier_for(device: int, stream: int) -> int:
    """The address of 256 zeroed bytes that no other launch uses at the same time; every launch leaves them ready
    for the next.

    A stream is known by its handle: one that is made while launches of a destroyed stream of the same handle still run
    would share theirs. Launches on one stream follow each other and share theirs. A captured launch gets its own, for
    good: its graph may be replayed on any stream, but never beside itself.
    """
    if torch.cuda.is_current_stream_capturing():
        return _new_barrier(device)
    key = (device, stream)
    found = _BARRIERS.get(key)
    return _BARRIERS.setdefault(key, _new_barrier(device)) if found is None else found


def _new_barrier(device: int) -> int:
    with _LOCK:
        spare = _SPARE.setdefault(device, [])
        if not spare:
            spare.extend(_zeroed())
        return spare.pop()


def _zeroed() -> Iterator[int]:
    """Addresses of zeroed bytes of the current device; also while this thread captures a graph."""
    from cuda.bindings import driver

    with outside_capture():
        size = _LINE * _LINES
        _, address = check(driver.cuMemAlloc(size))
        _, stream = check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        check(driver.cuMemsetD8Async(address, 0, size, stream))
        check(driver.cuStreamSynchronize(stream))
        check(driver.cuStreamDestroy(stream))
    return (int(address) + _LINE * i for i in range(_LINES))


_LINE = 256
"""Two cache lines of the L2: a kernel's grid meets in the first words, others that may run beside it use later ones."""
_LINES = 4096
_LOCK = Lock()
_BARRIERS: dict[tuple[int, int], int] = {}
_SPARE: dict[int, list[int]] = {}
