"""The cuda implementation of the row ops: any bytes and strides, quantisation, more than 32 bits, graphs, streams."""

from typing import Any

import pytest
import torch

import moeyard
from moeyard import Layout, Permuted, reference
from moeyard.cuda.runtime.launch import programmatic_launch
from moeyard.dispatch import table
from moeyard.testing import ROUTINGS, guard_broken, poisoned, same_bits

REFUSAL = table.explain("permute", "cuda").reasons["cuda"]
pytestmark = pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}")
CUDA = torch.device("cuda")
MOVED = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.float64,
]
SUMMED = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [  # tokens, hidden, experts, top_k, block
    (0, 16, 4, 2, 1),
    (1, 8, 4, 1, 1),
    (5, 7, 3, 2, 4),
    (33, 129, 9, 4, 16),
    (64, 2880, 8, 2, 1),
    (17, 100, 300, 8, 3),
    (9, 1024, 64, 40, 1),
    (40, 20_004, 16, 12, 8),
    (2000, 256, 128, 8, 1),
]


def draw_layout(tokens: int, experts: int, top_k: int, block: int, routing: str = "dropped") -> Layout:
    ids = torch.empty(0, top_k, dtype=torch.int32)
    if tokens:
        ids = ROUTINGS[routing](tokens, experts, top_k, torch.Generator().manual_seed(tokens))
    return moeyard.moe_align_block_size(ids.cuda(), num_experts=experts, block_size=block)


