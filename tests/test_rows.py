"""Permute, shuffle_rows, combine and moe_sum: movement bit by bit, sums against float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moeyard
from moeyard import Layout, Permuted, reference
from moeyard.testing import CPU, ROUTINGS, guard_broken, impls_on, largest_and_rms, no_worse, poisoned, same_bits

MOVED = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.float64,
]
SUMMED = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [
    (0, 16, 4, 2, 1),
    (1, 1, 3, 1, 1),
    (5, 7, 3, 2, 4),
    (33, 129, 9, 4, 16),
    (64, 2048, 8, 2, 1),
    (17, 100, 300, 8, 3),
]


def draw_rows(tokens: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, (tokens, hidden), dtype=dtype)
    return torch.randn(tokens, hidden).to(dtype)


def draw_layout(tokens: int, experts: int, top_k: int, block: int, routing: str = "dropped") -> Layout:
    ids = torch.empty(0, top_k, dtype=torch.int32)
    if tokens:
        ids = ROUTINGS[routing](tokens, experts, top_k, torch.Generator().manual_seed(torch.initial_seed() % 2**31))
    return moeyard.moe_align_block_size(ids, num_experts=experts, block_size=block)


@pytest.mark.parametrize("impl", impls_on("permute", CPU))
@pytest.mark.parametrize("dtype", MOVED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_permute_moves_every_row(impl: str, dtype: torch.dtype, size: tuple[int, int, int, int, int]) -> None:
    tokens, hidden, experts, top_k, block = size
    layout = draw_layout(tokens, experts, top_k, block)
    held = layout.sorted_token_ids < layout.num_routes
    wide = draw_rows(tokens, hidden + 3, dtype)
    for rows in (draw_rows(tokens, hidden, dtype), wide[:, 1 : hidden + 1], wide.t().contiguous().t()[:, :hidden]):
        for scales in (None, torch.rand(tokens), torch.rand(tokens, 3), torch.rand(3, tokens).bfloat16().t()):
            wanted = reference.permute(rows, layout, scales=scales)
            out = Permuted(
                poisoned((layout.capacity, hidden), dtype),
                None if scales is None else poisoned((layout.capacity, *scales.shape[1:]), scales.dtype),
            )
            got = moeyard.permute(rows, layout, scales=scales, out=out, impl=impl)
            assert got is out
            assert same_bits(got.rows[held], wanted.rows[held])
            assert not guard_broken(out.rows)
            if scales is not None:
                assert got.scales is not None and wanted.scales is not None
                assert same_bits(got.scales[held], wanted.scales[held]) and not guard_broken(got.scales)


@pytest.mark.parametrize("impl", [impl for impl in impls_on("permute", CPU) if impl != "reference"])
def test_large_permute_and_combine_take_the_streaming_path(impl: str) -> None:
    layout = draw_layout(3000, 8, 2, 1)
    rows = draw_rows(3000, 2048, torch.bfloat16)  # 24 MiB of output, beyond where streaming stores begin
    out = Permuted(poisoned((layout.capacity, 2048), torch.bfloat16), None)
    moeyard.permute(rows, layout, out=out, impl=impl)
    held = layout.sorted_token_ids < layout.num_routes
    assert same_bits(out.rows[held], rows[layout.sorted_token_ids[held].long() // 2]) and not guard_broken(out.rows)
    weights = torch.rand(3000, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        moved = torch.where(held.unsqueeze(1), out.rows, 0).to(dtype)
        got = moeyard.combine(moved, layout, weights, out=poisoned((3000, 2048), dtype), impl=impl)
        alone = moeyard.combine(moved, layout, weights, impl="torch")
        assert same_bits(got, alone)


@pytest.mark.parametrize("impl", impls_on("shuffle_rows", CPU))
@pytest.mark.parametrize("dtype", MOVED, ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", [(0, 4, 5), (3, 1, 0), (9, 33, 40), (7, 0, 3)], ids=str)
def test_shuffle_rows(impl: str, dtype: torch.dtype, kind: torch.dtype, size: tuple[int, int, int]) -> None:
    rows, hidden, results = size
    source = draw_rows(rows, hidden, dtype)
    where = torch.randint(-2, rows + 2, (results,), dtype=kind)
    out = poisoned((results, hidden), dtype)
    got = moeyard.shuffle_rows(source, where, out=out, impl=impl)
    assert got is out and same_bits(got, reference.shuffle_rows(source, where)) and not guard_broken(out)
    assert same_bits(moeyard.shuffle_rows(source, where, impl=impl), got)


def honest_combine(rows: torch.Tensor, layout: Layout, weights: torch.Tensor | None) -> torch.Tensor:
    """The same sum as eager torch does it in float32."""
    table = layout.route_rows.view(-1, layout.top_k)
    total = torch.zeros(table.shape[0], rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    for k in range(layout.top_k):
        valid = table[:, k] >= 0
        taken = rows[table[valid, k].long()].to(total.dtype)
        total[valid] += taken if weights is None else taken * weights[valid, k : k + 1]
    return total.to(rows.dtype)


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_combine_is_as_exact_as_honest_torch(dtype: torch.dtype, size: tuple[int, ...], weighted: bool) -> None:
    tokens, hidden, experts, top_k, block = size
    layout = draw_layout(tokens, experts, top_k, block)
    rows = moeyard.permute(draw_rows(tokens, hidden, dtype), layout).rows
    rows[layout.sorted_token_ids == layout.num_routes] = float("nan")  # padding must not be read
    weights = torch.rand(tokens, top_k) if weighted else None
    if weights is not None:
        weights[layout.route_rows.view(-1, top_k) < 0] = float("nan")  # nor the weight of a dropped route
    wide = reference.combine(rows.double(), layout, weights)
    for impl in impls_on("combine", CPU, dtype):
        out = poisoned((tokens, hidden), dtype)
        got = moeyard.combine(rows, layout, weights, out=out, impl=impl)
        assert got is out and not guard_broken(out)
        assert no_worse(got, honest_combine(rows, layout, weights), wide), impl
        if impl != "reference":  # documented: products and sums in float32, in k order, each rounded
            assert same_bits(got, honest_combine(rows, layout, weights)), impl


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("masked", ["no", "ids", "map"])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_moe_sum(dtype: torch.dtype, masked: str, layout: str) -> None:
    for tokens, top_k, hidden in ((0, 2, 8), (1, 1, 1), (33, 6, 511), (5, 9, 128)):
        rows = torch.randn(tokens, top_k, hidden).to(dtype)
        if layout == "strided":
            rows = torch.randn(tokens, hidden, top_k).to(dtype).transpose(1, 2)
        ids = torch.randint(-1, 6, (tokens, top_k), dtype=torch.int64) if masked != "no" else None
        mapping = torch.tensor([0, -1, 1, 2, -1], dtype=torch.int32) if masked == "map" else None
        wide = reference.moe_sum(rows.double(), topk_ids=ids, expert_map=mapping)
        poison = rows.clone()
        if ids is not None:
            dropped = reference.local_experts(ids, 2**31 if mapping is None else 5, mapping, 2**31)
            poison[(torch.tensor(dropped, dtype=torch.int64) < 0).view(tokens, top_k)] = float("nan")
            rows = poison if layout == "contiguous" else poison.transpose(1, 2).contiguous().transpose(1, 2)
        for impl in impls_on("moe_sum", CPU, dtype):
            out = poisoned((tokens, hidden), dtype)
            got = moeyard.moe_sum(rows, topk_ids=ids, expert_map=mapping, out=out, impl=impl)
            assert got is out and not guard_broken(out)
            if wide.numel():
                sums_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
                size = float(torch.where(rows.isnan(), 0, rows).double().abs().sum(1).max())
                allowed = size * (top_k * sums_eps + 0.51 * torch.finfo(dtype).eps)
                assert largest_and_rms(got, wide)[0] <= allowed, impl
            if ids is not None and tokens:
                unsigned = ids.int().view(torch.uint32)
                assert same_bits(moeyard.moe_sum(rows, topk_ids=unsigned, expert_map=mapping, impl=impl), got)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 12),
    hidden=st.integers(1, 70),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 5),
    block=st.integers(1, 6),
    dtype=st.sampled_from(SUMMED),
)
def test_combine_undoes_permute(tokens: int, hidden: int, experts: int, top_k: int, block: int, dtype: Any) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, top_k), dtype=torch.int32)
    layout = moeyard.moe_align_block_size(ids, num_experts=experts, block_size=block)
    rows = torch.randint(-8, 9, (tokens, hidden)).to(dtype)
    kept = ((ids >= 0) & (ids < experts)).sum(1, keepdim=True)
    moved = moeyard.permute(rows, layout).rows
    assert torch.equal(moeyard.combine(moved, layout), (rows * kept).to(dtype))  # small integers: exact


@pytest.mark.parametrize("impl", [impl for impl in impls_on("combine", CPU) if impl != "reference"])
def test_special_values_pass_through(impl: str) -> None:
    layout = moeyard.moe_align_block_size(torch.zeros(40, 1, dtype=torch.int32), num_experts=1, block_size=1)
    special = [float("nan"), float("inf"), -float("inf"), -0.0, 3.4e38, 1e-40, 65504.0, 6e-8, 1.0039, 1.0117]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = torch.tensor(special * 4).to(dtype).unsqueeze(1).repeat(1, 40)
        assert torch.allclose(moeyard.combine(rows, layout, impl=impl), rows, rtol=0, atol=0, equal_nan=True)
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        if dtype == torch.bfloat16:  # every bfloat16 survives widening and rounding
            one = moeyard.moe_align_block_size(torch.zeros(1, 1, dtype=torch.int32), num_experts=1, block_size=1)
            assert torch.allclose(
                moeyard.combine(every[None], one, impl=impl), every[None], rtol=0, atol=0, equal_nan=True
            )


def test_rows_that_need_gradients_get_them() -> None:
    layout = draw_layout(12, 5, 3, 4)
    hidden = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(12, 3, requires_grad=True)
    table = layout.route_rows.view(12, 3)
    rows = moeyard.permute(hidden, layout).rows
    factor = torch.randn(1, 6, dtype=torch.float64)
    got = moeyard.combine(rows * factor, layout, weights)
    plain = ((table >= 0).double() * weights).sum(1, keepdim=True) * hidden * factor
    assert torch.allclose(got, plain, rtol=1e-12)
    upstream = torch.randn_like(plain)
    mine = torch.autograd.grad(got, (hidden, weights), upstream)
    theirs = torch.autograd.grad(plain, (hidden, weights), upstream)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_gradients_of_the_other_row_ops() -> None:
    rows = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, -1, 1], [2, 2, -1], [-1, -1, -1], [0, 1, 2]])
    mapping = torch.tensor([0, -1, 1], dtype=torch.int32)
    for call in ({}, {"topk_ids": ids}, {"topk_ids": ids, "expert_map": mapping}):
        assert torch.autograd.gradcheck(lambda r, c=call: moeyard.moe_sum(r, **c), (rows,))
    source = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: moeyard.shuffle_rows(s, torch.tensor([3, -1, 0, 3, 9])), (source,))
    layout = draw_layout(4, 3, 2, 3)
    held = (layout.sorted_token_ids < layout.num_routes).unsqueeze(1)
    assert torch.autograd.gradcheck(lambda s: torch.where(held, moeyard.permute(s, layout).rows, 0), (source,))


def test_bad_rows_name_the_argument() -> None:
    layout = draw_layout(6, 4, 2, 8)
    hidden, rows = torch.zeros(6, 8), torch.zeros(layout.capacity, 8)
    bad: list[tuple[Any, type[Exception], str]] = [
        (
            lambda: moeyard.permute(hidden[:5], layout),
            ValueError,
            r"hidden_states: expected shape \(6, 8\) \(the tokens",
        ),
        (lambda: moeyard.permute(hidden[0], layout), ValueError, r"hidden_states: expected a 2-D tensor"),
        (lambda: moeyard.permute(hidden, layout, scales=torch.ones(5)), ValueError, r"scales: expected shape \(6,\)"),
        (
            lambda: moeyard.permute(hidden, layout, scales=torch.ones(6, requires_grad=True)),
            ValueError,
            "scales: expected a tensor that needs no gradient",
        ),
        (lambda: moeyard.permute(hidden, layout, out=rows), TypeError, "out: expected a Permuted, got Tensor"),
        (
            lambda: moeyard.permute(hidden, layout, out=Permuted(rows.half(), None)),
            TypeError,
            "out.rows: expected dtype float32, got float16",
        ),
        (
            lambda: moeyard.permute(hidden, layout, out=Permuted(rows, torch.ones(2))),
            ValueError,
            "out.scales: expected None",
        ),
        (lambda: moeyard.combine(rows[1:], layout), ValueError, r"rows: expected shape"),
        (lambda: moeyard.combine(rows.int(), layout), TypeError, r"rows: expected dtype .* got int32"),
        (
            lambda: moeyard.combine(rows, layout, torch.ones(6, 2).half()),
            TypeError,
            "topk_weights: expected dtype float32",
        ),
        (lambda: moeyard.combine(rows, layout, torch.ones(2, 6)), ValueError, r"topk_weights: expected shape \(6, 2\)"),
        (lambda: moeyard.combine(rows, layout, out=hidden.t()), ValueError, r"out: expected shape \(6, 8\)"),
        (lambda: moeyard.combine(rows, layout, out=torch.zeros(8, 6).t()), ValueError, "out: expected a contiguous"),
        (
            lambda: moeyard.combine(rows.double(), layout, impl="cpu"),
            ValueError,
            "impl: 'cpu' refuses combine: computes in float32",
        ),
        (lambda: moeyard.moe_sum(rows), ValueError, "rows: expected a 3-D tensor"),
        (
            lambda: moeyard.moe_sum(rows[None], expert_map=torch.zeros(3, dtype=torch.int32)),
            ValueError,
            "topk_ids: expected ids beside expert_map, got None",
        ),
        (
            lambda: moeyard.moe_sum(torch.zeros(2, 3, 4), topk_ids=torch.zeros(3, 2, dtype=torch.int32)),
            ValueError,
            r"topk_ids: expected shape \(2, 3\)",
        ),
        (lambda: moeyard.shuffle_rows(hidden, torch.zeros(3)), TypeError, "dst2src_map: expected dtype int32 or int64"),
    ]
    for call, kind, message in bad:
        with pytest.raises(kind, match=message):
            call()
