"""What identifies a machine: hardware, kernel, drivers, interpreter, packages."""

import os
import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from assay.machine import gpu


def machine() -> dict[str, Any]:
    """What identifies the environment: hardware, kernel, interpreter."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "system": platform.platform(),
        "processor": model,
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "gpus": [state.name for state in gpu.states()],
    }


def environment() -> dict[str, Any]:
    """`machine`, with the driver and all that is installed: the environment of an attempt."""
    packages = sorted({f"{one.name}=={one.version}" for one in distributions()})
    return {**machine(), "driver": _driver(), "machine": platform.machine(), "packages": packages}


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else ""
