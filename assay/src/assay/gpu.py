"""States of NVIDIA GPUs, read through the driver's own library (NVML) with ctypes; nothing is set.

Slowing for heat and by the board (hardware slow-down, thermal, power brake) spoils a block. The software power cap does
not: an arm reaches it by its own use, as the others do; it is written down.
"""

import ctypes
import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

_SPOILS = {0x8: "hardware slow-down", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
_GRAPHICS_CLOCK, _MEMORY_CLOCK, _TEMPERATURE = 0, 2, 0
_MOST_PROCESSES = 256


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


def states() -> list[State]:
    """The present state of every GPU; [] where there is none."""
    library = _library()
    if library is None:
        return []
    count = ctypes.c_uint()
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return [_state(library, index) for index in range(count.value)]


def foreign(patience_s: float = 2.0) -> list[str]:
    """Processes on GPUs while no arm runs, in words. Contexts of arms that have just ended get some time to go."""
    stop = time.monotonic() + patience_s
    while busy := [state for state in states() if state.processes]:
        if time.monotonic() > stop:
            return [f"GPU {state.index}: {state.processes} foreign processes" for state in busy]
        time.sleep(0.05)
    return []


def _state(library: Any, index: int) -> State:
    device, number = ctypes.c_void_p(), ctypes.c_uint()
    library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
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
    held = (_Process * _MOST_PROCESSES)()
    number.value = _MOST_PROCESSES
    seen = library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(number), held)
    running = number.value if seen == 0 else 0
    return State(index, name.value.decode(), read[0], read[1], read[2], bits.value, running)