def draw_rows(tokens: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, (tokens, hidden), dtype=dtype, device="cuda")
    return torch.randn(tokens, hidden, device="cuda").to(dtype)


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", MOVED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_permute_and_shuffle(dtype: torch.dtype, size: tuple[int, int, int, int, int]) -> None:
    tokens, hidden, experts, top_k, block = size
    layout = draw_layout(tokens, experts, top_k, block)
    held = layout.sorted_token_ids < layout.num_routes
    source = (layout.sorted_token_ids[held] // top_k).long()
    wide = draw_rows(tokens, hidden + 3, dtype)
    for rows in (draw_rows(tokens, hidden, dtype), wide[:, 1 : hidden + 1], wide.t().contiguous().t()[:, :hidden]):
        for scales in (
            None,
            torch.rand(tokens, device="cuda"),
            torch.rand(tokens, 57, device="cuda"),
            torch.rand(3, tokens, device="cuda").bfloat16().t(),
        ):
            out = Permuted(
                poisoned((layout.capacity, hidden), dtype, CUDA),
                None if scales is None else poisoned((layout.capacity, *scales.shape[1:]), scales.dtype, CUDA),
            )
            moeyard.permute(rows, layout, scales=scales, out=out, impl="cuda")
            assert torch.equal(as_bytes(out.rows)[held], as_bytes(rows)[source])
            assert bool((as_bytes(out.rows)[~held] == 0x7F).all()), "padding is not written"
            assert not guard_broken(out.rows)
            if scales is not None and out.scales is not None:
                assert torch.equal(out.scales[held], scales[source]) and not guard_broken(out.scales)
        for kind in (torch.int32, torch.int64):
            where = torch.randint(-2, tokens + 2, (41,), dtype=kind, device="cuda")
            result = poisoned((41, hidden), dtype, CUDA)
            moeyard.shuffle_rows(rows, where, out=result, impl="cuda")
            valid = (where >= 0) & (where < tokens)
            assert torch.equal(as_bytes(result)[valid], as_bytes(rows)[where[valid].long()])
            assert not bool(as_bytes(result)[~valid].any()) and not guard_broken(result)


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_sums_have_the_bits_of_eager_torch(dtype: torch.dtype, size: tuple[int, ...], weighted: bool) -> None:
    tokens, hidden, experts, top_k, block = size
    layout = draw_layout(tokens, experts, top_k, block)
    wide = torch.randn(layout.capacity, hidden + 2, device="cuda").to(dtype)
    wide[layout.sorted_token_ids == layout.num_routes] = float("nan")  # padding must not be read
    weights = torch.rand(tokens, top_k, device="cuda") if weighted else None
    if weights is not None:
        weights[layout.route_rows.view(-1, top_k) < 0] = float("nan")  # nor the weight of a dropped route
    for rows in (wide[:, :hidden].contiguous(), wide[:, 1 : hidden + 1]):
        out = poisoned((tokens, hidden), dtype, CUDA)
        moeyard.combine(rows, layout, weights, out=out, impl="cuda")
        assert same_bits(out, moeyard.combine(rows, layout, weights, impl="torch")) and not guard_broken(out)
    stack = torch.randn(tokens, top_k, hidden, device="cuda").to(dtype)
    ids = torch.randint(-2, 7, (tokens, top_k), device="cuda")
    mapping = torch.tensor([0, -1, 1, 2, -1], dtype=torch.int32, device="cuda")
    for call in ({}, {"topk_ids": ids}, {"topk_ids": ids.int(), "expert_map": mapping}):
        for rows in (stack, stack.transpose(0, 1).contiguous().transpose(0, 1), stack.mT.contiguous().mT):
            out = poisoned((tokens, hidden), dtype, CUDA)
            moeyard.moe_sum(rows, out=out, impl="cuda", **call)
            assert same_bits(out, moeyard.moe_sum(rows, impl="torch", **call)) and not guard_broken(out)


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (70, 128, 8, 2, 1), (3, 40_064, 4, 2, 1), (300, 7168, 64, 8, 1)], ids=str)
@pytest.mark.parametrize("group_size", [None, 128])
def test_quantising_permute_has_the_bits_of_the_reference(
    dtype: torch.dtype, size: tuple[int, ...], group_size: int | None
) -> None:
    tokens, hidden, experts, top_k, block = size
    if group_size and hidden % group_size:
        hidden = (hidden // group_size + 1) * group_size
    layout = draw_layout(tokens, experts, top_k, block)
    host = Layout.of([t.cpu() for t in layout.tensors], (experts, experts, block, top_k))
    rows = torch.randn(tokens, hidden + 3, device="cuda") * torch.logspace(-30, 4, hidden + 3, device="cuda")
    if tokens > 3:
        rows[0], rows[1, ::7], rows[2] = 0, -0.0, rows[2] * 1e-8
        rows[3] = torch.linspace(-1.0, 1.0, hidden + 3)  # many ties
    for values in (rows.to(dtype)[:, 1 : hidden + 1], rows.to(dtype)[:, :hidden].contiguous()):
        wanted = reference.permute_to_fp8(values.cpu(), host, group_size=group_size)
        held = host.sorted_token_ids < host.num_routes
        groups = () if group_size is None else (hidden // group_size,)
        for impl in ("cuda", "torch"):
            out = Permuted(
                poisoned((layout.capacity, hidden), torch.float8_e4m3fn, CUDA),
                poisoned((layout.capacity, *groups), torch.float32, CUDA),
            )
            got = moeyard.permute_to_fp8(values, layout, group_size=group_size, out=out, impl=impl)
            assert got.scales is not None and wanted.scales is not None
            assert same_bits(got.scales.cpu()[held], wanted.scales[held]), impl
            assert torch.equal(as_bytes(got.rows.cpu())[held], as_bytes(wanted.rows)[held]), impl
            assert not guard_broken(got.rows) and not guard_broken(got.scales)


@pytest.mark.parametrize("group_size", [None, 128])
def test_quantising_what_is_not_finite(group_size: int | None) -> None:
    layout = draw_layout(6, 2, 1, 1, "independent")
    host = Layout.of([t.cpu() for t in layout.tensors], (2, 2, 1, 1))
    rows = torch.randn(6, 256)
    rows[0, 3], rows[1, 200], rows[2, 5], rows[3, 130] = float("nan"), float("inf"), -float("inf"), 3.4e38
    wanted = reference.permute_to_fp8(rows, host, group_size=group_size)
    got = moeyard.permute_to_fp8(rows.cuda(), layout, group_size=group_size, impl="cuda")
    assert torch.allclose(got.rows.cpu().float(), wanted.rows.float(), rtol=0, atol=0, equal_nan=True)
    assert got.scales is not None and wanted.scales is not None
    assert torch.allclose(got.scales.cpu(), wanted.scales, rtol=0, atol=0, equal_nan=True)


def test_a_row_for_fp8_may_go_to_any_address() -> None:
    layout = draw_layout(20, 4, 2, 1)
    rows = torch.randn(20, 256, device="cuda").bfloat16()
    whole = torch.empty(layout.capacity * 256 + 1, dtype=torch.float8_e4m3fn, device="cuda")
    for group_size, groups in ((None, ()), (128, (2,))):
        odd = Permuted(whole[1:].view(-1, 256), torch.empty(layout.capacity, *groups, device="cuda"))
        got = moeyard.permute_to_fp8(rows, layout, group_size=group_size, out=odd, impl="cuda")
        even = moeyard.permute_to_fp8(rows, layout, group_size=group_size, impl="cuda")
        held = layout.sorted_token_ids < layout.num_routes
        assert torch.equal(as_bytes(got.rows)[held], as_bytes(even.rows)[held])


def test_more_than_32_bits_of_elements() -> None:
    """2^31 elements and more in the rows of permute and combine, and in shuffle_rows."""
    tokens, hidden, top_k = 600_000, 2048, 2
    ids = torch.randint(0, 3, (tokens, top_k), dtype=torch.int32, device="cuda")
    layout = moeyard.moe_align_block_size(ids, num_experts=3, block_size=1)
    rows = torch.randint(0, 100, (tokens, hidden), dtype=torch.uint8, device="cuda")
    moved = moeyard.permute(rows, layout, impl="cuda").rows
    assert moved.numel() > 2**31
    some = torch.randint(0, tokens * top_k, (4096,), device="cuda")
    some[0] = tokens * top_k - 1
    assert torch.equal(moved[some], rows[layout.sorted_token_ids[some].long() // top_k])
    back = moeyard.shuffle_rows(moved, layout.route_rows, impl="cuda")
    assert torch.equal(back[some], rows[some // top_k])
    del back
    halves = moved.half()
    del moved
    total = moeyard.combine(halves, layout, impl="cuda")
    tail = torch.randint(0, tokens, (4096,), device="cuda")
    tail[0] = tokens - 1
    assert torch.equal(total[tail], (2 * rows[tail].float()).half())
    fp8 = moeyard.permute_to_fp8(rows.half(), layout, group_size=128, impl="cuda")
    assert fp8.scales is not None
    wide = fp8.rows[some].float().view(-1, 16, 128) * fp8.scales[some].unsqueeze(2)
    assert torch.allclose(wide.view(-1, hidden), rows[layout.sorted_token_ids[some].long() // 2].float(), rtol=0.07)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_graphs_streams_and_programmatic_launches_give_the_same() -> None:
    ids = ROUTINGS["dropped"](300, 16, 3, torch.Generator().manual_seed(1)).cuda()
    hidden, weights = torch.randn(300, 520, device="cuda").bfloat16(), torch.rand(300, 3, device="cuda")

    def layer() -> list[torch.Tensor]:
        layout = moeyard.moe_align_block_size(ids, num_experts=16, block_size=8, impl="cuda")
        moved = moeyard.permute(hidden, layout, scales=weights, impl="cuda")
        small = moeyard.permute_to_fp8(hidden, layout, impl="cuda")
        total = moeyard.combine(moved.rows, layout, weights, impl="cuda")
        assert small.scales is not None
        held = layout.sorted_token_ids < layout.num_routes
        return [total, torch.where(held, small.scales, 0)]

    wanted = layer()
    torch.cuda.set_sync_debug_mode("error")
    graph: Any = torch.cuda.CUDAGraph()
    try:
        programmatic_launch(True)
        with torch.cuda.graph(graph):
            captured = layer()
    finally:
        programmatic_launch(False)
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(captured, wanted, strict=True))
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams * 2:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(layer())
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for got in results for a, b in zip(got, wanted, strict=True))
