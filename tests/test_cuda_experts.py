"""What the Hopper kernels of experts can show without a GPU: they compile to wgmma and spill nothing, plans hold, and
index maps meet, in ports of their formulas beside the hardware's own layouts."""

import itertools
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeyard
from moeyard import ExpertWeights, Routing
from moeyard.bench import results
from moeyard.cuda.experts import launchers as launches
from moeyard.cuda.experts.plan import ProductPlan, Way, product_plan, shared_bytes, stage_bytes, way_of
from moeyard.cuda.experts.product import apart, compact_layout, lies_well, product_defines
from moeyard.cuda.runtime import compile as building
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.sources import SOURCES
from moeyard.cuda.runtime.tensor_map import STEP_BYTES, turned_boxes, weight_boxes
from moeyard.dispatch.call import Call, WeightFacts, facts_of_experts, lies_turned, unreadable_turned
from moeyard.dispatch.sizes import expected_routes
from moeyard.values import Segments

H200 = Card(132, 232448, True)
MODELS = {  # hidden, intermediate, experts, top_k
    "Mixtral": (4096, 14336, 8, 2),
    "Qwen3-30B": (2048, 768, 128, 8),
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "gpt-oss-120b": (2880, 2880, 128, 4),
    "Qwen3-Next": (2048, 512, 512, 10),
    "odd": (704, 1408, 60, 3),
}
TOKENS = [1, 2, 8, 33, 64, 256, 1024, 4096, 16384, 32768]


def plans() -> list[ProductPlan]:
    """Every plan of both products of the models."""
    found = set()
    for hidden, size, experts, top_k in MODELS.values():
        for tokens in TOKENS:
            found.add(product_plan(tokens * top_k, experts, size, True, False, H200))
            found.add(product_plan(tokens * top_k, experts, hidden, False, False, H200))
    return sorted(found, key=str)


def test_plans_fit_the_card() -> None:
    sizes = [(n, e) for n in (1, 7, 64, 1000, 4096, 10**5, 2**24) for e in (1, 8, 60, 128, 512, 8192)]
    for num_rows, experts in sizes:
        for gated in (False, True):
            for by_route in (False, True):
                chosen = product_plan(num_rows, experts, 2880, gated, by_route, H200)
                each = (H200.shared_limit + 1024) // chosen.blocks - 1024
                entries = min(experts, num_rows) + 1
                arguments = (chosen.rows, chosen.groups, chosen.tall, chosen.stages, entries, gated, by_route)
                assert chosen.shared_bytes == shared_bytes(*arguments) <= each
                assert chosen.stages >= 2 and chosen.threads * chosen.blocks <= 2048
                assert stage_bytes(chosen.rows, chosen.groups, chosen.tall) % 1024 == 0, (
                    "tiles begin where the swizzle does"
                )
                assert 1 <= chosen.grid <= chosen.blocks * H200.processors
                assert chosen.rows % min(chosen.rows, 16) == 0 and chosen.rows % 8 == 0
    with pytest.raises(ValueError, match="experts: expected so few that their table fits 49152 bytes, got 8192"):
        product_plan(10**6, 8192, 2048, True, False, Card(20, 49152, True))


def test_tiles_hold_the_rows_of_most_experts() -> None:
    assert [product_plan(tokens * 8, 128, 768, True, False, H200).rows for tokens in (1, 64, 256, 512, 1024, 4096)] == [
        8, 16, 32, 64, 128, 192,
    ]  # fmt: skip
    assert [product_plan(rows * 128, 128, 768, True, False, H200).rows for rows in (128, 160, 512)] == [192] * 3


