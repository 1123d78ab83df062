"""The triton implementation's layouts, and tensors with strides; test_triton.py runs this under the interpreter."""

from random import Random
from typing import Any

import pytest
import torch

import moeyard
from moeyard import reference
from moeyard.testing import (
    CPU,
    differing,
    draw_routing,
    draw_weights,
    guard_broken,
    interpreted,
    poisoned,
    same_bits,
    sub_batches,
)
from moeyard.triton import experts, steps
from moeyard.values import Activation


def lay_out(ids: torch.Tensor, num_experts: int, local: int, mapping: torch.Tensor | None) -> tuple[Any, int]:
    plan = experts._experts_plan.__wrapped__(
        CPU, torch.bfloat16, ids.dtype, *ids.shape, (local, 16, 16), num_experts, Activation(), True, False,
        16, steps.Lies((512, 16), False), steps.Lies((256, 16), False), 0, 0,
    )  # fmt: skip
    return plan.layout(ids, mapping), plan.gate_up.constants["ROWS"]


def layout_error(
    got: tuple[torch.Tensor, ...], rows: int, ids: torch.Tensor, num_experts: int, local: int, mapping: Any
) -> str | None:
    """What is wrong with a layout and its row tiles; None if nothing is."""
    routes, route_rows, tiles = got
    wanted = reference.moe_align_block_size(
        ids, num_experts=num_experts, block_size=1, expert_map=mapping, num_local_experts=local
    )
    held = int(wanted.expert_counts.sum())
    if not torch.equal(routes[:held], wanted.sorted_token_ids[:held]):
        return "routes"
    if not torch.equal(route_rows[: ids.numel()], wanted.route_rows):
        return "route_rows"
    cut = []
    for expert, (first, count) in enumerate(
        zip(wanted.expert_offsets.tolist(), wanted.expert_counts.tolist(), strict=False)
    ):
        cut += [(expert, first + i, min(rows, count - i)) for i in range(0, count, rows)]
    most = experts.most_row_tiles(ids.numel(), local, rows)
    table = tiles[: 3 * most].view(3, most)
    if [tuple(column) for column in table[:, : len(cut)].t().tolist()] != cut:
        return "tiles"
    return None if bool((table[0, len(cut) :] == -1).all()) else "the end of tiles"


CASES = [  # tokens, top_k, experts, local, mapped
    (1, 1, 1, 1, False),
    (1, 8, 128, 128, False),
    (70, 3, 5, 5, False),
    (33, 2, 40, 7, True),
    (90, 4, 3, 2, False),
    (200, 1, 600, 600, False),
]


