"""The kernel of experts.cu, lane by lane on a host: what it computes, and that nobody waits for ever.

A C++ compiler builds the very source with headers of `host_experts` in place of those that hold machine instructions.
Copies and products are done at once, which shows who overwrites what is still read, or in a random order as late as
somebody waits for them, which shows who does not wait.
"""

import ctypes
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation
from moeyard.cuda.experts.plan import ProductPlan, Way, product_plan
from moeyard.cuda.experts.product import product_defines
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.parameters import float_bits
from moeyard.cuda.runtime.sources import HEADERS, SOURCES
from moeyard.cuda.runtime.tensor_map import STEP_BYTES, turned_boxes, weight_boxes
from moeyard.dispatch.call import lies_turned
from moeyard.testing import guard_broken, largest_and_rms, plain_activation, poisoned, same_bits

HERE, TEXTS = Path(__file__).parent / "host_experts", SOURCES | HEADERS
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def build(folder: Path, defines: tuple[tuple[str, str], ...], change: tuple[str, str] | None = None) -> Any:
    """The kernel as a library of the host, `change` of its source made first, wherever it has that."""
    changed = change is None
    for name in (
        "experts.cu",
        "activation.cuh",
        *(f"experts_{part}.cuh" for part in ("loads", "nibbles", "results", "stages", "sums", "tiles")),
    ):
        text = TEXTS[name]
        if change is not None and change[0] in text:
            text, changed = text.replace(*change), True
        (folder / name).write_text(text)
    assert changed, "the source has what is to be changed"
    for path in HERE.iterdir():
        shutil.copy(path, folder)
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", *(f"-D{name}={value}" for name, value in defines)]
    command = [str(COMPILER), *options, "-o", "kernel.so", "run.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    library = ctypes.CDLL(str(folder / "kernel.so"))
    library.run.restype = ctypes.c_char_p
    return library


def map_of(address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """A tensor map as host_experts/wgmma.cuh reads it."""
    rank = len(sizes)
    padded = (*strides, *(0,) * (4 - len(strides))), (*sizes, *(0,) * (5 - rank)), (*box, *(0,) * (5 - rank))
    return struct.pack("<Q4QI5I5I", address, *padded[0], rank, *padded[1], *padded[2]).ljust(128, b"\0")


PLAIN: dict[str, Any] = {
    "tiles": 16, "counts": [5, 0, 17, 1], "size": 80, "columns": 48, "gated": True, "gather": True, "by_route": False,
    "bias": False, "weighted": False, "activation": Activation(), "dtype": torch.bfloat16, "blocks": 3, "ready": False,
    "turned": False,
    "plan": {"stages": 3},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "decode": {"tiles": 8},
    "several tiles of rows": {"tiles": 16, "counts": [40, 3, 16], "size": 144, "columns": 80},
    "two warpgroups": {"tiles": 32, "counts": [50, 20], "blocks": 2, "columns": 112},
    "taller, two stages": {"tiles": 64, "counts": [100, 0, 30], "size": 336, "plan": {"stages": 2}},
    "taller, plain": {"tiles": 128, "counts": [140, 60], "gated": False, "columns": 272, "activation": None},
    "prefill": {
        "tiles": 192, "counts": [200, 0, 33], "size": 176, "gather": False, "ready": True, "blocks": 2, "columns": 144,
    },
    "prefill, gathered": {
        "tiles": 192, "counts": [200, 0, 33, 1], "size": 336, "blocks": 2, "columns": 144, "bias": True,
        "activation": GPT_OSS_ACTIVATION, "plan": {"stages": 4},
    },
    "prefill, one step": {
        "tiles": 192, "counts": [380, 7], "size": 48, "gather": False, "ready": True, "blocks": 2, "columns": 144,
        "plan": {"stages": 2},
    },
    "gathered, many rows": {"tiles": 128, "counts": [140, 33], "size": 176, "blocks": 2, "columns": 144},
    "second product": {
        "tiles": 16, "counts": [20, 3, 0, 9], "size": 336, "gated": False, "gather": False, "activation": None,
        "ready": True, "columns": 160,
    },
    "second product, few steps": {
        "tiles": 192, "counts": [220, 7], "size": 48, "gated": False, "gather": False, "activation": None,
        "ready": True, "columns": 272, "bias": True,
    },
    "gpt-oss": {"tiles": 32, "counts": [7, 30], "activation": GPT_OSS_ACTIVATION, "bias": True},
    "by route": {
        "tiles": 16, "counts": [20, 9], "gated": False, "by_route": True, "weighted": True, "bias": True,
        "activation": None, "columns": 80,
    },
    "half": {"tiles": 8, "dtype": torch.float16, "gated": False, "activation": Activation("relu2"), "columns": 144},
    "more experts than threads": {"tiles": 8, "counts": [3, 0, 0, 9, 1] * 60, "size": 16, "columns": 16, "blocks": 5},
    "gelu": {"tiles": 64, "counts": [9, 40], "activation": Activation("gelu", limit=1.0)},
    "second product, few rows": {
        "tiles": 8, "counts": [20, 3, 0, 9], "size": 80, "gated": False, "gather": False, "activation": None,
        "ready": True, "columns": 144, "dtype": torch.float16,
    },
    "by route, many rows": {
        "tiles": 128, "counts": [130, 0, 20], "size": 80, "gated": False, "by_route": True, "weighted": True,
        "activation": None, "columns": 272,
    },
    "nobody's rows": {"counts": [0, 0, 0]},
    "one step": {"tiles": 8, "size": 48, "counts": [9, 3, 1, 20], "columns": 112, "blocks": 2},
    "one step of boxes": {
        "tiles": 8, "size": 48, "counts": [9, 3, 1, 20], "columns": 112, "blocks": 2, "gated": False, "gather": False,
        "activation": None, "ready": True,
    },
    "second product, weighted": {
        "tiles": 192, "counts": [220, 7, 0, 3], "size": 80, "gated": False, "gather": False, "activation": None,
        "ready": True, "columns": 272, "bias": True, "weighted": True, "dtype": torch.float16,
    },
    "weighted, few rows": {
        "tiles": 8, "counts": [20, 3, 0, 9], "size": 80, "gated": False, "gather": False, "activation": None,
        "ready": True, "columns": 144, "weighted": True, "dtype": torch.float16,
    },
    "coarse steps": {"tiles": 128, "counts": [130, 1, 33, 0, 97], "size": 144, "columns": 144, "plan": {"fine": 32}},
    "in batches": {
        "tiles": 32, "counts": [40, 0, 9], "size": 144, "gated": False, "gather": False, "activation": None,
        "columns": 144,
    },
    "transposed": {
        "tiles": 192, "counts": [200, 0, 33], "size": 176, "gated": False, "by_route": True, "activation": None,
        "columns": 320, "blocks": 2, "turned": True,
    },
    "transposed, few rows": {
        "tiles": 8, "counts": [20, 3, 0, 9], "size": 80, "gated": False, "activation": None, "columns": 128,
        "turned": True, "dtype": torch.float16,
    },
    "transposed, ordered": {
        "tiles": 64, "counts": [70, 5], "size": 144, "gated": False, "gather": False, "activation": None,
        "columns": 192, "turned": True,
    },
    "ordered, results by route": {
        "tiles": 64, "counts": [70, 5], "size": 144, "gated": False, "gather": False, "by_route": True, "bias": True,
        "weighted": True, "activation": None, "columns": 272,
    },
}  # fmt: skip


def planned(case: dict[str, Any]) -> ProductPlan:
    card = Card(132, 232448, True)
    gated, by_route = case["gated"], case["by_route"]
    plan = product_plan(
        sum(case["counts"]),
        len(case["counts"]),
        case["columns"],
        gated,
        by_route or case["weighted"],
        card,
        Way(rows=case["tiles"]),
    )
    return replace(plan, grid=case["blocks"], **case["plan"])


def defines_of(case: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    activation = case["activation"]
    return product_defines(
        planned(case), case["dtype"], "IDENTITY" if activation is None else activation.name.upper(),
        gated=case["gated"], clamped=activation is not None and activation.limit is not None, gather=case["gather"],
        by_route=case["by_route"], biased=case["bias"], weighted=case["weighted"], ready=case["ready"],
        turned=case["turned"],
    )  # fmt: skip


def run(library: Any, case: dict[str, Any], at_once: bool, kept: list[torch.Tensor] | None = None) -> str | None:
    """What is wrong with a launch over fresh rows, or None. Its results are added to `kept`."""
    plan, dtype, size, columns, gated = planned(case), case["dtype"], case["size"], case["columns"], case["gated"]
    counts = torch.tensor(case["counts"], dtype=torch.int32)
    experts, total, wide = len(counts), int(counts.sum()), columns * (2 if gated else 1)
    moved = case["gather"]
    divisor = 3 if moved else 1
    tokens = total // divisor + 2
    rows = torch.randn(tokens, size).to(dtype)
    weight = (torch.randn(experts, wide, size) / size**0.5).to(dtype)
    bias = torch.randn(experts, wide).to(dtype) if case["bias"] else None
    routes = torch.randperm(tokens * divisor)[:total].int()
    factors = torch.rand(tokens * divisor) if case["weighted"] else None
    first_rows = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    turns = torch.zeros(2, dtype=torch.int32)
    out = poisoned((tokens * divisor if case["by_route"] else total, columns), dtype)
    boxes = weight_boxes(experts, wide, size, 2, plan.weight_rows, plan.turn)
    if case["turned"]:  # a part of larger matrices
        larger = torch.full((experts, size + 1, wide + 72), torch.nan, dtype=dtype)
        larger[:, :size, 64 : wide + 64] = weight.transpose(1, 2)
        weight = larger[:, :size, 64 : wide + 64].transpose(1, 2)
        assert lies_turned(weight)
        boxes = turned_boxes(weight, plan.weight_rows)
    maps = map_of(weight.data_ptr(), *boxes)
    maps += map_of(rows.data_ptr(), (size, len(rows)), (2 * size,), (STEP_BYTES // 2, plan.box))
    slots = routes if moved or case["by_route"] or case["weighted"] else None
    tensors = (rows, bias, factors, slots, first_rows, counts, out, turns)
    pointers = (ctypes.c_void_p * 8)(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors))
    activation = case["activation"] or Activation()
    constants = (activation.alpha, activation.beta, activation.limit or 0.0)
    sizes = (ctypes.c_int64 * 8)(experts, columns, size, 2 * size, divisor, *map(float_bits, constants))
    failure = library.run(plan.grid, int(at_once), int(torch.randint(2**31, ())), maps, pointers, sizes)
    if failure is not None:
        return str(failure.decode())
    taken = rows[routes.long() // divisor] if moved else rows[:total]
    if bool(turns.any()):
        return "turns are not as they were"
    row_tiles = sum(-(-count // plan.rows) for count in case["counts"])
    if library.tiles_begun() != row_tiles * -(-wide // plan.weight_rows):
        return "a tile was worked on twice or not at all"
    if not total:
        return "wrote where it must not" if guard_broken(out) else None
    owner = torch.repeat_interleave(torch.arange(experts), counts)
    target = routes.long() if case["by_route"] else torch.arange(total)
    exact, honest = (
        results(taken.to(kind), weight.to(kind), bias, owner, case, None if factors is None else factors[routes.long()])
        for kind in (torch.float64, dtype)
    )
    if guard_broken(out) or bool((out.view(torch.uint8).view(len(out), -1)[untaken(target, len(out))] != 0x7F).any()):
        return "wrote where it must not"
    if kept is not None:
        kept.append(out[target])
    errors, budget = largest_and_rms(out[target], exact), largest_and_rms(honest, exact)
    right = errors[0] <= 2 * budget[0] and errors[1] <= 1.1 * budget[1]  # of few values the largest varies
    return None if right else f"errors {errors}, those of plain torch {budget}"


def untaken(target: torch.Tensor, count: int) -> torch.Tensor:
    """Rows that no result goes to."""
    mask = torch.ones(count, dtype=torch.bool)
    mask[target] = False
    return mask


def results(
    taken: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, owner: torch.Tensor, case: dict[str, Any],
    factors: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Rows times their experts' weights, with all that follows, at the dtype of the rows."""
    rows = torch.bmm(weight[owner], taken.unsqueeze(2)).squeeze(2)
    if bias is not None:
        rows = rows + bias[owner].to(rows.dtype)
    if case["activation"] is not None:
        rows = plain_activation(rows, case["activation"], case["gated"])
    return rows if factors is None else (rows * factors[:, None]).to(rows.dtype)


LONGER = ("transposed", "transposed, ordered")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in LONGER else name for name in CASES]
)
def test_the_kernel(name: str, tmp_path: Path) -> None:
    case = {**PLAIN, **CASES[name]}
    library = build(tmp_path, defines_of(case))
    for at_once in (True, False):
        assert run(library, case, at_once) is None


INVARIANT = {  # what a layer's products are; plans choose tiles by the number of tokens
    "first": {"counts": [200, 0, 33, 1], "size": 176, "columns": 144, "bias": True, "activation": GPT_OSS_ACTIVATION},
    "second": {
        "counts": [200, 0, 33, 1], "size": 80, "columns": 272, "gated": False, "activation": None, "gather": False,
        "ready": True,
    },
    "weighted": {
        "counts": [200, 0, 33, 1], "size": 80, "columns": 144, "gated": False, "activation": None, "gather": False,
        "ready": True, "weighted": True, "dtype": torch.float16, "bias": True,
    },
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", INVARIANT)
def test_all_tiles_give_the_same_bits(name: str, tmp_path: Path) -> None:
    """Where a product of 16 values of k rounds alike for any N, as here, no result depends on the tile it is in."""
    kept: list[torch.Tensor] = []
    tiles = (8, 16, 32, 64, 128, 192)
    for rows in tiles:
        (tmp_path / str(rows)).mkdir()
        case = {**PLAIN, **INVARIANT[name], "tiles": rows}
        library = build(tmp_path / str(rows), defines_of(case))
        torch.manual_seed(5)
        assert run(library, case, True, kept) is None
    assert len(kept) == len(tiles) and all(same_bits(one, kept[0]) for one in kept)


MUTANTS = {
    "a stage is given away before it is read": ("taller, two stages", "await_products<1>()", "await_products<2>()"),
    "the second warpgroup waits too long": ("taller, two stages", "DEPTH > 2 ? 2 : 1", "2"),
    "an arrival too few": ("decode", "1 + 128 * (GATHERS", "2 + 128 * (GATHERS"),
    "boxes that are not there are waited for": ("second product", "boxed_rows(tile.rows) * BK * ITEM", "ROW_BYTES + 2"),
    "pieces where the swizzle does not look": ("decode", "(piece ^ (first & 7)) << 4", "piece << 4"),
    "up where gate is": (
        "decode", "gate = scaled(sums[0], of_row * of_weights.x), up = scaled(sums[2]",
        "gate = scaled(sums[2], of_row * of_weights.x), up = scaled(sums[0]",
    ),
    "another column of results": ("two warpgroups", "tile.weight_tile * CONSUMERS + group", "tile.weight_tile + group"),
    "rows of the next expert": ("several tiles of rows", "min(share, rows - row)", "share"),
    "results before all have come": (
        "decode", "    sync_warpgroup(group);\n    for (u32 row = thread / P", "    for (u32 row = thread / P",
    ),
    "odd columns where even ones belong": ("second product", "at = start / 2 + odd", "at = start / 2"),
    "the factor of another row": (
        "weighted, few rows", "route = room.routes[group * BN + row]", "route = room.routes[group * BN + (row ^ 1)]",
    ),
    "a row too few": ("second product", "row >= tile.rows) continue", "row + 1 >= tile.rows) continue"),
    "results that the copy engine does not see": ("prefill", "  show_shared_writes();\n  sync_w", "  sync_w"),
    "results that are not all there": ("prefill", "  sync_warpgroup(group);\n  if (first", "  if (first"),
    "results that are written over while they leave": ("prefill", "  await_copies_out();\n", ""),
    "a stage lent while it is read": (
        "prefill", "{\n  await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);\n  arrive(", "{\n  arrive(",
    ),
    "a stage that does not come back": ("prefill", "  if (signals.releases) arrive(signals.held);\n", ""),
    "rows of the expert before": ("several tiles of rows", "++place) rows = 0;", "++place);"),
    "turns that the next launch would begin with": ("decode", "    counts[1] = 0;\n", ""),
    "turns that are given twice": ("several tiles of rows", "gridDim.x + atomicAdd(counts, 1)",
                                   "gridDim.x + atomicAdd(counts, 1) / 2"),
    "every block clears the turns": ("several tiles of rows", "+ 1 < gridDim.x) return;", "+ 1 < 0) return;"),
    "rows before the launch before has ended": (
        "second product", "    wait_for_previous_launch();\n    show_memory_to_copies();\n  }\n  while", "  }\n  while",
    ),
    "a slot written while it is read": ("one step", "    odd ^= 1;", "    //"),
    "an end in a stage that is not free": (
        "one step", "  await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);\n  arrive_when", "  arrive_when",
    ),
    "an end that nobody hears of": ("decode", "    tell_end(room, stage.number);\n    turns", "    turns"),
    "weights too early": (
        "second product, few steps",
        "        await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);\n        load_w", "        load_w",
    ),
    "columns that are not exchanged": ("transposed, few rows", "0x3276 : 0x5410", "0x5410 : 0x3276"),
    "the next values of another column": ("transposed, few rows", "16 * 128 >> 4", "8 * 128 >> 4"),
    "weights of the last step missing": ("gpt-oss", "step < a.steps; ++step) {\n      await_phase(room.empty",
                                         "step < a.steps - 1; ++step) {\n      await_phase(room.empty"),
}  # fmt: skip


@pytest.mark.parametrize(
    "mutant", [name if i < 2 else pytest.param(name, marks=pytest.mark.full) for i, name in enumerate(MUTANTS)]
)
def test_mutants_are_seen(mutant: str, tmp_path: Path) -> None:
    name, *change = MUTANTS[mutant]
    case = {**PLAIN, **CASES[name]}
    library = build(tmp_path, defines_of(case), (change[0], change[1]))
    assert any(run(library, case, at_once) is not None for at_once in (False, True, False))
