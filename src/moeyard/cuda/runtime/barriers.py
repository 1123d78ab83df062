"""Words that the blocks of one grid meet at."""

import ctypes
from collections.abc import Iterator
from functools import cache
from threading import Lock
from typing import Any

import torch

from moeyard.cuda.runtime.driver import at_work_on, check, current_device, current_stream

is_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)  # absent from builds without CUDA


def barrier_for(device: int) -> int:
    """The address of 256 zeroed bytes that no other launch uses at the same time as those of the current stream; every
    launch leaves them ready for the next.

    A stream is known by its handle: one that is made while launches of a destroyed stream of the same handle still run
    would share theirs. Launches on one stream follow each other and share theirs. A captured launch gets its own, since
    its graph may be replayed on any stream. They come back when neither the graph nor what was made of it is left.
    """
    if device < 0:  # nothing is launched (planning.py)
        return 0
    if current_device() != device:
        with torch.cuda.device(device):
            return barrier_for(device)
    stream = current_stream(device)
    if is_capturing():
        return _captured(device, stream)
    key = (device, stream)
    found = _BARRIERS.get(key)
    return _BARRIERS.setdefault(key, _new_barrier(device)) if found is None else found


def _new_barrier(device: int) -> int:
    with _LOCK:
        spare = _SPARE.setdefault(device, [])
        if not spare:
            spare.extend(_LENT.returned(device))
        if not spare:
            spare.extend(_zeroed(device))
        return spare.pop()


def _zeroed(device: int) -> Iterator[int]:
    """Addresses of zeroed bytes of a device; also while this thread captures a graph."""
    from cuda.bindings import driver

    with at_work_on(device):
        size = _LINE * _LINES
        _, address = check(driver.cuMemAlloc(size))
        _, stream = check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        check(driver.cuMemsetD8Async(address, 0, size, stream))
        check(driver.cuStreamSynchronize(stream))
        check(driver.cuStreamDestroy(stream))
    return (int(address) + _LINE * i for i in range(_LINES))


def _captured(device: int, stream: int) -> int:
    """A barrier that belongs to the graph which a stream is captured into."""
    from cuda.bindings import driver

    ask: Any = getattr(driver, "cuStreamGetCaptureInfo_v3", driver.cuStreamGetCaptureInfo)
    graph = check(ask(stream))[3]
    barrier = _new_barrier(device)
    place = _LENT.lend(device, barrier)
    release = driver.CUhostFn(ctypes.cast(_libc().sem_post, ctypes.c_void_p).value)
    synchronous = driver.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
    move = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
    _, owner = check(driver.cuUserObjectCreate(place, release, 1, synchronous))
    check(driver.cuGraphRetainUserObject(graph, owner, 1, move))
    return barrier


class Lent:
    """What graphs hold. Each has a semaphore that the driver posts when the last graph with it is gone.

    The driver calls `sem_post` itself, on a thread of its own: no Python runs there, which could wait for the
    interpreter, or come after its end. So semaphores keep their memory as long as the process lives.
    """

    def __init__(self) -> None:
        """Nothing is lent."""
        self._held: dict[int, tuple[int, int]] = {}  # place of a semaphore -> (device, barrier)
        self._free: list[int] = []
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    def lend(self, device: int, barrier: int) -> int:
        """The place of a semaphore whose post gives the barrier back."""
        with self._lock:
            if not self._free:
                memory = _libc().malloc(_SEMAPHORE * _LINES)
                if not memory:
                    raise MemoryError("semaphores of captured launches")
                self._free.extend(memory + _SEMAPHORE * i for i in range(_LINES))
            place = self._free.pop()
            if _libc().sem_init(place, 0, 0):
                raise OSError(ctypes.get_errno(), "sem_init")
            self._held[place] = (device, barrier)
        return place

    def returned(self, device: int) -> list[int]:
        """Barriers of a device that came back since the last time."""
        with self._lock:
            places = [place for place, (of, _) in self._held.items() if of == device and not _libc().sem_trywait(place)]
            self._free.extend(places)
            return [self._held.pop(place)[1] for place in places]


@cache
def _libc() -> Any:
    functions: Any = ctypes.CDLL(None, use_errno=True)
    functions.malloc.restype = ctypes.c_void_p
    functions.malloc.argtypes = (ctypes.c_size_t,)
    functions.sem_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
    for function in (functions.sem_post, functions.sem_trywait):
        function.argtypes = (ctypes.c_void_p,)
    return functions


_LINE = 256
"""Two cache lines of the L2: a kernel's grid meets in the first words, others that may run beside it use later ones."""
_LINES = 4096
_SEMAPHORE = 64
"""Bytes; more than any sem_t takes."""
_LOCK = Lock()
_BARRIERS: dict[tuple[int, int], int] = {}
_SPARE: dict[int, list[int]] = {}
_LENT = Lent()
