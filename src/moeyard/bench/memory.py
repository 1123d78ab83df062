"""How far a call raises memory."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

from moeyard.bench.operators import Run


def peak_extra_bytes(run: Run, inputs: Any, device: torch.device) -> int | None:
    """How far memory rises during a call, its result included; None where unknown.

    On a GPU tensors count, on a CPU the resident memory of this process.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(inputs)
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    run(inputs)
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    result = run(inputs)
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024
