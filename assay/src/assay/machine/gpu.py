"""States of NVIDIA GPUs, read through the driver's own library (NVML) with ctypes; nothing is set.

Slowing for heat and by the board (hardware slow-down, thermal, power brake) spoils a block. The software power cap does
not: an arm reaches it by its own use, as the others do; it is written down.
"""

import ctypes
import os
import time
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from assay.arms.inside.supervisor import below

_SPOILS = {0x8: "hardware slow-down", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
_GRAPHICS_CLOCK, _MEMORY_CLOCK, _TEMPERATURE = 0, 2, 0
_MOST_PROCESSES = 256
_HELD = Path("/dev/nvidia-uvm")
"""What a process with a context has open, and one that only asks NVML has not."""


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("memory", ctypes.c_ulonglong),
        ("instance", ctypes.c_uint),
        ("compute", ctypes.c_uint),
    )


@dataclass(frozen=True)
class State:
    """One GPU at a moment."""

    index: int
    name: str
    sm_mhz: int
    memory_mhz: int
    celsius: int
    throttle_bits: int
    processes: int
    """Compute processes, as far as they can be seen from here."""

    def slowed(self) -> list[str]:
        """Why a block measured meanwhile does not count; [] if it does."""
        return [f"GPU {self.index}: {words}" for bit, words in _SPOILS.items() if self.throttle_bits & bit]

    def as_json(self) -> dict[str, Any]:
        """For RAW."""
        return asdict(self)


@cache
def _library() -> Any:
    """NVML, initialised; None where there is no driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def states(visible: Container[int] | None = None) -> list[State]:
    """The present state of every GPU, or of those that are `visible`; [] where there is none."""
    library = _library()
    devices = enumerate(_devices(library))
    return [_state(library, index, device) for index, device in devices if visible is None or index in visible]


def visible(environment: Mapping[str, str]) -> frozenset[int] | None:
    """The GPUs that arms with this environment can reach; None: all, or CUDA_VISIBLE_DEVICES does not number them."""
    names = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return frozenset(map(int, names)) if all(name.isdecimal() for name in names) else None


def foreign(visible: Container[int] | None = None, patience_s: float = 2.0) -> list[str]:
    """Processes on GPUs that are not ours while no arm runs, in words; of those that are `visible`, None: of all.

    What makes inputs is ours: it keeps its context while it is frozen. Contexts of arms that have just ended get some
    time to go. In a container the driver's process numbers are not those seen here: then as many are taken for ours, on
    every GPU, as processes of ours have contexts and are not listed.
    """
    stop = time.monotonic() + patience_s
    while found := _strangers(visible):
        if time.monotonic() > stop:
            return [f"GPU {index}: foreign processes {_named(processes)}" for index, processes in found.items()]
        time.sleep(0.05)
    return []


def _strangers(visible: Container[int] | None) -> dict[int, list[int]]:
    """GPU -> process numbers that are not ours."""
    listed = _listed()
    if not any(listed):
        return {}
    ours = {os.getpid(), *below(os.getpid())}
    unlisted = ours.difference(*listed)
    hidden = sum(map(_has_context, unlisted))
    found = {index: [one for one in some if one not in ours][hidden:] for index, some in enumerate(listed)}
    return {index: some for index, some in found.items() if some and (visible is None or index in visible)}


def _has_context(process: int) -> bool:
    try:
        return any(entry.readlink() == _HELD for entry in Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return False  # it has ended, or is another user's


def _named(processes: list[int]) -> str:
    words = []
    for process in processes:
        try:
            words.append(f"{process} ({Path(f'/proc/{process}/comm').read_text().strip()})")
        except OSError:
            words.append(str(process))
    return ", ".join(words)


def _listed() -> list[list[int]]:
    """Process numbers with contexts, GPU by GPU, as the driver knows them."""
    library = _library()
    return [_processes(library, device) for device in _devices(library)]


def _devices(library: Any) -> list[ctypes.c_void_p]:
    """Handles; [] without a library."""
    count, found = ctypes.c_uint(), []
    if library is not None:
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        found.append(ctypes.c_void_p())
        library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(found[-1]))
    return found


def _processes(library: Any, device: ctypes.c_void_p) -> list[int]:
    held, number = (_Process * _MOST_PROCESSES)(), ctypes.c_uint(_MOST_PROCESSES)
    seen = library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(number), held)
    return [held[i].pid for i in range(number.value)] if seen == 0 else []


def _state(library: Any, index: int, device: ctypes.c_void_p) -> State:
    number = ctypes.c_uint()
    name = ctypes.create_string_buffer(96)
    library.nvmlDeviceGetName(device, name, len(name))
    read: list[int] = []
    for function, kind in (
        (library.nvmlDeviceGetClockInfo, _GRAPHICS_CLOCK),
        (library.nvmlDeviceGetClockInfo, _MEMORY_CLOCK),
        (library.nvmlDeviceGetTemperature, _TEMPERATURE),
    ):
        read.append(number.value if function(device, kind, ctypes.byref(number)) == 0 else 0)
    bits = ctypes.c_ulonglong()
    library.nvmlDeviceGetCurrentClocksThrottleReasons(device, ctypes.byref(bits))
    running = len(_processes(library, device))
    return State(index, name.value.decode(), read[0], read[1], read[2], bits.value, running)
