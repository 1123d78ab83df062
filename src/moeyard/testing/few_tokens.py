"""The kernels of few_tokens.cu and four_bits.cu without a GPU: for a host, lane by lane, or as machine code to look at.

A C++ compiler builds the very source with other headers, from a folder, in place of those that hold machine
instructions. Copies into shared memory arrive at once, which shows who overwrites what is still read, or as late as
somebody waits for them, which shows who does not wait.
"""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.sources import HEADERS, SOURCES

CARD = Card(4, 232448, True)
"""What kernels on a host are planned for."""
COMPILER = shutil.which("g++")
_TEXTS = SOURCES | HEADERS
_NAMES = ("few_tokens.cu", "few_tokens.cuh", "few_tokens_codes.cuh", "activation.cuh", "codes.cuh")
FOUR_BITS = ("four_bits.cu", "four_bits.cuh", "activation.cuh", "codes.cuh", "nibbles.cuh")
"""The files of the kernels of 4 bits."""


def build(
    headers: Path, folder: Path, defines: tuple[tuple[str, str], ...], change: tuple[str, str] | None = None,
    names: tuple[str, ...] = _NAMES,
) -> Any:  # fmt: skip
    """The kernels in the files of `names` as a library of the host in `folder`, with `headers`, and `change` of their
    source made first.
    """
    for name in names:
        text = _TEXTS[name]
        if change is not None and change[0] in text:
            text, change = text.replace(*change), None
        (folder / name).write_text(text)
    assert change is None, "the source has what is to be changed"
    for path in headers.iterdir():
        shutil.copy(path, folder)
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", *(f"-D{name}={value}" for name, value in defines)]
    options += ["-DFOUR_BITS=1"] if names is FOUR_BITS else []
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
    library: Any, number: int, blocks: int, at_once: bool, tensors: list[torch.Tensor | None], *sizes: int
) -> str | None:
    """The launch of a number, from 0, with its tensors and sizes; what went wrong, or None."""
    given = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    pointers = (ctypes.c_void_p * 10)(*given, *(0,) * (10 - len(given)))
    numbers = (ctypes.c_int64 * 8)(*sizes, *(0,) * (8 - len(sizes)))
    failure = library.run(number, blocks, int(at_once), torch.initial_seed() % 2**31, pointers, numbers)
    return None if failure is None else failure.decode()


def cuobjdump() -> str | None:
    """NVIDIA's disassembler in Triton's wheel; None where that is not installed."""
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin or "").parent / "backends/nvidia/bin/cuobjdump" if spec else Path()
    return str(path) if path.is_file() else None
