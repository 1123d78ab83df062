"""topk_ids -> Layout: where every route goes, padded to blocks of one expert.

The operators follow vLLM's `moe_align_block_size` family (csrc/moe/moe_align_sum_kernels.cu), with a stable
order, the inverse map and the expert offsets in the same answer.
"""

import torch
from torch import Tensor

from moeyard.checks import check_int, check_routes, check_shape, check_tensor
from moeyard.ids import narrow_ids
from moeyard.impls import launcher, repeater
from moeyard.library import goes_straight
from moeyard.outputs import (
    allocate_layout_at_once,
    batched_lengths,
    cached_layout_lengths,
    check_layout_out,
    check_sizes,
    deliver,
)
from moeyard.values import Layout


def moe_align_block_size(
    topk_ids: Tensor,
    *,
    num_experts: int,
    block_size: int,
    expert_map: Tensor | None = None,
    num_local_experts: int | None = None,
    top_k: int | None = None,
    out: Layout | None = None,
    impl: str = "auto",
) -> Layout:
    """Groups routes by expert and pads every expert's segment to a multiple of `block_size`.

    Args:
        topk_ids: [num_tokens, top_k] or [num_tokens * top_k], int32, int64 or uint32, of any strides. Ids below 0
            and of `num_experts` and above are dropped: they take no slot.
        num_experts: global number of experts, at most 8192.
        block_size: rows of a block, any positive number.
        expert_map: [num_experts] int32, the local expert of each global one; values below 0 or of
            `num_local_experts` and above drop the route.
        num_local_experts: experts of this rank, `num_experts` unless given (an upper bound: reading it off the map
            would wait for the device).
        top_k: routes of a token; the second size of 2-D ids, 1 for 1-D ids unless given.
        out: a layout of the right sizes to overwrite (`empty_layout`); allocated unless given.
        impl: an implementation by name, or "auto".

    Returns a `Layout`. Raises TypeError or ValueError naming the argument; also when capacity passes int32.
    """
    if type(out) is Layout and out._again is not None and expert_map is None and goes_straight(topk_ids):
        call = (topk_ids.shape, topk_ids.dtype, num_experts, block_size, num_local_experts, top_k, impl)
        if out._again[0] == call and out._again[1](topk_ids, out):
            return out
    num_local = num_experts if num_local_experts is None else num_local_experts
    check_sizes(num_experts, num_local, block_size)
    given, top_k = top_k, check_routes(topk_ids, top_k, expert_map, num_experts)
    sizes = (num_experts, num_local, block_size, top_k)
    if not goes_straight(topk_ids, expert_map):
        fields = torch.ops.moeyard.moe_align_block_size(topk_ids, expert_map, *sizes, impl)
        return deliver(Layout.of(fields, sizes), out)
    lengths = cached_layout_lengths(topk_ids.numel(), num_local, block_size)
    device, dtype = topk_ids.device, topk_ids.dtype
    launch = launcher("moe_align_block_size", impl, device, dtype)
    if out is None:
        out = allocate_layout_at_once(topk_ids.new_empty, lengths, sizes)
    else:
        check_layout_out(out, lengths, sizes, device)
        prepare = repeater("moe_align_block_size", impl, device, dtype) if expert_map is None else None
        again = prepare(topk_ids, out) if prepare is not None else None
        if again is not None:
            call = (topk_ids.shape, dtype, num_experts, block_size, num_local_experts, given, impl)
            object.__setattr__(out, "_again", (call, again))
    launch(narrow_ids(topk_ids), expert_map, out)
    return out


def batched_moe_align_block_size(
    expert_num_tokens: Tensor, *, max_num_tokens: int, block_size: int, out: Layout | None = None, impl: str = "auto"
) -> Layout:
    """The layout of a batched buffer [num_local_experts, max_num_tokens, hidden_size].

    Args:
        expert_num_tokens: [num_local_experts] int32, the valid rows of each expert, taken into [0, max_num_tokens].
        max_num_tokens: rows of each expert's batch. Route `e * max_num_tokens + j` is row j of expert e.
        block_size, out, impl: as in `moe_align_block_size`.

    Returns a `Layout` with top_k 1 over num_local_experts * max_num_tokens routes, of which the invalid ones are
    dropped; its capacity is num_local_experts * max_num_tokens with max_num_tokens rounded up to whole blocks.
    """
    check_tensor("expert_num_tokens", expert_num_tokens, dtypes=(torch.int32,), ndim=(1,))
    num_experts = expert_num_tokens.shape[0]
    check_sizes(num_experts, num_experts, block_size)
    check_int("max_num_tokens", max_num_tokens, low=0)
    device, sizes = expert_num_tokens.device, (num_experts, num_experts, block_size, 1)
    if not goes_straight(expert_num_tokens):
        fields = torch.ops.moeyard.batched_moe_align_block_size(expert_num_tokens, max_num_tokens, block_size, impl)
        return deliver(Layout.of(fields, sizes), out)
    lengths = batched_lengths(num_experts, max_num_tokens, block_size)
    if out is None:
        out = allocate_layout_at_once(expert_num_tokens.new_empty, lengths, sizes)
    else:
        check_layout_out(out, lengths, sizes, device)
    launch = launcher("batched_moe_align_block_size", impl, device, torch.int32)
    launch(expert_num_tokens, max_num_tokens, out)
    return out


def moe_lora_align_block_size(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    *,
    num_experts: int,
    block_size: int,
    max_loras: int,
    expert_map: Tensor | None = None,
    num_local_experts: int | None = None,
    top_k: int | None = None,
    impl: str = "auto",
) -> tuple[Layout, ...]:
    """One layout an adapter: layout i holds the routes of the tokens whose adapter is i, and drops the others.

    Args:
        token_lora_mapping: [num_tokens] int32 or int64, the adapter of each token; a token outside [0, max_loras)
            (by convention -1: the base model) is in no layout.
        max_loras: adapters, at least 1.
        The others are those of `moe_align_block_size`; every layout has the capacity of all routes.

    Returns `max_loras` layouts that are views of stacked tensors. Follows vLLM's `moe_lora_align_block_size`.
    """
    num_local = num_experts if num_local_experts is None else num_local_experts
    check_sizes(num_experts, num_local, block_size)
    check_int("max_loras", max_loras, low=1)
    top_k = check_routes(topk_ids, top_k, expert_map, num_experts)
    check_tensor(
        "token_lora_mapping", token_lora_mapping, dtypes=(torch.int32, torch.int64), ndim=(1,), device=topk_ids.device
    )
    check_shape("token_lora_mapping", token_lora_mapping, (topk_ids.numel() // top_k,), "one adapter a token")
    sizes = (num_experts, num_local, block_size, top_k)
    fields = torch.ops.moeyard.moe_lora_align_block_size(
        topk_ids, token_lora_mapping, expert_map, max_loras, *sizes, impl
    )
    return tuple(Layout.of([field[lora] for field in fields], sizes) for lora in range(max_loras))
