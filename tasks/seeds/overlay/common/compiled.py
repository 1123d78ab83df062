"""Compiles sources of this tree into one library of operators for torch, with nvcc alone.

They are compiled against this interpreter's torch, or against the one that SEEDS_TORCH names: toolkit.py makes it for
another machine. TORCH_CUDA_ARCH_LIST names compute capabilities, as "9.0"; without it the GPUs that are here say them.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
_LIBRARIES = ("c10", "torch", "torch_cpu", "c10_cuda", "torch_cuda")
_LOOK_S = 0.05


def library(name: str, sources: Sequence[str]) -> None:
    """Makes build/NAME.so. Ends the process with the compiler's status at the first source that it refuses."""
    if shutil.which("nvcc") is None:
        sys.exit("build_ops.py: expected nvcc on PATH, found none")
    torch, more = _torch()
    folders = (HERE / "csrc/shim", HERE / "csrc", HERE / "csrc/third_party", torch / "include")
    folders = (*folders, torch / "include/torch/csrc/api/include", *more, Path(sysconfig.get_path("include")))
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", *_targets()]
    options += [f"-I{folder}" for folder in folders]
    BUILD.mkdir(exist_ok=True)
    objects = [BUILD / f"{Path(source).stem}.o" for source in sources]
    compile_ = [
        ["nvcc", *options, "-c", str(HERE / source), "-o", str(to)] for source, to in zip(sources, objects, strict=True)
    ]
    _all(compile_, len(os.sched_getaffinity(0)))
    links = ["-Xlinker", "--no-as-needed", f"-L{torch / 'lib'}", *(f"-l{one}" for one in _LIBRARIES)]
    _all([["nvcc", "-shared", "-cudart", "shared", "-o", str(BUILD / f"{name}.so"), *map(str, objects), *links]], 1)
    for file in objects:
        file.unlink()


def _torch() -> tuple[Path, list[Path]]:
    """The folder of torch's headers and libraries, and folders of headers that CUDA's compiler may lack."""
    if named := os.environ.get("SEEDS_TORCH"):
        return Path(named) / "torch", [Path(named) / "include"]
    found = find_spec("torch")
    if found is None or not found.submodule_search_locations:
        sys.exit("build_ops.py: expected torch, or SEEDS_TORCH, got neither")
    return Path(found.submodule_search_locations[0]), []


def _targets() -> list[str]:
    """Options that say for which GPUs."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(".", "").split()
    return [f"-gencode=arch=compute_{one},code=sm_{one}" for one in named] or ["-arch=native"]


def _all(commands: list[list[str]], most: int) -> None:
    """Runs commands, so many beside each other; ends with the status of the first that fails, and stops the others."""
    left, running = list(commands), dict[int, subprocess.Popen[bytes]]()
    while left or running:
        while left and len(running) < most:
            child = subprocess.Popen(left.pop(0), start_new_session=True)
            running[child.pid] = child
        time.sleep(_LOOK_S)
        ended = [child for child in running.values() if child.poll() is not None]
        for child in ended:
            del running[child.pid]
            if child.returncode:
                for other in running.values():
                    os.killpg(other.pid, signal.SIGKILL)
                    other.wait()
                sys.exit(child.returncode)
