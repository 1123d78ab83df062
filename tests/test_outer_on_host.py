"""The kernel of outer.cu, lane by lane on a host, and what it compiles to."""

import ctypes
import re
import shutil
import subprocess
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard.cuda.experts.outer import outer_defines, outer_plan, unfit
from moeyard.cuda.runtime import compile as building
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.sources import SOURCES
from moeyard.dispatch.call import Call, WeightFacts
from moeyard.testing import guard_broken, largest_and_rms, poisoned

HERE, H200 = Path(__file__).parent / "host_experts", Card(132, 232448, True)
COMPILER = shutil.which("g++")
on_host = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
CASES: dict[str, dict[str, Any]] = {
    "ragged": {"counts": [70, 0, 130, 1], "columns": 264, "size": 200, "divisors": (1, 3), "wide": True},
    "batches": {"counts": [64, 65, 0], "columns": 40, "size": 24, "gathered": False},
    "by token": {"counts": [200, 3], "columns": 512, "size": 136, "divisors": (2, 1), "dtype": torch.float16},
    "nobody's rows": {"counts": [0, 0], "columns": 16, "size": 8},
}


def build(folder: Path, case: dict[str, Any], change: tuple[str, str] | None = None) -> Any:
    """The kernel as a library of the host, `change` of its source made first."""
    for path in HERE.iterdir():
        shutil.copy(path, folder)
    text = SOURCES["outer.cu"]
    if change is not None:
        assert change[0] in text
        text = text.replace(*change)
    (folder / "outer.cu").write_text(text)
    dtype = case.get("dtype", torch.bfloat16)
    width = outer_plan(len(case["counts"]), case["columns"], case["size"], H200)[0]
    defines = outer_defines(width, dtype, torch.float32 if case.get("wide") else dtype)
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-DOF_OUTER", *(f"-D{name}={value}" for name, value in defines)]
    command = [str(COMPILER), *options, "-o", "kernel.so", "run.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    library = ctypes.CDLL(str(folder / "kernel.so"))
    library.run.restype = ctypes.c_char_p
    return library


def run(library: Any, case: dict[str, Any], at_once: bool) -> str | None:
    """What is wrong with a launch over fresh rows, or None."""
    counts, columns, size, dtype = case["counts"], case["columns"], case["size"], case.get("dtype", torch.bfloat16)
    divisor, row_divisor = case.get("divisors", (1, 1))
    total = sum(counts)
    slots = torch.randperm(total).int() if case.get("gathered", True) else None
    firsts = torch.tensor([0, *accumulate(counts)][:-1])
    grads, rows = torch.randn(total // divisor + 1, columns + 8).to(dtype)[:, :columns], torch.randn(total + 1, size)
    rows = rows[: total // row_divisor + 1].to(dtype)
    out = poisoned((len(counts), columns, size), torch.float32 if case.get("wide") else dtype)
    tensors = (grads, rows, slots, firsts, torch.tensor(counts, dtype=torch.int32), out, None, None)
    pointers = (ctypes.c_void_p * 8)(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
    pitches = (2 * grads.stride(0), 2 * rows.stride(0))
    sizes = (ctypes.c_int64 * 8)(len(counts), columns, size, *pitches, divisor, row_divisor, 0)
    failure = library.run(2, int(at_once), int(torch.randint(2**31, ())), bytes(256), pointers, sizes)
    if failure is not None:
        return str(failure.decode())
    exact = torch.zeros(out.shape, dtype=torch.float64)
    honest = torch.zeros_like(out)
    for expert, (first, count) in enumerate(zip(firsts.tolist(), counts, strict=True)):
        entries = torch.arange(first, first + count) if slots is None else slots[first : first + count].long()
        left, right = grads[entries // divisor], rows[entries // row_divisor]
        exact[expert], honest[expert] = left.double().t() @ right.double(), left.float().t() @ right.float()
    if guard_broken(out):
        return "wrote where it must not"
    errors, budget = largest_and_rms(out, exact), largest_and_rms(honest, exact)
    right = errors[0] <= 2 * budget[0] + 1e-5 and errors[1] <= 1.1 * budget[1] + 1e-5
    return None if right else f"errors {errors}, those of plain torch {budget}"


@on_host
@pytest.mark.parametrize(
    "name", [name if name == "batches" else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_the_kernel(name: str, tmp_path: Path) -> None:
    library = build(tmp_path, CASES[name])
    for at_once in (True, False):
        assert run(library, CASES[name], at_once) is None


MUTANTS = {
    "a stage is given away before it is read": ("ragged", "await_products<1>()", "await_products<2>()"),
    "pieces where the swizzle does not look": ("batches", "(piece ^ (own & 7)) << 4", "piece << 4"),
    "rows past the last": ("batches", "begin + own + 16 * i < tile.rows", "begin + own + 16 * i <= tile.rows"),
    "entries of the stage before": ("ragged", "        entries[i] = following[i];\n", ""),
    "the rows of another token": ("ragged", "entries[i] / a.row_divisor", "entries[i] / a.divisor"),
    "the next values of other columns": ("ragged", "(16 * 128 >> 4) * i, rows", "(8 * 128 >> 4) * i, rows"),
    "columns past the last": ("batches", "if (other + 8 * i < a.size)", "if (other + 8 * i <= a.size)"),
    "a stage that does not come back": ("ragged", "if (tile.rows > 0 && releases) arrive", "if (false) arrive"),
}


@on_host
@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_seen(mutant: str, tmp_path: Path) -> None:
    name, *change = MUTANTS[mutant]
    library = build(tmp_path, CASES[name], (change[0], change[1]))
    assert any(run(library, CASES[name], at_once) is not None for at_once in (False, True, False))


@pytest.mark.full
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [192, 128, 64])
def test_it_is_wgmma_and_spills_nothing(width: int, wide: bool, tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    tool = Path(pytest.importorskip("triton.backends.nvidia").__file__).parent / "bin" / "cuobjdump"
    defines = outer_defines(width, torch.bfloat16, torch.float32 if wide else torch.bfloat16)
    path = tmp_path / "outer.cubin"
    path.write_bytes(building.compile_source(SOURCES["outer.cu"], defines, "sm_90a"))
    used, text = (
        subprocess.run([str(tool), option, str(path)], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    registers, stack, _, local = (int(value) for value in re.findall(r"(?:REG|STACK|SHARED|LOCAL):(\d+)", used))
    assert (registers, stack, local) == (168, 0, 0)
    assert len(re.findall(rf"HGMMA\.64x{width}x16", text)) == 8 and not re.search(r"\b(LDL|STL)\b", text)
    assert len(re.findall("WARPGROUP.DEPBAR.LE gsb0, 0x1", text)) == 1, "one wait per stage"
    assert text.count("LDGSTS.E.BYPASS.128") >= 4 * (4 + width // 64), "16 bytes at a time, past the L1 cache"


def test_plans_fit_and_waste_little() -> None:
    for columns, size, width in (
        (1536, 2048, 192),
        (2048, 768, 192),
        (2048, 1024, 128),
        (1024, 512, 128),
        (64, 24, 64),
    ):
        found, grid, shared = outer_plan(128, columns, size, H200)
        assert found == width and grid <= 132 and shared <= H200.shared_limit
        assert -(-size // width) * width <= max(64, 1.1 * size)
    assert outer_plan(1, 8, 8, H200)[1] == 1
    call = Call(torch.device("cuda"), torch.bfloat16, WeightFacts(torch.bfloat16, None, 4, 16, 1, False, ""))
    assert unfit(call) == "rows: expected columns that are a positive multiple of 8, got 1"
