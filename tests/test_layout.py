"""Layouts: every implementation against the reference, bit by bit."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moeyard
from moeyard import Layout, reference
from moeyard.cpu import threads
from moeyard.dispatch.sizes import layout_capacity
from moeyard.testing import CPU, ROUTINGS, guard_broken, impls_on, layout_difference, layout_error, poisoned_layout

ALIGN = impls_on("moe_align_block_size", CPU)
BATCHED = impls_on("batched_moe_align_block_size", CPU)
LORA = impls_on("moe_lora_align_block_size", CPU)

SIZES = [  # tokens, top_k, experts, block
    (0, 2, 5, 16),
    (1, 1, 1, 1),
    (1, 8, 256, 16),
    (3, 2, 7, 1),
    (7, 3, 301, 5),
    (31, 2, 8192, 4),
    (97, 5, 13, 48),
    (256, 8, 64, 128),
    (4096, 2, 64, 128),
]


@pytest.mark.parametrize("impl", ALIGN)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("routing", sorted(ROUTINGS))
def test_equals_reference(impl: str, size: tuple[int, int, int, int], routing: str) -> None:
    tokens, top_k, experts, block = size
    if top_k > experts or (tokens == 0 and routing != "uniform"):
        pytest.skip("top_k experts a token need as many experts, and no tokens have no distribution")
    ids = torch.empty(0, top_k, dtype=torch.int32)
    if tokens:
        ids = ROUTINGS[routing](tokens, experts, top_k, torch.Generator().manual_seed(1))
    wanted = reference.moe_align_block_size(ids, num_experts=experts, block_size=block)
    out = poisoned_layout(wanted)
    got = moeyard.moe_align_block_size(ids, num_experts=experts, block_size=block, out=out, impl=impl)
    assert got is out
    assert layout_difference(got, wanted) is None
    assert not any(guard_broken(tensor) for tensor in out.tensors)
    fresh = moeyard.moe_align_block_size(ids, num_experts=experts, block_size=block, impl=impl)
    assert layout_difference(fresh, wanted) is None


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a call, its ids in range or not, its map sending anywhere."""
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, 4))
    tokens = draw(st.integers(0, 20))
    wide = st.sampled_from([-1, experts, 2**31 - 1, -(2**31), 2**31, 2**32, 2**32 + 1, -(2**40)])
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    one = st.integers(-1, experts) if dtype == torch.int32 else st.integers(-1, experts) | wide
    ids = torch.tensor(draw(st.lists(one, min_size=tokens * top_k, max_size=tokens * top_k)), dtype=dtype)
    shape = draw(st.sampled_from(["2-D", "1-D", "strided", "transposed"]))
    if shape == "2-D":
        ids = ids.view(tokens, top_k)
    elif shape == "strided":
        ids = torch.stack([ids, torch.full_like(ids, 99)], 1).flatten().view(tokens, 2 * top_k)[:, ::2]
    elif shape == "transposed":
        ids = ids.view(tokens, top_k).t().contiguous().t()
    call: dict[str, Any] = {"topk_ids": ids, "num_experts": experts, "block_size": draw(st.integers(1, 9))}
    if shape == "1-D" and draw(st.booleans()):
        call["top_k"] = top_k
    if draw(st.booleans()):
        call["num_local_experts"] = draw(st.integers(1, 14))
    if draw(st.booleans()):
        targets = draw(st.lists(st.integers(-2, experts + 1), min_size=experts, max_size=experts))
        call["expert_map"] = torch.tensor(targets, dtype=torch.int32)
    return call


@pytest.mark.parametrize("impl", [impl for impl in ALIGN if impl != "reference"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls())
def test_any_call_equals_reference(impl: str, call: dict[str, Any]) -> None:
    wanted = reference.moe_align_block_size(**call)
    out = poisoned_layout(wanted)
    assert layout_difference(moeyard.moe_align_block_size(**call, impl=impl, out=out), wanted) is None
    assert not any(guard_broken(tensor) for tensor in out.tensors)


@pytest.mark.parametrize("impl", ALIGN)
def test_uint32_ids_are_cast_first(impl: str) -> None:
    ids = torch.tensor([[0, 2**31], [2**32 - 1, 3], [2, 4]], dtype=torch.int64).to(torch.uint32)
    wanted = moeyard.moe_align_block_size(
        torch.tensor([[0, -1], [-1, 3], [2, -1]], dtype=torch.int32), num_experts=4, block_size=2, impl="reference"
    )
    for value in (ids, torch.stack([ids, ids], 2)[:, :, 0]):
        got = moeyard.moe_align_block_size(value, num_experts=4, block_size=2, impl=impl)
        assert layout_difference(got, wanted) is None


def test_worked_example_of_the_docstring() -> None:
    layout = moeyard.moe_align_block_size(torch.tensor([[2, 0], [2, 1], [0, 2]]), num_experts=3, block_size=2)
    assert layout.sorted_token_ids.tolist() == [1, 4, 3, 6, 0, 2, 5, 6, 6, 6][: layout.capacity]
    assert layout.expert_ids.tolist() == [0, 1, 2, 2, -1][: layout.capacity // 2]
    assert layout.num_tokens_post_padded.tolist() == [8]
    assert layout.expert_offsets.tolist() == [0, 2, 4, 8]
    assert layout.expert_counts.tolist() == [2, 1, 3]
    assert layout.route_rows.tolist() == [4, 0, 5, 2, 1, 6]
    assert layout.capacity == 10
    assert repr(layout).startswith("Layout(num_routes=6, capacity=10, num_experts=3")


def test_capacity_is_enough_for_the_worst_routing_and_tight() -> None:
    for routes in (0, 1, 5, 64, 300):
        for experts in (1, 4, 64, 257):
            for block in (1, 3, 16, 128):
                spread = min(routes, experts)  # every touched expert gets one route, one gets the rest
                counts = [1] * (spread - 1) + [routes - spread + 1] * (spread > 0)
                used = sum(-(-count // block) * block for count in counts)
                capacity = layout_capacity(routes, experts, block)
                formula = routes + experts * (block - 1)
                if routes < experts:
                    formula = min(formula, routes * block)
                assert capacity == -(-formula // block) * block >= used


@pytest.mark.skipif("cpu" not in ALIGN, reason="numba is not installed")
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count_parts", lambda amount, least: count)
    monkeypatch.setattr("moeyard.cpu.layout.count_parts", lambda amount, least: count)
    ids = ROUTINGS["dropped"](1001, 37, 3, torch.Generator().manual_seed(0))
    expert_map = torch.randperm(37).int()
    for mapping in (None, expert_map):
        call: dict[str, Any] = {"num_experts": 37, "block_size": 16, "expert_map": mapping}
        wanted = reference.moe_align_block_size(ids, **call)
        out = poisoned_layout(wanted)
        assert layout_difference(moeyard.moe_align_block_size(ids, **call, impl="cpu", out=out), wanted) is None


@pytest.mark.parametrize("impl", [impl for impl in ALIGN if impl != "reference"])
def test_calls_from_many_threads_at_once(impl: str) -> None:
    inputs = [ROUTINGS["uniform"](70_000, 64, 4, torch.Generator().manual_seed(i)) for i in range(6)]
    alone = [moeyard.moe_align_block_size(ids, num_experts=64, block_size=32, impl=impl) for ids in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            together = list(
                pool.map(
                    lambda ids: moeyard.moe_align_block_size(ids, num_experts=64, block_size=32, impl=impl), inputs
                )
            )
            assert all(layout_difference(a, b) is None for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("impl", BATCHED)
@pytest.mark.parametrize("block", [1, 8, 48])
@pytest.mark.parametrize(
    ("counts", "rows"),
    [([2, 3, 0, 6, 8], 8), ([0, 0], 5), ([13], 13), ([-3, 99, 4], 7), ([0], 0), ([5, 0] * 40, 512)],
    ids=str,
)
def test_batched_equals_reference(impl: str, block: int, counts: list[int], rows: int) -> None:
    given = torch.tensor(counts, dtype=torch.int32)
    wanted = reference.batched_moe_align_block_size(given, max_num_tokens=rows, block_size=block)
    out = poisoned_layout(wanted)
    strided = torch.stack([given, given], 1)[:, 0]
    for value in (given, strided):
        got = moeyard.batched_moe_align_block_size(value, max_num_tokens=rows, block_size=block, impl=impl, out=out)
        assert layout_difference(got, wanted) is None
    assert not any(guard_broken(tensor) for tensor in out.tensors)


@pytest.mark.parametrize("impl", LORA)
@pytest.mark.parametrize("mapped", [False, True])
def test_lora_layouts_are_those_of_masked_ids(impl: str, mapped: bool) -> None:
    ids = ROUTINGS["dropped"](50, 9, 3, torch.Generator().manual_seed(0))
    adapter = torch.randint(-1, 5, (50,), dtype=torch.int32)
    call: dict[str, Any] = {"num_experts": 9, "block_size": 4, "expert_map": None}
    if mapped:
        call |= {"expert_map": torch.tensor([0, -1, 1, -1, 2, 3, -1, 4, 9], dtype=torch.int32), "num_local_experts": 5}
    layouts = moeyard.moe_lora_align_block_size(ids, adapter, max_loras=4, **call, impl=impl)
    assert len(layouts) == 4
    for lora, got in enumerate(layouts):
        masked = torch.where((adapter == lora).unsqueeze(1), ids, -1)
        assert layout_difference(got, reference.moe_align_block_size(masked, **call)) is None


BAD_CALLS = [
    ({"topk_ids": [1, 2]}, TypeError, r"topk_ids: expected a torch.Tensor, got list"),
    ({"topk_ids": torch.zeros(3, 2)}, TypeError, r"topk_ids: expected dtype int32 or int64 or uint32, got float32"),
    (
        {"topk_ids": torch.zeros(3, 2, 2, dtype=torch.int32)},
        ValueError,
        r"topk_ids: expected a 1-D or 2-D .*\(3, 2, 2\)",
    ),
    ({"topk_ids": torch.zeros(3, 0, dtype=torch.int32)}, ValueError, r"topk_ids.shape\[1\]: expected .* got 0"),
    ({"block_size": -8}, ValueError, r"block_size: expected an integer in \[1, \d+\], got -8"),
    ({"block_size": 0}, ValueError, r"block_size: .* got 0"),
    ({"block_size": 16.0}, TypeError, r"block_size: expected an int, got float \(16.0\)"),
    ({"block_size": True}, TypeError, r"block_size: expected an int, got bool"),
    ({"num_experts": 0}, ValueError, r"num_experts: expected an integer in \[1, 8192\], got 0"),
    ({"num_experts": 8193}, ValueError, r"num_experts: expected an integer in \[1, 8192\], got 8193"),
    ({"num_local_experts": 0}, ValueError, r"num_local_experts: .* got 0"),
    ({"top_k": 3}, ValueError, r"top_k: expected 2 \(topk_ids is \(3, 2\)\), got 3"),
    ({"topk_ids": torch.zeros(5, dtype=torch.int32), "top_k": 2}, ValueError, r"multiple of top_k=2 ids, got 5"),
    ({"expert_map": torch.zeros(4)}, TypeError, r"expert_map: expected dtype int32, got float32"),
    (
        {"expert_map": torch.zeros(3, dtype=torch.int32)},
        ValueError,
        r"expert_map: expected shape \(4,\) \(num_experts\)",
    ),
    (
        {"expert_map": torch.zeros(4, dtype=torch.int32, device="meta")},
        ValueError,
        r"expert_map: .*on cpu, got one on meta",
    ),
    ({"impl": "cuda-magic"}, ValueError, r"impl: expected 'auto' or one of .* got 'cuda-magic'"),
    ({"out": 3}, TypeError, r"out: expected a Layout, got int"),
    (
        {"out": moeyard.empty_layout(6, num_experts=4, block_size=8, top_k=2)},
        ValueError,
        r"out: expected .*16, 2\), got",
    ),
    ({"out": moeyard.empty_layout(5, num_experts=4, block_size=16, top_k=2)}, ValueError, r"out\..*: expected shape"),
    ({"block_size": 2**30}, ValueError, r"block_size: expected a capacity of at most 2147483647 slots"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD_CALLS, ids=[m for *_, m in BAD_CALLS])
def test_bad_input_names_the_argument(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"topk_ids": torch.zeros(3, 2, dtype=torch.int32), "num_experts": 4, "block_size": 16}
    with pytest.raises(kind, match=message):
        moeyard.moe_align_block_size(**(call | wrong))


def test_sizes_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        moeyard.moe_align_block_size(torch.zeros(3, 2, dtype=torch.int32), 4, 16)  # type: ignore[misc]


def test_bad_input_of_the_others() -> None:
    counts = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="expert_num_tokens: expected dtype int32, got int64"):
        moeyard.batched_moe_align_block_size(counts.long(), max_num_tokens=4, block_size=8)
    with pytest.raises(ValueError, match=r"max_num_tokens: expected an integer .* got -1"):
        moeyard.batched_moe_align_block_size(counts, max_num_tokens=-1, block_size=8)
    ids = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"token_lora_mapping: expected shape \(3,\)"):
        moeyard.moe_lora_align_block_size(ids, torch.zeros(4).int(), num_experts=4, block_size=8, max_loras=1)
    with pytest.raises(ValueError, match=r"impl: .* 'reference'.* got 'cpu'"):
        moeyard.moe_lora_align_block_size(ids, counts, num_experts=4, block_size=8, max_loras=1, impl="cpu")


def test_an_implementation_by_name_is_met_or_refused() -> None:
    ids = torch.zeros(3, 2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="impl: 'cpu' refuses moe_align_block_size: takes CPU tensors, got meta"):
        moeyard.moe_align_block_size(ids, num_experts=4, block_size=8, impl="cpu")


@pytest.mark.full
@pytest.mark.parametrize("impl", [impl for impl in ALIGN if impl != "reference"])
@pytest.mark.parametrize("routing", ["independent", "dropped"])
def test_sixteen_million_ids(impl: str, routing: str) -> None:
    ids = torch.randint(-2 if routing == "dropped" else 0, 66 if routing == "dropped" else 64, (2**23, 2)).int()
    layout = moeyard.moe_align_block_size(ids, num_experts=64, block_size=128, impl=impl)
    got = dict(zip(Layout.TENSORS, layout.tensors, strict=True))
    assert layout_error(ids, 64, 128, got, stable=True) is None


@pytest.mark.full
@pytest.mark.parametrize("impl", [impl for impl in ALIGN if impl != "reference"])
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls())
def test_very_many_calls_equal_reference(impl: str, call: dict[str, Any]) -> None:
    assert (
        layout_difference(moeyard.moe_align_block_size(**call, impl=impl), reference.moe_align_block_size(**call))
        is None
    )


def test_layouts_can_be_copied_and_pickled() -> None:
    layout = moeyard.moe_align_block_size(torch.tensor([[2, 0], [2, 1]]), num_experts=3, block_size=2)
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert layout_difference(other, layout) is None
        assert other.route_rows.data_ptr() != layout.route_rows.data_ptr()