@pytest.fixture(params=[4096, 64])
def most_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most routes that one launch lays out; there are chunks of 128 beyond."""
    monkeypatch.setattr(steps, "_MOST_ALONE", request.param)
    monkeypatch.setattr(steps, "_CHUNK", 128)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts(case: tuple[int, int, int, int, bool], most_alone: int) -> None:
    kind = torch.int64 if case[0] % 2 else torch.int32
    tokens, top_k, count, local, mapped = case
    mapping = torch.randint(-2, local + 2, (count,), dtype=torch.int32) if mapped else None
    for ids in (
        torch.randint(-1, count + 2, (tokens, top_k), dtype=kind),
        torch.full((tokens, top_k), -1, dtype=kind),
        torch.full((tokens, top_k), count - 1, dtype=kind),
    ):
        got, rows = lay_out(ids, count, local, mapping)
        assert layout_error(got, rows, ids, count, local, mapping) is None


def test_wrong_layouts_are_seen() -> None:
    ids = torch.arange(120).view(60, 2) % 3
    got, rows = lay_out(ids, 3, 3, None)
    assert layout_error(got, rows, ids, 3, 3, None) is None
    most = experts.most_row_tiles(120, 3, rows)
    last = int((got[2][:most] >= 0).sum())
    for field, place, value, named in (
        (0, 7, 3, "routes"),
        (1, 7, -1, "route_rows"),
        (2, 1, 2, "tiles"),
        (2, most, 1, "tiles"),
        (2, 2 * most, 1, "tiles"),
        (2, last, 0, "the end of tiles"),
    ):
        wrong = [tensor.clone() for tensor in got]
        assert int(wrong[field][place]) != value
        wrong[field][place] = value
        assert layout_error(tuple(wrong), rows, ids, 3, 3, None) == named


@pytest.mark.parametrize("shape", [(48, 40), (64, 128), (100, 70)], ids=str)
def test_tensors_with_strides_and_offsets(shape: tuple[int, int]) -> None:
    """Rows, weights and biases that are parts of larger tensors."""
    size, columns = shape
    rows = torch.randn(30, size + 3).half()[:, 1 : size + 1]
    weight = (torch.randn(4, columns + 2, size + 5) / size**0.5).half()[:, 1 : columns + 1, 2 : size + 2]
    bias = torch.randn(4, columns + 1).half()[:, 1:]
    offsets = torch.tensor([0, 3, 3, 20, 28])
    out = poisoned((30, columns), torch.float16)
    moeyard.grouped_gemm(rows, weight, bias=bias, expert_offsets=offsets, out=out, impl="triton")
    wide = reference.grouped_gemm(rows.double(), weight.double(), bias=bias.double(), expert_offsets=offsets)
    assert torch.allclose(out[:28].double(), wide[:28], atol=3e-3, rtol=2e-3) and not guard_broken(out)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    again = moeyard.grouped_gemm(rows, turned, bias=bias, expert_offsets=offsets, impl="triton")
    assert same_bits(again[:28], out[:28])


def test_more_than_one_launch_of_layout(most_alone: int) -> None:
    tokens, hidden, size = 150, 16, 16
    experts._experts_plan.cache_clear()
    ids = torch.randint(-1, 5, (tokens, 2), dtype=torch.int32)
    weights = moeyard.ExpertWeights(torch.randn(4, 2 * size, hidden) / 4, torch.randn(4, hidden, size) / 4)
    routing, rows = moeyard.Routing(torch.rand(tokens, 2), ids), torch.randn(tokens, hidden)
    got = moeyard.fused_experts(rows, routing, weights, impl="triton")
    experts._experts_plan.cache_clear()
    assert torch.allclose(got, moeyard.fused_experts(rows, routing, weights, impl="torch"), atol=1e-5)


def test_ids_of_both_widths_in_turn() -> None:
    """Plans are kept by the dtype of ids: wide ids read as narrow ones would be other routes."""
    rows, weights = torch.randn(9, 16), moeyard.ExpertWeights(torch.randn(4, 32, 16) / 4, torch.randn(4, 16, 16) / 4)
    ids = torch.randint(-1, 5, (9, 2), dtype=torch.int32)
    for given in (ids, ids.long(), ids.long() + 2**32):
        routing = moeyard.Routing(torch.rand(9, 2), given)
        got = moeyard.fused_experts(rows, routing, weights, impl="triton")
        assert torch.allclose(got, moeyard.fused_experts(rows, routing, weights, impl="torch"), atol=1e-5)


def test_a_step_takes_the_dtypes_of_its_first_call() -> None:
    """It is compiled for them, and looks at none afterwards. Under the interpreter it refuses others."""
    step = experts._activate_step.__wrapped__(torch.float32, 4, 16, 16, False, Activation())
    rows, out = torch.randn(4, 16), torch.empty(4, 16)
    step(rows, out)
    with pytest.raises(ValueError, match=r"step: expected the dtypes \(torch.float32, torch.float32\)"):
        step(rows.half(), out.half())


@pytest.mark.parametrize("gated", [True, False])
def test_rows_of_each_dtype_have_a_step_of_their_own(gated: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = torch.randn(4, 32).to(dtype)
        got = moeyard.activate(rows, gated=gated, impl="triton")
        assert torch.allclose(
            got.float(), moeyard.activate(rows.float(), gated=gated, impl="torch"), rtol=2e-2, atol=2e-2
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_token_depends_on_its_batch(dtype: torch.dtype) -> None:
    """On either side of the tiles that calls of other sizes have; weights count before or after the experts."""
    tokens, on_input = 70, dtype == torch.bfloat16
    weights, routing = draw_weights(3, 64, 48, dtype, bias=True), draw_routing(tokens, 3, 2)

    def call(rows: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        where = moeyard.Routing(factors, ids)
        return moeyard.fused_experts(
            rows, where, weights, batch_invariant=True, apply_router_weight_on_input=on_input, impl="triton"
        )

    tensors = (torch.randn(tokens, 64).to(dtype), routing.topk_weights, routing.topk_ids)
    with interpreted.products_in_order():
        count, wrong, first = differing(call, tensors, sub_batches(tokens, 4, Random(1)))
    assert (count, wrong) == (4, 0), first


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows of dropped routes hold anything
def test_no_gradient_of_a_token_depends_on_its_batch() -> None:
    tokens = 70
    weights, routing = draw_weights(3, 32, 48, torch.float16, bias=True), draw_routing(tokens, 3, 2)

    def call(rows: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        given = [t.clone().requires_grad_() for t in (rows, factors)]
        where = moeyard.Routing(given[1], ids)
        answer = moeyard.fused_experts(given[0], where, weights, batch_invariant=True, save="inputs", impl="triton")
        return torch.cat([one.float() for one in torch.autograd.grad(answer, given, upstream)], 1)

    rows, upstream = (torch.randn(tokens, 32).half() for _ in range(2))
    tensors = (rows, routing.topk_weights, routing.topk_ids, upstream)
    with interpreted.products_in_order():
        count, wrong, first = differing(call, tensors, sub_batches(tokens, 3, Random(1)))
    assert (count, wrong) == (3, 0), first