def test_tiles_and_copying_are_chosen_as_measured() -> None:
    """Every cell of prefill_ways.json: what is chosen is the quickest that was measured, or within 5 % of it.

    With fewer than 128 rows a tile only whether rows are copied.
    """
    content = results.read(Path(__file__).parents[1] / "benchmarks/results/h200/prefill_ways.json")
    cells: dict[tuple[str, int], dict[str, float]] = {}
    chosen = {}
    for row in content["rows"]:
        sizes, cell = row["sizes"], (row["workload"], row["sizes"]["num_tokens"])
        if row["provider"] == "moeyard" and row["impl"] != "chosen":  # by the rules of that day
            cells.setdefault(cell, {})[row["impl"]] = row["time_us"]
            routes, experts, columns = (
                sizes["num_tokens"] * sizes["top_k"],
                sizes["num_experts"],
                2 * sizes["intermediate_size"],
            )
            rows = product_plan(routes, experts, columns // 2, True, False, H200).rows
            how = "copied" if way_of(routes, experts, columns).copied else "gathered"
            chosen[cell] = f"{rows}, {how}" if rows >= 128 else how
    lost = {cell: times[chosen[cell]] / min(times.values()) for cell, times in cells.items()}
    assert len(lost) == 25 and max(lost.values()) < 1.05, lost
    assert {"gathered", "128, gathered", "192, gathered", "192, copied"} == set(chosen.values())


@pytest.mark.parametrize(("tokens", "top_k", "experts", "hidden"), [(9, 3, 7, 64), (2, 1, 512, 16), (100, 2, 8, 16)])
@pytest.mark.parametrize("copied", [False, True])
def test_parts_of_a_layout_share_no_memory(tokens: int, top_k: int, experts: int, hidden: int, copied: bool) -> None:
    """Nor with what is written while they are read: rows by route by the sum, the table by both products."""
    ids = torch.zeros(tokens, top_k, dtype=torch.int32)
    routes = tokens * top_k
    middle, rows, out = (torch.empty(n, hidden, dtype=torch.bfloat16) for n in (routes, routes, tokens))
    for given in (out, None):
        layout = compact_layout(ids, experts, experts, middle, middle if copied else rows, given)
        parts = [*layout.tensors[:3], layout.expert_offsets, layout.expert_counts, layout.route_rows]
        spans = sorted((part.data_ptr(), part.data_ptr() + part.numel() * part.element_size()) for part in parts)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
        assert [part.numel() for part in parts] == [routes, routes, 1, experts + 1, experts, routes]
        free = {tensor.untyped_storage().data_ptr() for tensor in (middle, rows)}
        table = [layout.expert_offsets, layout.expert_counts, layout.route_rows]
        assert not free & {part.untyped_storage().data_ptr() for part in table}
        fits = given is not None and 4 * (3 * experts + 3) <= 2 * out.numel()
        assert (layout.expert_offsets.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()) == fits
        assert layout.route_rows.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
    one = torch.empty(1, 4097, dtype=torch.bfloat16)[:, :4096]  # contiguous, whatever the stride of its one row
    assert compact_layout(ids[:1], 4, 4, middle, rows, one).expert_offsets.data_ptr() == one.data_ptr()
    assert apart(out, rows, None) and not apart(out, rows, out.view(torch.int16)[1:])


def off_by(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values, beginning so many elements into a storage."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    return room[elements:].view(tensor.shape).copy_(tensor)


def test_rows_may_lie_anywhere_and_weights_may_not() -> None:
    """Rows and results are copied where the copy engine cannot read or write them; weights are refused in words."""
    w13, w2 = torch.randn(4, 64, 32).bfloat16(), torch.randn(4, 32, 32).bfloat16()
    hidden = torch.randn(6, 32).bfloat16()

    def refused(up: torch.Tensor, down: torch.Tensor) -> str | None:
        facts = facts_of_experts(ExpertWeights(up, down))
        call = Call(torch.device("cuda", 0), torch.bfloat16, facts, 6, 2, 4)
        reason = launches.unfit_for_experts(call)
        assert reason == launches.unfit_for_products(call)
        return reason

    for rows in (hidden, off_by(hidden, 1), torch.randn(6, 96).bfloat16()[:, 32:64], torch.randn(32, 6).bfloat16().T):
        placed = launches._in_place(rows)
        assert lies_well(placed) and torch.equal(placed, rows)
    assert launches._in_place(hidden) is hidden, "nothing is copied that need not be"
    assert refused(w13, w2) is None
    away = "expected an address that is a multiple of 16 bytes"
    assert refused(off_by(w13, 4), w2) == f"weights.w13: {away}"
    assert refused(w13, off_by(w2, 1)) == f"weights.w2: {away}"
    assert refused(w13.mT.contiguous().mT, w2) == (
        "weights.w13: expected a contiguous tensor, got strides (2048, 1, 64)"
    )


@pytest.mark.parametrize(("hidden", "size", "experts", "top_k"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_plans_take_the_routes_that_come_to_this_rank(
    hidden: int, size: int, experts: int, top_k: int, ranks: int
) -> None:
    """Under expert parallelism a rank's tiles are those of its own share of tokens, and hold whatever comes."""
    local = max(1, experts // ranks)
    for tokens in TOKENS:
        routes = tokens * top_k
        here = expected_routes(routes, local, experts)
        assert here == max(1, routes * local // experts) and expected_routes(routes, experts, experts) == routes
        for columns, gated in ((size, True), (hidden, False)):
            chosen = product_plan(routes, local, columns, gated, False, H200, None, here)
            alone = product_plan(here, local, columns, gated, False, H200)
            assert (chosen.rows, chosen.groups, chosen.tall, chosen.blocks) == (
                alone.rows, alone.groups, alone.tall, alone.blocks,
            )  # fmt: skip
            assert alone.stages - chosen.stages in (0, 1), "the table has room for all experts"
            assert chosen.grid >= alone.grid, "blocks for all tiles that may come"
    assert expected_routes(0, local, experts) == 0


@pytest.mark.parametrize("routed", [False, True], ids=["by segment", "by route"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_a_product_alone_plans_for_the_rows_of_this_rank(
    ranks: int, routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4096 tokens of DeepSeek-V3 under expert parallelism: 128 rows per expert here, whoever counts all routes."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(launches, "product", lambda *_, **options: asked.append(options))
    monkeypatch.setattr(launches, "turns_of", lambda _device: 0)
    monkeypatch.setattr(launches, "shuffle_rows_launch", lambda *_, **__: None)
    local, routes = 256 // ranks, 32768
    counts = torch.full((local,), routes // 256, dtype=torch.int32)
    firsts = (counts.cumsum(0) - counts).long()
    slots = torch.arange(routes, dtype=torch.int32) if routed else None
    rows, weight = torch.zeros(routes, 16, dtype=torch.bfloat16), torch.zeros(local, 2048, 16, dtype=torch.bfloat16)
    out = torch.empty(routes, 2048, dtype=torch.bfloat16)
    for known in (256, 0):
        segments = Segments(firsts, counts, slots, 1, known)
        launches.grouped_gemm_launch(rows, weight, None, None, segments, out=out)
    told, untold = asked
    assert (told["expected"], untold["expected"]) == (routes // ranks, routes)
    assert told["way"] == way_of(routes // ranks, local, 2048, layer=False)
    plan = product_plan(routes, local, 2048, False, routed, H200, told["way"], told["expected"])
    assert plan.rows == product_plan(routes // ranks, local, 2048, False, routed, H200, told["way"]).rows


@cache
def cuobjdump() -> str | None:
    """NVIDIA's disassembler: on the path, or in Triton's wheel."""
    try:
        from triton.backends import nvidia
    except ImportError:
        return shutil.which("cuobjdump")
    inside = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return str(inside) if inside.exists() else shutil.which("cuobjdump")


def examined(plan: ProductPlan, folder: Path, **options: Any) -> tuple[bytes, str, str]:
    """(cubin, what it uses of the machine, its instructions)."""
    flags: dict[str, Any] = dict.fromkeys(
        ("gated", "clamped", "gather", "by_route", "biased", "weighted", "ready"), False
    )
    curve, dtype = options.pop("curve", "IDENTITY"), options.pop("dtype", torch.bfloat16)
    defines = product_defines(plan, dtype, curve, **{**flags, **options})
    text = SOURCES["experts.cu"]
    code = building.compile_source(text, defines, "sm_90a")
    tool = cuobjdump()
    if tool is None:
        return code, "", ""
    path = folder / "examined.cubin"
    path.write_bytes(code)
    used, text = (
        subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    return code, used, text


def assert_sound(plan: ProductPlan, code: bytes, used: str, text: str, dtype: str = "BF16") -> None:
    assert code[:4] == b"\x7fELF" and b"experts_kernel" in code
    if not used:
        pytest.skip("compiles; cuobjdump, which would show more, is neither on the path nor in a Triton wheel")
    registers, stack, shared, local = (int(value) for value in re.findall(r"(?:REG|STACK|SHARED|LOCAL):(\d+)", used))
    assert (stack, local) == (0, 0), used
    assert registers * plan.threads * plan.blocks <= 65536
    if plan.rows * plan.tall >= 256:  # the sums of a lane: warpgroups then move registers, which no launch may add to
        assert registers == 168, "as many as experts.cu shares out"
    assert plan.shared_bytes + shared <= (H200.shared_limit + 2048) // plan.blocks
    steps = {int(n) for n in re.findall(rf"HGMMA\.64x(\d+)x16\.F32(?:\.{dtype})?", text)}
    step = min(plan.rows, 16)
    assert steps == set(range(step, plan.rows + 1, step)), "a product for every number of rows"
    assert "UTMALDG" in text and not re.search(r"\b(LDL|STL)\b", text)
    assert len(re.findall("WARPGROUP.DEPBAR.LE gsb0, 0x0", text)) == len(steps), "one wait for all products a tile"


def test_what_is_not_sound_is_seen(tmp_path: Path) -> None:
    """The mutants of `assert_sound`."""
    pytest.importorskip("cuda.core")
    plan = next(plan for plan in plans() if plan.rows == 8)
    code, used, text = examined(plan, tmp_path, ready=True)
    assert_sound(plan, code, used, text)
    for change in (
        (code, re.sub(r"STACK:\d+", "STACK:16", used), text),
        (code, re.sub(r"REG:\d+", "REG:160", used), text),
        (code, used, text.replace("HGMMA", "HMMA")),
        (code, used, text.replace("UTMALDG", "LDGSTS")),
        (code, used, text + "\n STL [R1], R2 ;"),
        (b"text", used, text),
    ):
        with pytest.raises(AssertionError):
            assert_sound(plan, *change)


ROWS = sorted({plan.rows for plan in plans()})


def test_every_size_of_tile_is_planned() -> None:
    assert ROWS == [8, 16, 32, 64, 128, 192]


@pytest.mark.parametrize("rows", ROWS)
def test_both_products_of_a_layer_are_wgmma_and_spill_nothing(rows: int, tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    plan = next(plan for plan in plans() if plan.rows == rows)
    assert_sound(plan, *examined(plan, tmp_path, gated=True, gather=True, curve="SILU"))
    assert_sound(plan, *examined(plan, tmp_path, ready=True))


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (128, {"gated": True, "gather": True, "curve": "SILU", "clamped": True, "biased": True}),
        (128, {"gather": True, "by_route": True, "weighted": True, "biased": True}),
        (192, {"gather": True, "by_route": True, "weighted": True, "biased": True}),
        (192, {"gated": True, "gather": True, "curve": "SILU", "clamped": True, "biased": True}),
        (192, {"by_route": True, "weighted": True}),
        (192, {"gated": True, "curve": "SILU", "ready": True, "clamped": True, "biased": True}),
        pytest.param(64, {"gather": True, "curve": "RELU2", "clamped": True}, marks=pytest.mark.full),
        pytest.param(16, {"gated": True, "gather": True, "curve": "GELU"}, marks=pytest.mark.full),
        pytest.param(
            128, {"gated": True, "gather": True, "curve": "GELU_TANH", "dtype": torch.float16}, marks=pytest.mark.full
        ),
        pytest.param(8, {"biased": True, "dtype": torch.float16}, marks=pytest.mark.full),
        *(
            pytest.param(rows, {"gather": gather, "by_route": True, "turned": True}, marks=pytest.mark.full)
            for rows in (8, 64, 128, 192)
            for gather in (True, False)
        ),
    ],
    ids=str,
)
def test_options_spill_nothing(rows: int, options: dict[str, bool], tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    plan = next(plan for plan in plans() if plan.rows == rows)
    half = options.get("dtype") == torch.float16
    assert_sound(plan, *examined(plan, tmp_path, **options), dtype="F16" if half else "BF16")


# Ports of the kernel's index arithmetic. Names are those of experts.cu and its headers.

BK = 64


def swizzled(address: np.ndarray) -> np.ndarray:
    """Where the 128-byte swizzle of copy engine and tensor cores puts a byte of rows of 128 bytes."""
    return address ^ (address >> 7 & 7) << 4


@pytest.mark.parametrize("rows", [8, 16, 32, 64, 128, 192])
def test_gathered_rows_lie_where_the_tensor_cores_look(rows: int) -> None:
    seen: dict[int, tuple[int, int]] = {}
    for thread in range(128):
        piece, first = thread & 7, thread >> 3 & 15
        to = first * BK * 2 + ((piece ^ (first & 7)) << 4)
        for i in range(max(1, rows // 16)):
            row = first + 16 * i
            if row < rows:
                address = to + i * 16 * BK * 2
                assert address not in seen and address % 16 == 0
                seen[address] = (row, piece)
    assert len(seen) == rows * 8
    for row in range(rows):
        for step in range(BK // 16):  # a product takes 16 values of each row: 32 bytes from the descriptor's address
            for half in range(2):
                linear = row // 8 * 1024 + row % 8 * 128 + step * 32 + half * 16
                assert seen[int(swizzled(np.array(linear)))] == (row, step * 2 + half)


def boxed(weights: np.ndarray, box_rows: int, turn: str, corner: tuple[int, ...]) -> np.ndarray:
    """The box at `corner` of contiguous weights [experts, rows, size], zeros outside: [rows of the box, 128 bytes]."""
    experts, rows, size = weights.shape
    sizes, strides, box = weight_boxes(experts, rows, size, weights.itemsize, box_rows, turn)
    view = np.lib.stride_tricks.as_strided(weights, sizes[::-1], (weights.itemsize, *strides)[::-1])
    out = np.zeros(box[::-1], weights.dtype)
    cut = tuple(slice(c, min(c + b, n)) for c, b, n in zip(corner, box, sizes, strict=True))[::-1]
    part = view[cut]
    out[tuple(slice(0, n) for n in part.shape)] = part
    return out.reshape(-1, STEP_BYTES // weights.itemsize)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [704, 48, 768])
@pytest.mark.parametrize("kind", [np.int16, np.int8])
def test_boxes_of_gated_weights_hold_gate_and_up_in_turn(groups: int, size: int, kind: type[Any]) -> None:
    bm, hidden, experts = 64 * groups, 144, 3
    weights = np.random.default_rng().integers(1, np.iinfo(kind).max, (experts, 2 * size, hidden), kind)
    values_a_step = STEP_BYTES // weights.itemsize
    for tile in range(-(-2 * size // bm)):
        for step in range(-(-hidden // values_a_step)):
            got = boxed(weights, bm, "halves", (step * values_a_step, 0, 0, tile * (bm // 16), 1))
            assert got.shape == (bm, values_a_step)
            for row in range(bm):
                column = tile * (bm // 2) + row // 16 * 8 + row % 8
                source = column + (size if row % 16 >= 8 else 0)
                wanted = np.zeros(values_a_step, weights.dtype)
                if column < size:
                    values = weights[1, source, step * values_a_step : (step + 1) * values_a_step]
                    wanted[: len(values)] = values
                assert (got[row] == wanted).all(), (tile, row)


def test_boxes_of_pairs_hold_even_and_odd_rows_in_turn() -> None:
    weights = np.random.default_rng().integers(1, 2**15, (2, 112, 64), np.int16)
    got = boxed(weights, 64, "pairs", (0, 0, 0, 4, 1))
    for row in range(48):
        assert (got[row] == weights[1, 64 + row // 16 * 16 + row % 8 * 2 + row // 8 % 2]).all()
    assert not got[48:].any()


def fragments(product: np.ndarray) -> np.ndarray:
    """A warpgroup's product [64, N] as its lanes hold it: [warp, lane, N / 2]."""
    held = np.empty((4, 32, product.shape[1] // 2), product.dtype)
    for lane in range(32):
        for j in range(product.shape[1] // 8):
            for value in range(4):
                row, column = lane // 4 + 8 * (value // 2), 8 * j + 2 * (lane % 4) + value % 2
                held[:, lane, 4 * j + value] = product[row::16, column]
    return held


@pytest.mark.parametrize(("bn", "rows", "tall"), [(8, 5, 1), (16, 16, 1), (64, 49, 2), (192, 192, 2), (128, 33, 2)])
def test_gated_results_come_out_transposed(bn: int, rows: int, tall: int) -> None:
    """From a warpgroup's fragments over transposed stores to rows of results, each written once."""
    product = np.random.default_rng().integers(1, 2**40, (64 * tall, bn))
    held = [fragments(product[64 * m : 64 * (m + 1)]) for m in range(tall)]
    columns = tall * 32
    chunk_rows, pitch, pieces = min(bn, 32 // tall), columns * 2 + 16, columns // 8
    out = np.zeros((rows, columns), np.int64)
    for start in range(0, bn, chunk_rows):
        if start >= rows:
            continue
        chunk = np.zeros(chunk_rows * pitch // 2, np.int64)
        for i, m, warp, lane in itertools.product(range(0, chunk_rows, 8), range(tall), range(4), range(32)):
            sums = held[m][warp, lane, (start + i) // 2 : (start + i) // 2 + 4]
            for odd, value in enumerate((sums[0] + sums[2], sums[1] + sums[3])):  # stands for the activation
                # transposed: value (row lane / 4, column c) goes to the address of lane c
                to = (2 * (lane % 4) + odd) * pitch + warp * 8 * 2
                chunk[(to + i * pitch + m * 32 * 2) // 2 + lane // 4] = value
        for thread in range(128):
            piece = thread % pieces
            for row in range(thread // pieces, min(chunk_rows, rows - start), 128 // pieces):
                assert not out[start + row, piece * 8 : piece * 8 + 8].any()
                at = row * pitch // 2 + piece * 8
                out[start + row, piece * 8 : piece * 8 + 8] = chunk[at : at + 8]
    wanted = product[:, :rows].T.reshape(rows, 4 * tall, 2, 8).sum(2).reshape(rows, columns)
    assert (out == wanted).all()


def find_all(counts: np.ndarray, bn: int, step: int, group: int, weight_tiles: int) -> list[tuple[int, int, int, int]]:
    """(expert, weight tile, first row, rows) of all tiles by their numbers, as experts_tiles.cuh has them."""
    tiles = -(-counts // bn)
    first_rows = np.cumsum(counts) - counts
    table = [(int(tiles[:e].sum()), e, int(first_rows[e]), int(counts[e])) for e in np.flatnonzero(counts)]
    table.append((int(tiles.sum()), 0, 0, 0))
    found, place = [], 0
    for number in range(table[-1][0] * weight_tiles):
        while table[place + 1][0] * weight_tiles <= number:
            place += 1
        first_tile, expert, first_row, rows = table[place]
        row_tiles = table[place + 1][0] - first_tile
        share = ((rows + row_tiles - 1) // row_tiles + step - 1) // step * step
        which, in_group = divmod(number - first_tile * weight_tiles, group * weight_tiles)
        weight_tile, inside = divmod(in_group, min(group, row_tiles - which * group))
        row = (which * group + inside) * share
        found.append((expert, weight_tile, first_row + row, min(share, rows - row)))
    return found


@pytest.mark.parametrize(("bn", "step"), [(8, 8), (32, 16), (64, 16), (192, 16)])
@pytest.mark.parametrize("weight_tiles", [1, 3, 45])
def test_tiles_cover_every_row_once(bn: int, step: int, weight_tiles: int) -> None:
    rng = np.random.default_rng()
    for experts, most in ((1, 5000), (60, 40), (64, 600), (5, 1)):
        counts = rng.integers(0, most + 1, experts) * (rng.random(experts) < 0.7)
        rows_done = np.zeros((weight_tiles, int(counts.sum())), np.int64)
        owner = np.repeat(np.arange(experts), counts)
        for expert, tile, first, rows in find_all(counts, bn, step, 8 if bn > 128 else 16, weight_tiles):
            assert 0 < rows <= bn and (owner[first : first + rows] == expert).all()
            rows_done[tile, first : first + rows] += 1
        assert (rows_done == 1).all()


def test_what_does_not_fit_goes_to_the_next_or_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice by arguments, on a row of the table that refuses them all."""
    from moeyard.dispatch import table

    def refused(*_: object, **__: object) -> str:
        return "takes nothing"

    monkeypatch.setattr(building, "refused", refused, raising=False)
    row = table.Impl("picky", "moeyard.vectorised.experts:fused_experts_launch", lambda call: None,
                     unfit="moeyard.cuda.runtime.compile:refused")  # fmt: skip
    others = tuple(other for other in table.TABLE["fused_experts"] if other.name in ("torch", "reference"))
    monkeypatch.setitem(table.TABLE, "fused_experts", (row, *others))
    table.launcher.cache_clear()
    weights = ExpertWeights(torch.randn(2, 32, 16), torch.randn(2, 16, 16))
    rows, routing = torch.randn(3, 16), Routing(torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.int32))
    try:
        got = moeyard.fused_experts(rows, routing, weights)
        assert torch.allclose(got, moeyard.fused_experts(rows, routing, weights, impl="reference"), atol=1e-5)
        with pytest.raises(ValueError, match="impl: 'picky' refuses fused_experts: takes nothing"):
            moeyard.fused_experts(rows, routing, weights, impl="picky")
    finally:
        table.launcher.cache_clear()


_PER_ROW, _INT8 = (torch.float8_e4m3fn, ("BY_ROWS", True)), (torch.int8, ("BY_ROWS", True))
_PER_MATRIX, _BLOCKS = (torch.float8_e4m3fn, ("BY_ROWS", False)), (torch.float8_e4m3fn, ("BY_BLOCKS", False))


@pytest.mark.parametrize(
    ("element", "scaling", "first", "rows"),
    [
        (*_PER_ROW, True, 192),
        (*_BLOCKS, True, 64),
        (*_INT8, False, 16),
        *(
            pytest.param(*kind, first, rows, marks=pytest.mark.full)
            for kind in (_PER_ROW, _PER_MATRIX, _INT8, _BLOCKS)
            for first in (True, False)
            for rows in (16, 64, 128, 192)
            if kind != _BLOCKS or rows < 192
        ),
    ],
)
def test_no_product_of_codes_waits_for_the_one_before(
    element: torch.dtype, scaling: tuple[str, bool], first: bool, rows: int, tmp_path: Path
) -> None:
    """The compiler waits for every product if sums are written between them: a step has one wait, a tile one more."""
    blocks = scaling[0] == "BY_BLOCKS"
    plan = product_plan(8192, 64, 1024, first, False, H200, Way(rows=rows), None, scaling[0])
    code, used, text = examined(
        plan, tmp_path, curve="SILU" if first else "IDENTITY", gated=first, gather=first, element=element,
        scaling=scaling, ready=not first and not blocks, as_codes=first and blocks and plan.weight_rows == 256,
    )  # fmt: skip
    assert b"experts_kernel" in code
    if not used:
        pytest.skip("compiles; cuobjdump, which would show more, is neither on the path nor in a Triton wheel")
    stack, local = (int(value) for value in re.findall(r"(?:STACK|LOCAL):(\d+)", used))
    assert (stack, local) == (0, 0), used
    kind = "IGMMA" if element == torch.int8 else "QGMMA"
    products, waits = len(re.findall(rf"\b{kind}\.64x", text)), len(re.findall(r"WARPGROUP\.DEPBAR", text))
    heights = plan.rows // min(plan.rows, 16)
    assert products == 4 * plan.tall * heights
    assert waits == heights * (plan.tall if blocks else 2)


def test_transposed_weights_are_taken_where_they_lie_well() -> None:
    stored = torch.zeros(3, 80, 256, dtype=torch.bfloat16)
    turned = stored.transpose(1, 2)
    assert lies_turned(turned) and not lies_turned(stored)
    assert unreadable_turned(turned, "weight", alone=True) == ""
    assert "beside bias or topk_weights" in unreadable_turned(turned, "weight", alone=False)
    assert "multiples of 16 bytes" in unreadable_turned(stored[:, :, 4:].transpose(1, 2), "weight", alone=True)
    call = Call(torch.device("cuda"), torch.bfloat16, WeightFacts(torch.bfloat16, None, 3, 256, 80, False, "", 0, True))
    assert launches.unfit_for_products(call) is None
    assert call.weights is not None
    narrow = call._replace(weights=call.weights._replace(columns=96))
    assert "a multiple of 64, got 96" in (launches.unfit_for_products(narrow) or "")
    part = stored[:, :, 64:192].transpose(1, 2)
    assert turned_boxes(part, 128) == ((64, 80, 2, 3, 1), (512, 128, 80 * 512, 80 * 512), (64, 64, 2, 1, 1))
