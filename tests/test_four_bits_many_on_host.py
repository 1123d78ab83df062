"""The products of experts.cu with weights of 4 bits in tiles, lane by lane on a host, against float64."""

import ctypes
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, pack_experts
from moeyard.cuda.experts.four_bits_many import many_defines, operand_boxes
from moeyard.cuda.experts.four_bits_many_plan import Operand, Tile, many_plan
from moeyard.cuda.experts.plan import ProductPlan
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.parameters import float_bits
from moeyard.cuda.runtime.sources import HEADERS, SOURCES
from moeyard.cuda.runtime.tensor_map import STEP_BYTES
from moeyard.quant import MXFP4, NVFP4, int4_scheme
from moeyard.reference.quant import dequantised_expert
from moeyard.testing import guard_broken, largest_and_rms, plain_activation, poisoned
from moeyard.testing.quantised import draw_quantised

HERE, TEXTS, H200 = Path(__file__).parent / "host_experts", SOURCES | HEADERS, Card(132, 232448, True)
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
FILES = (
    "experts.cu", "activation.cuh", "codes.cuh", "nibbles.cuh",
    *(f"experts_{part}.cuh" for part in ("loads", "nibbles", "results", "stages", "sums", "tiles")),
)  # fmt: skip
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PLAIN: dict[str, Any] = {
    "scheme": MXFP4, "tile": 16, "counts": [5, 0, 17, 1], "sizes": (192, 128), "gated": True, "bias": True,
    "activation": Activation(), "dtype": BF16, "scales": BF16, "second": False, "blocks": 3, "stages": 3,
    "shape": (),
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {  # sizes: hidden, intermediate
    "gpt-oss": {"activation": GPT_OSS_ACTIVATION},
    "gpt-oss, second": {"second": True, "sizes": (320, 192)},
    "large scales": {"large": True, "counts": [3, 2]},
    "taller": {"tile": 32, "counts": [50, 20, 0], "sizes": (128, 320)},
    "three chunks": {"tile": 48, "counts": [100, 40], "sizes": (128, 192), "bias": False},
    "three chunks, flat": {"tile": 48, "counts": [90, 7], "scheme": int4_scheme()},
    "flat": {"tile": 64, "counts": [100, 0, 30], "sizes": (256, 64), "stages": 2},
    "flat, one block": {"tile": 64, "counts": [70, 3], "shape": (2, 1)},
    "prefill": {"tile": 128, "counts": [140, 33], "sizes": (192, 192), "activation": GPT_OSS_ACTIVATION},
    "prefill, widest": {"tile": 160, "counts": [200, 0, 33, 1], "sizes": (128, 192), "blocks": 2},
    "prefill, second": {"tile": 160, "counts": [170, 9], "sizes": (320, 128), "second": True, "stages": 2},
    "one step": {"sizes": (64, 64), "counts": [9, 3, 1, 40], "stages": 2},
    "nobody's rows": {"counts": [0, 0]},
    "not gated": {"gated": False, "activation": Activation("relu2"), "sizes": (128, 192), "tile": 32},
    "int4": {"scheme": int4_scheme(), "sizes": (256, 128)},
    "int4, float32 scales": {"scheme": int4_scheme(32), "scales": F32, "tile": 64, "counts": [70, 9]},
    "int4, zero points": {"scheme": int4_scheme(64, zero_points=True), "tile": 32, "second": True},
    "int4, zero points of channels": {"scheme": int4_scheme(0, zero_points=True), "tile": 128, "counts": [130, 3]},
    "int4, half": {"scheme": int4_scheme(32, zero_points=True), "dtype": F16, "scales": F16, "tile": 32},
    "int4, half, second": {
        "scheme": int4_scheme(), "dtype": F16, "scales": F16, "second": True, "sizes": (192, 256), "tile": 64,
        "counts": [70, 0, 5],
    },
    "NVFP4": {"scheme": NVFP4, "activation": GPT_OSS_ACTIVATION},
    "NVFP4, second": {"scheme": NVFP4, "second": True, "tile": 160, "counts": [165, 4], "sizes": (192, 64)},
    "NVFP4, half": {"scheme": NVFP4, "dtype": F16, "tile": 32, "second": True},
    "MXFP4, half": {"dtype": F16, "tile": 64, "counts": [70, 5]},
}  # fmt: skip


def build(folder: Path, defines: tuple[tuple[str, str], ...], change: tuple[str, str] | None = None) -> Any:
    """The kernel as a library of the host, `change` of its source made first."""
    for name in FILES:
        text = TEXTS[name]
        if change is not None and change[0] in text:
            text, change = text.replace(*change), None
        (folder / name).write_text(text)
    assert change is None, "the source has what is to be changed"
    for path in HERE.iterdir():
        shutil.copy(path, folder)
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", *(f"-D{name}={value}" for name, value in defines)]
    command = [str(COMPILER), *options, "-o", "kernel.so", "run.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    library = ctypes.CDLL(str(folder / "kernel.so"))
    library.run.restype = ctypes.c_char_p
    return library


def map_of(address: int, boxes: tuple[tuple[int, ...], ...], item: int = 0) -> bytes:
    """A tensor map as host_experts/wgmma.cuh reads it."""
    sizes, strides, box = boxes
    rank = len(sizes)
    padded = (*strides, *(0,) * (4 - len(strides))), (*sizes, *(0,) * (5 - rank)), (*box, *(0,) * (5 - rank))
    return struct.pack("<Q4QI5I5II", address, *padded[0], rank, *padded[1], *padded[2], item).ljust(128, b"\0")


def interleaved(rows: torch.Tensor) -> torch.Tensor:
    """In each 16 columns first the even pairs, then the odd ones."""
    return rows.unflatten(1, (-1, 4, 2, 2)).transpose(2, 3).flatten(1).contiguous()


def ordered(rows: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    return rows.unflatten(1, (-1, 2, 4, 2)).transpose(2, 3).flatten(1)


def planned(case: dict[str, Any]) -> tuple[Operand, ProductPlan, torch.dtype]:
    scheme, (hidden, size), second = case["scheme"], case["sizes"], case["second"]
    kind = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn, "float": case["scales"]}[scheme.scales]
    columns, summed = (hidden, size) if second else (size, hidden)
    operand = Operand(
        len(case["counts"]), columns, summed, case["gated"] and not second, replace(scheme, tiled=True), kind.itemsize,
        case["dtype"],
    )  # fmt: skip
    total = sum(case["counts"])
    plan = many_plan(
        operand, max(total, 1), max(total, 1), case["dtype"] == F16, H200, Tile(case["tile"], *case["shape"])
    )
    return operand, replace(plan, grid=case["blocks"], stages=case["stages"]), kind


def defines_of(case: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    operand, plan, kind = planned(case)
    activation = None if case["second"] else case["activation"]
    weighted = case["second"] and case["dtype"] == F16
    return many_defines(operand, plan, kind, activation, biased=case["bias"], weighted=weighted)


def drawn(case: dict[str, Any]) -> ExpertWeights:
    (hidden, size), scheme = case["sizes"], case["scheme"]
    weights = draw_quantised(
        len(case["counts"]), hidden, size, scheme, case["dtype"], gated=case["gated"], bias=case["bias"]
    )
    scales = weights.scales
    assert scales is not None
    if scheme.scales == "float":
        kind = case["scales"]
        scales = replace(scales, w13=scales.w13.to(kind), w2=scales.w2.to(kind))
    if case.get("large"):  # bytes at which a scale times 2^126 passes bfloat16, and at the ends
        strange = torch.tensor([0, 1, 126, 127, 128, 129, 135, 140], dtype=torch.uint8)
        bytes_ = strange[torch.randint(len(strange), scales.w13.shape)]
        bytes_[0, 5, 1] = 255
        scales = replace(scales, w13=bytes_.view(torch.float8_e8m0fnu))
    return replace(weights, scales=scales)


def run(library: Any, case: dict[str, Any], at_once: bool) -> str | None:
    """What is wrong with a launch over fresh rows, or None."""
    operand, plan, _ = planned(case)
    dtype, second, counts = case["dtype"], case["second"], torch.tensor(case["counts"], dtype=torch.int32)
    total, weighted = int(counts.sum()), second and dtype == F16
    weights = drawn(case)
    packed = pack_experts(weights)
    assert packed.scales is not None
    s13, s2, z13, z2, g13, g2 = packed.scales.tensors[:6]
    codes, scales, zeros, whole, bias = (
        (packed.w2, s2, z2, g2, packed.w2_bias) if second else (packed.w13, s13, z13, g13, packed.w13_bias)
    )
    assert scales is not None
    rows = torch.randn(total + 1, operand.size).to(dtype)[:total]
    given = interleaved(rows) if total else rows
    routes, factors = torch.randperm(2 * total + 1)[:total].int(), torch.rand(2 * total + 1)
    first_rows, turns = torch.nn.functional.pad(counts.cumsum(0), (1, 0)), torch.zeros(2, dtype=torch.int32)
    out = poisoned((total, operand.columns), dtype)
    boxes = operand_boxes(operand, plan)
    addresses = (codes.data_ptr(), scales.data_ptr(), scales.data_ptr() if zeros is None else zeros.data_ptr())
    of_weights = [map_of(at, box, kind.itemsize) for at, (kind, box) in zip(addresses, boxes, strict=True)]
    of_rows = map_of(
        given.data_ptr(), ((operand.size, total), (2 * operand.size,), (STEP_BYTES // 2, plan.box))
    )  # fmt: skip
    tensors = (
        given, bias, factors if weighted else None, routes if weighted else None, first_rows, counts, out, turns, whole,
    )  # fmt: skip
    pointers = (ctypes.c_void_p * 9)(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
    a = Activation() if second else case["activation"]
    constants = map(float_bits, (a.alpha, a.beta, a.limit or 0.0))
    sizes = (ctypes.c_int64 * 8)(operand.experts, operand.columns, operand.size, 2 * operand.size, 1, *constants)
    maps = b"".join((of_weights[0], of_rows, *of_weights[1:]))
    failure = library.run(plan.grid, int(at_once), int(torch.randint(2**31, ())), maps, pointers, sizes)
    if failure is not None:
        return str(failure.decode())
    if bool(turns.any()) or guard_broken(out):
        return "turns are not as they were, or something was written behind the results"
    row_tiles = sum(-(-count // plan.rows) for count in case["counts"])
    if library.tiles_begun() != row_tiles * -(-16 * operand.tiles // plan.weight_rows):
        return "a tile was worked on twice or not at all"
    if not total:
        return None
    exact, honest = (results(rows, weights, case, kind) for kind in (torch.float64, torch.float32))
    if weighted:
        exact, honest = exact * factors[routes.long(), None], honest * factors[routes.long(), None]
    got, honest = out if second else ordered(out), honest.to(dtype)
    strange = ~honest.isfinite()
    if not torch.equal(strange, ~got.isfinite()):
        return "NaN or infinity in other places"
    got, exact, honest = (values.masked_fill(strange, 0) for values in (got, exact, honest))
    errors, budget = largest_and_rms(got, exact), largest_and_rms(honest, exact)
    right = errors[0] <= 1.5 * budget[0] and errors[1] <= 1.05 * budget[1]
    return None if right else f"errors {errors}, those of float32 rounded once {budget}"


def results(rows: torch.Tensor, weights: ExpertWeights, case: dict[str, Any], kind: torch.dtype) -> torch.Tensor:
    """Rows times their experts' weights, with all that follows, at a dtype."""
    found, first = [], 0
    for expert, count in enumerate(case["counts"]):
        w13, w2 = dequantised_expert(weights, expert)
        weight, bias = (w2, weights.w2_bias) if case["second"] else (w13, weights.w13_bias)
        made = rows[first : first + count].to(kind) @ weight.to(kind).T
        if bias is not None:
            made = made + bias[expert].to(kind)
        found.append(made if case["second"] else plain_activation(made, case["activation"], case["gated"]))
        first += count
    return torch.cat(found)


QUICK = ("large scales",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_the_kernel(name: str, tmp_path: Path) -> None:
    case = {**PLAIN, **CASES[name]}
    library = build(tmp_path, defines_of(case))
    for at_once in (True, False):
        torch.manual_seed(3)
        assert run(library, case, at_once) is None


MUTANTS = {
    "a stage is given away before it is read": (
        "gpt-oss", "await_products<1>();  // those", "await_products<2>();  // those",
    ),
    "values written over while products read them": ("gpt-oss", "values[batch & 1]", "values[0]"),
    "gate where up belongs": ("gpt-oss", "codes.z, lower_zero", "codes.x, lower_zero"),
    "scales of another row": ("gpt-oss", "lane / 4 * 2 * SCALE_SIZE", "(lane / 4 ^ 1) * 2 * SCALE_SIZE"),
    "scales of the group before": ("gpt-oss", "part * LINE);\n        all |=", "0);\n        all |="),
    "large scales are cut": ("large scales", "if (large) {", "if (false) {"),
    "results in the order of columns": (
        "gpt-oss", "return {first.x, first.z, second.x, second.z}", "return {first.x, first.y, first.z, first.w}",
    ),
    "results without a gate in the order of columns": ("not gated", "at = INTERLEAVES ?", "at = false ?"),
    "the bias of the column beside": ("gpt-oss, second", "OTHER_COLUMN = TILED ? 8 : 1", "OTHER_COLUMN = 1"),
    "columns past the last": (
        "gpt-oss, second", "tile_column + m * COLUMNS_A_PRODUCT < a", "tile_column + m * COLUMNS_A_PRODUCT <= a",
    ),
    "the zero point of another row": ("int4, zero points", "zeros & 0xff, zeros >> 8", "zeros & 0xff, zeros & 0xff"),
    "scales of the other row for sums": ("int4", "fmaf(scales.y, own[4 * i + 2]", "fmaf(scales.x, own[4 * i + 2]"),
    "the next group too early": ("int4", "column / WIDTH", "min(step, u32(2 * BK / WIDTH))"),
    "one global scale for gate and up": (
        "NVFP4", "__ldg(a.weight_scales + first + 1)", "__ldg(a.weight_scales + first)",
    ),
    "the factor of the row before": ("int4, half, second", "a.factors + routes[1]", "a.factors + routes[0]"),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_seen(mutant: str, tmp_path: Path) -> None:
    name, *change = MUTANTS[mutant]
    case = {**PLAIN, **CASES[name]}
    library = build(tmp_path, defines_of(case), (change[0], change[1]))
    assert any(run(library, case, at_once) is not None for at_once in (False, True, False))
