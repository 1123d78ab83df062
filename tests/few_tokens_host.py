"""Builds and runs the kernels of few_tokens.cu lane by lane on a host, for tests of 16-bit weights and of codes.

A C++ compiler builds the very source with headers of `host_few_tokens` in place of those that hold machine
instructions. Copies into shared memory arrive at once, which shows who overwrites what is still read, or as late as
somebody waits for them, which shows who does not wait.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.sources import HEADERS, SOURCES

HERE, TEXTS = Path(__file__).parent / "host_few_tokens", SOURCES | HEADERS
CARD = Card(4, 232448, True)
COMPILER = shutil.which("g++")


def build(folder: Path, defines: tuple[tuple[str, str], ...], change: tuple[str, str] | None = None) -> Any:
    """The kernels as a library of the host, `change` of their source made first."""
    for name in ("few_tokens.cu", "few_tokens.cuh", "few_tokens_codes.cuh", "activation.cuh", "codes.cuh"):
        text = TEXTS[name]
        if change is not None and change[0] in text:
            text, change = text.replace(*change), None
        (folder / name).write_text(text)
    assert change is None, "the source has what is to be changed"
    for path in HERE.iterdir():
        shutil.copy(path, folder)
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", *(f"-D{name}={value}" for name, value in defines)]
    done = subprocess.run(
        [str(COMPILER), *options, "-o", "kernels.so", "run.cpp"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:3000]
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.run.restype = ctypes.c_char_p
    return library


def launch(
    library: Any, second: bool, blocks: int, at_once: bool, tensors: list[torch.Tensor | None], *sizes: int
) -> str | None:
    """One launch; what went wrong, or None. `tensors` are the kernel's, and after them those of scales."""
    given = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    pointers = (ctypes.c_void_p * 9)(*given, *(0,) * (9 - len(given)))
    numbers = (ctypes.c_int64 * 7)(*sizes, *(0,) * (7 - len(sizes)))
    failure = library.run(int(second), blocks, int(at_once), torch.initial_seed() % 2**31, pointers, numbers)
    return None if failure is None else failure.decode()
