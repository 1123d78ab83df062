"""vLLM's alignment: topk_ids -> (sorted_token_ids, expert_ids, num_tokens_post_pad)."""

from functools import lru_cache

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import check_routes, check_shape, check_sizes, check_tensor
from moeyard.dispatch.ids import narrow_ids
from moeyard.dispatch.op import goes_straight
from moeyard.dispatch.sizes import layout_lengths, round_up
from moeyard.dispatch.table import companion

_FORMS = (
    "vLLM's form (topk_ids [T, top_k], block_size, num_experts, expert_map, ...) or the form "
    "(topk_ids [T * top_k], num_experts, block_size, top_k), which an integer in fourth place marks"
)


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | int | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> tuple[Tensor, ...]:
    """vLLM's `moe_align_block_size`.

    Args:
        topk_ids: [T, top_k] int32, int64 or uint32; ids outside [0, num_experts) are dropped.
        expert_map: [num_experts] int32, the local expert of each global one or -1. An integer here says that the
            call is of the other form in circulation: flat ids, then num_experts, block_size and top_k.
        pad_sorted_ids: whether the length of sorted_token_ids is rounded up to whole blocks.
        ignore_invalid_experts: with a map, True drops the routes of other ranks; False sorts all routes by global
            id and maps `expert_ids` afterwards, so that the blocks of other ranks are marked -1.
        return_scatter_idx: also return the number of each route, [T * top_k, 1], -1 where the route is dropped.

    Returns (sorted_token_ids, expert_ids, num_tokens_post_pad), int32, and scatter_idx if asked for. Raises ValueError
    for flat ids with no integer in fourth place: the two integers could then be meant either way.
    """
    top_k = None
    if isinstance(expert_map, int):
        top_k, expert_map = expert_map, None
        block_size, num_experts = num_experts, block_size
        _check_flat_form(topk_ids, top_k)
    elif isinstance(topk_ids, Tensor) and topk_ids.dim() != 2:
        raise ValueError(f"topk_ids: expected {_FORMS}; got ids of shape {tuple(topk_ids.shape)} and no such integer")
    if return_scatter_idx and expert_map is not None and not ignore_invalid_experts:
        raise ValueError("return_scatter_idx: expected ignore_invalid_experts=True beside an expert_map, got False")
    applied = expert_map if ignore_invalid_experts else None
    own_triple = None
    if not return_scatter_idx and applied is expert_map and goes_straight(topk_ids, expert_map):
        check_sizes(num_experts, num_experts, block_size)
        check_routes(topk_ids, top_k, expert_map, num_experts)
        own_triple = companion("moe_align_block_size", "first outputs", "auto", topk_ids.device, topk_ids.dtype)
    if own_triple is not None:
        length, num_blocks = triple_lengths(topk_ids.numel(), num_experts, block_size, pad_sorted_ids)
        ids = narrow_ids(topk_ids)
        together = ids.new_empty(length + num_blocks + 1, dtype=torch.int32)
        triple = together.unsafe_split_with_sizes((length, num_blocks, 1))
        own_triple(ids, expert_map, num_experts, num_experts, block_size, *triple)
        return tuple(triple)
    layout = moeyard.moe_align_block_size(
        topk_ids, num_experts=num_experts, block_size=block_size, expert_map=applied, top_k=top_k
    )
    length, num_blocks = triple_lengths(layout.num_routes, num_experts, block_size, pad_sorted_ids)
    sorted_token_ids, expert_ids = layout.sorted_token_ids[:length], layout.expert_ids[:num_blocks]
    if expert_map is not None and not ignore_invalid_experts:
        check_tensor("expert_map", expert_map, dtypes=(torch.int32,), ndim=(1,), device=topk_ids.device)
        check_shape("expert_map", expert_map, (num_experts,), "num_experts")
        expert_ids = torch.where(expert_ids >= 0, expert_map[expert_ids.clamp(min=0)], -1)
    if not return_scatter_idx:
        return sorted_token_ids, expert_ids, layout.num_tokens_post_padded
    own = torch.arange(layout.num_routes, dtype=torch.int32, device=topk_ids.device)
    scatter_idx = torch.where(layout.route_rows >= 0, own, -1).unsqueeze(1)
    return sorted_token_ids, expert_ids, layout.num_tokens_post_padded, scatter_idx


@lru_cache(maxsize=1024)
def triple_lengths(num_routes: int, num_experts: int, block_size: int, pad_sorted_ids: bool) -> tuple[int, int]:
    """The lengths of vLLM's sorted_token_ids and expert_ids; ValueError if int32 cannot number a layout's slots."""
    layout_lengths(num_routes, num_experts, block_size)
    length = num_routes + num_experts * (block_size - 1)
    if pad_sorted_ids:
        length = round_up(length, block_size)
    if num_routes < num_experts:
        length = min(num_routes * block_size, length)
    return length, round_up(length, block_size) // block_size


def _check_flat_form(topk_ids: Tensor, top_k: int) -> None:
    fits = not isinstance(top_k, bool) and top_k >= 1
    if fits and isinstance(topk_ids, Tensor):
        fits = topk_ids.shape[1] == top_k if topk_ids.dim() == 2 else topk_ids.numel() % top_k == 0
    if not fits:
        shape = tuple(topk_ids.shape) if isinstance(topk_ids, Tensor) else type(topk_ids).__name__
        raise ValueError(f"expert_map: expected {_FORMS}; got {top_k!r} in fourth place for ids of shape {shape}")


def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM's `batched_moe_align_block_size`: (sorted_ids, expert_ids, num_tokens_post_pad) of a batched buffer."""
    layout = moeyard.batched_moe_align_block_size(
        expert_num_tokens, max_num_tokens=max_tokens_per_batch, block_size=block_size
    )
    return layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded
