"""Every operator and implementation reads its inputs wherever they lie: strided, offset, expanded, transposed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard import ExpertWeights, Layout, Permuted, Routing
from moeyard.dispatch import table
from moeyard.testing import CPU, impls_on, same_bits

Call = Callable[..., Any]


def every_other(t: Tensor) -> Tensor:
    """Values two elements apart, with poison between them."""
    room = torch.full((*t.shape, 2), 99, dtype=torch.float32).to(t.dtype)
    room[..., 1] = t
    return room[..., 1]


def columns(t: Tensor) -> Tensor:
    """Columns of a wider tensor."""
    room = torch.full((*t.shape[:-1], 3 * t.shape[-1]), 99, dtype=torch.float32).to(t.dtype)
    room[..., t.shape[-1] : 2 * t.shape[-1]] = t
    return room[..., t.shape[-1] : 2 * t.shape[-1]]


def off_by_one(t: Tensor) -> Tensor:
    """Dense, from the second element of its storage on."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return room.copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The first axis is the fastest."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def expanded(t: Tensor) -> Tensor:
    """One element (of 1-D tensors) or one row for all: other values, no memory."""
    return t[:1].expand(t.shape)


LIES = (every_other, columns, off_by_one, transposed, expanded)


def tensors(answer: Any) -> Iterator[Tensor]:
    """The tensors of an answer, in order."""
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, Layout):
        yield from answer.tensors
    elif isinstance(answer, Permuted):
        yield from (t for t in (answer.rows, answer.scales) if t is not None)
    elif isinstance(answer, Routing):
        yield from (answer.topk_weights, answer.topk_ids)
    else:
        for one in answer:
            yield from tensors(one)


EXPERTS = 8


def align(impl: str, topk_ids: Tensor, expert_map: Tensor) -> Any:
    sizes: Any = {"num_experts": EXPERTS, "block_size": 4, "impl": impl}
    return (
        moeyard.moe_align_block_size(topk_ids, **sizes),
        moeyard.moe_align_block_size(topk_ids, expert_map=expert_map, **sizes),
    )


def align_flat(impl: str, topk_ids: Tensor) -> Any:
    return moeyard.moe_align_block_size(topk_ids, num_experts=EXPERTS, block_size=1, top_k=2, impl=impl)


def batched(impl: str, expert_num_tokens: Tensor) -> Any:
    return moeyard.batched_moe_align_block_size(expert_num_tokens, max_num_tokens=5, block_size=4, impl=impl)


def lora(impl: str, topk_ids: Tensor, token_lora_mapping: Tensor) -> Any:
    return moeyard.moe_lora_align_block_size(
        topk_ids, token_lora_mapping, num_experts=EXPERTS, block_size=4, max_loras=2, impl=impl
    )


def layout_of(tokens: int) -> Layout:
    """A layout without padding slots, so that every row of every answer is defined."""
    ids = torch.stack([torch.arange(tokens) % EXPERTS, (torch.arange(tokens) + 3) % EXPERTS], 1).int()
    return moeyard.moe_align_block_size(ids, num_experts=EXPERTS, block_size=1, impl="reference")


def permute(impl: str, hidden_states: Tensor, scales: Tensor) -> Any:
    return moeyard.permute(hidden_states, layout_of(hidden_states.shape[0]), scales=scales, impl=impl)


def permute_to_fp8(impl: str, hidden_states: Tensor) -> Any:
    return moeyard.permute_to_fp8(hidden_states, layout_of(hidden_states.shape[0]), impl=impl)


def shuffle_rows(impl: str, input: Tensor, dst2src_map: Tensor) -> Any:
    return moeyard.shuffle_rows(input, dst2src_map, impl=impl)


def combine(impl: str, rows: Tensor, topk_weights: Tensor) -> Any:
    return moeyard.combine(rows, layout_of(topk_weights.shape[0]), topk_weights, impl=impl)


def moe_sum(impl: str, rows: Tensor, topk_ids: Tensor) -> Any:
    return moeyard.moe_sum(rows, topk_ids=topk_ids, impl=impl)


def route(impl: str, router_logits: Tensor, selection_bias: Tensor, is_padding: Tensor) -> Any:
    return moeyard.route(
        router_logits, top_k=2, selection_bias=selection_bias, is_padding=is_padding, scoring="sigmoid", impl=impl
    )


def gemm_by_layout(impl: str, rows: Tensor, weight: Tensor, bias: Tensor, topk_weights: Tensor) -> Any:
    return moeyard.grouped_gemm(
        rows, weight, bias=bias, topk_weights=topk_weights, layout=layout_of(rows.shape[0]), impl=impl
    )


def gemm_by_offsets(impl: str, rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Any:
    return moeyard.grouped_gemm(rows, weight, expert_offsets=expert_offsets, impl=impl)[: int(expert_offsets[-1])]


def gemm_by_counts(impl: str, rows: Tensor, weight: Tensor, expert_num_tokens: Tensor) -> Any:
    whole = moeyard.grouped_gemm(rows, weight, expert_num_tokens=expert_num_tokens, impl=impl)
    most = rows.shape[1]
    return [whole[e, : int(n)] for e, n in enumerate(expert_num_tokens.clamp(0, most))]


def activate(impl: str, rows: Tensor) -> Any:
    return moeyard.activate(rows, impl=impl)


def fused_experts(
    impl: str, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, w13: Tensor, w2: Tensor, w13_bias: Tensor
) -> Any:
    weights = ExpertWeights(w13, w2, w13_bias)
    return moeyard.fused_experts(hidden_states, Routing(topk_weights, topk_ids), weights, impl=impl)


def ids_of(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(tokens, EXPERTS).argsort(1)[:, :2].to(dtype)


CASES: dict[str, tuple[str, Call, Callable[[int, torch.dtype], list[Tensor]]]] = {
    # a name: the op, the call, and its tensors for so many tokens
    **{
        f"align {str(dtype).removeprefix('torch.')}": (
            "moe_align_block_size",
            align,
            lambda n, _, dtype=dtype: [ids_of(n, dtype), torch.randperm(EXPERTS).int()],  # type: ignore[misc]
        )
        for dtype in (torch.int32, torch.int64, torch.uint32)
    },
    "align flat": ("moe_align_block_size", align_flat, lambda n, _: [ids_of(n, torch.int32).flatten()]),
    "batched": (
        "batched_moe_align_block_size",
        batched,
        lambda n, _: [torch.randint(0, 6, (min(n, 64),), dtype=torch.int32)],
    ),
    "lora": (
        "moe_lora_align_block_size",
        lora,
        lambda n, _: [ids_of(n, torch.int32), torch.randint(-1, 3, (n,), dtype=torch.int32)],
    ),
    "permute": ("permute", permute, lambda n, dtype: [torch.randn(n, 16).to(dtype), torch.rand(n, 2)]),
    "permute_to_fp8": ("permute_to_fp8", permute_to_fp8, lambda n, dtype: [torch.randn(n, 16).to(dtype)]),
    "shuffle_rows": (
        "shuffle_rows",
        shuffle_rows,
        lambda n, dtype: [torch.randn(n, 16).to(dtype), torch.randint(-1, n, (n,), dtype=torch.int32)],
    ),
    "combine": ("combine", combine, lambda n, dtype: [torch.randn(2 * n, 16).to(dtype), torch.rand(n, 2)]),
    "moe_sum": ("moe_sum", moe_sum, lambda n, dtype: [torch.randn(n, 2, 16).to(dtype), ids_of(n, torch.int32)]),
    "route": (
        "route",
        route,
        lambda n, dtype: [torch.randn(n, EXPERTS).to(dtype), torch.randn(EXPERTS), torch.rand(n) < 0.1],
    ),
    "grouped_gemm by layout": (
        "grouped_gemm",
        gemm_by_layout,
        lambda n, dtype: [
            torch.randn(n, 16).to(dtype),
            torch.randn(EXPERTS, 24, 16).to(dtype),
            torch.randn(EXPERTS, 24).to(dtype),
            torch.rand(n, 2),
        ],
    ),
    "grouped_gemm by offsets": (
        "grouped_gemm",
        gemm_by_offsets,
        lambda n, dtype: [
            torch.randn(n, 16).to(dtype),
            torch.randn(EXPERTS, 24, 16).to(dtype),
            torch.linspace(0, n, EXPERTS + 1).long(),
        ],
    ),
    "grouped_gemm by counts": (
        "grouped_gemm",
        gemm_by_counts,
        lambda n, dtype: [
            torch.randn(EXPERTS, n // EXPERTS + 1, 16).to(dtype),
            torch.randn(EXPERTS, 24, 16).to(dtype),
            torch.randint(0, n // EXPERTS + 1, (EXPERTS,), dtype=torch.int32),
        ],
    ),
    "activate": ("activate", activate, lambda n, dtype: [torch.randn(n, 16).to(dtype)]),
    "fused_experts": (
        "fused_experts",
        fused_experts,
        lambda n, dtype: [
            torch.randn(n, 16).to(dtype),
            torch.rand(n, 2),
            ids_of(n, torch.int32),
            torch.randn(EXPERTS, 24, 16).to(dtype),
            torch.randn(EXPERTS, 16, 12).to(dtype),
            torch.randn(EXPERTS, 24).to(dtype),
        ],
    ),
}
TOKENS = (3, 600)
"""Below and above what vectors of ids (256 routes) and small chunks of rows take."""


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("tokens", TOKENS)
def test_inputs_lie_anywhere(case: str, tokens: int) -> None:
    op, call, make = CASES[case]
    for impl in impls_on(op, CPU):
        if impl == "triton":  # its kernels are interpreted one by one: tests/test_triton.py
            continue
        given = make(tokens, torch.bfloat16)
        for at, lie in [(i, lie) for i in range(len(given)) for lie in LIES]:
            moved = list(given)
            moved[at] = lie(given[at])
            dense = [t.contiguous() for t in moved]
            pairs = zip(tensors(call(impl, *moved)), tensors(call(impl, *dense)), strict=True)
            assert all(same_bits(a, b) for a, b in pairs), f"{impl}: argument {at} {lie.__name__}"


@pytest.mark.parametrize("case", sorted(CASES))
def test_inputs_lie_anywhere_for_threads(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A threaded call gives the bits of one thread on dense inputs."""
    op, call, make = CASES[case]
    if "cpu" not in table.impl_names(op):
        pytest.skip(f"{op} has no cpu implementation")
    given = make(300, torch.bfloat16)
    for at, lie in [(i, lie) for i in range(len(given)) for lie in LIES]:
        moved = list(given)
        moved[at] = lie(given[at])
        wanted = list(tensors(call("cpu", *(t.contiguous() for t in moved))))
        with monkeypatch.context() as patched:
            for module in ("layout", "rows", "router", "products", "experts"):
                patched.setattr(f"moeyard.cpu.{module}.count_parts", lambda amount, least: 3 if amount > 3 else 1)
            got = list(tensors(call("cpu", *moved)))
        pairs = zip(got, wanted, strict=True)
        assert all(same_bits(a, b) for a, b in pairs), f"argument {at} {lie.__name__}"
