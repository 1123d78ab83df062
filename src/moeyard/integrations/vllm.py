"""vLLM 0.33's MoE operators by their own names, argument orders, output lengths and return tuples.

As a library: import the functions from here instead of from vLLM. As a launcher,

    python -m moeyard.integrations.vllm SCRIPT [ARGUMENT ...]

runs an unchanged script whose vLLM imports find these operators. Where vLLM is installed its operators are replaced.
Where it is not, the import paths of the operators exist, and nothing else of vLLM does.

Deviations from vLLM, all in what it leaves undefined: orders are stable; ids that are out of range are dropped
everywhere; the unused end of `expert_ids` stays -1 when a map is applied afterwards, where vLLM sends it through
`expert_map[-1]`; flat ids are accepted in the form that says so (`moe_align_block_size`). Quantised experts follow vLLM
0.26 (docs/notes/vllm.md): rows with a dynamic scale have one each, and the router's weight counts once.
"""

import sys
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

import moeyard
from moeyard.combine import combine_routes
from moeyard.dispatch.checks import (
    ID_DTYPES,
    check_int,
    check_out,
    check_routes,
    check_shape,
    check_sizes,
    check_tensor,
)
from moeyard.dispatch.ids import local_expert_ids, narrow_ids
from moeyard.dispatch.op import goes_straight
from moeyard.dispatch.sizes import layout_lengths, round_up
from moeyard.dispatch.table import companion
from moeyard.integrations.vllm_experts import batched_experts, cutlass_moe_fp8, fused_experts, run_cutlass_moe_fp8
from moeyard.integrations.vllm_quantised import (
    FusedMoEQuantConfig,
    fp8_w8a8_moe_quant_config,
    fp8_w8a16_moe_quant_config,
    int8_w8a8_moe_quant_config,
)
from moeyard.values import MAX_EXPERTS

__all__ = [
    "FusedMoEQuantConfig",
    "batched_experts",
    "batched_moe_align_block_size",
    "cutlass_moe_fp8",
    "fp8_w8a8_moe_quant_config",
    "fp8_w8a16_moe_quant_config",
    "fused_experts",
    "fused_topk",
    "grouped_topk",
    "int8_w8a8_moe_quant_config",
    "moe_align_block_size",
    "moe_permute",
    "moe_sum",
    "moe_unpermute",
    "run_cutlass_moe_fp8",
    "shuffle_rows",
]

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
        length, num_blocks = _triple_lengths(topk_ids.numel(), num_experts, block_size, pad_sorted_ids)
        ids = narrow_ids(topk_ids)
        together = ids.new_empty(length + num_blocks + 1, dtype=torch.int32)
        triple = together.unsafe_split_with_sizes((length, num_blocks, 1))
        own_triple(ids, expert_map, num_experts, num_experts, block_size, *triple)
        return tuple(triple)
    layout = moeyard.moe_align_block_size(
        topk_ids, num_experts=num_experts, block_size=block_size, expert_map=applied, top_k=top_k
    )
    length, num_blocks = _triple_lengths(layout.num_routes, num_experts, block_size, pad_sorted_ids)
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
def _triple_lengths(num_routes: int, num_experts: int, block_size: int, pad_sorted_ids: bool) -> tuple[int, int]:
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


def moe_permute(
    hidden_states: Tensor,
    a1q_scale: Tensor | None,
    topk_ids: Tensor,
    n_expert: int,
    n_local_expert: int = -1,
    expert_map: Tensor | None = None,
    permuted_hidden_states: Tensor | None = None,
    scratch: object = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """vLLM's `moe_permute`: rows grouped by local expert, everything else behind them.

    Args:
        hidden_states: [T, H] of any dtype.
        a1q_scale: of any dtype, on the same device. [T, 1] or [T, groups]: moved along, and rows that are not written
            have the last token's. One number for all tokens, or 1-D: passed through.
        topk_ids: [T, top_k] int32, int64 or uint32.
        n_local_expert: local experts, n_expert unless given; at most 4096 experts with a map.
        permuted_hidden_states: [T * top_k, H] to overwrite.
        scratch: accepted for vLLM's callers; nothing is kept between calls.

    Returns (permuted_hidden_states [T * top_k, H], a1q_scale, expert_first_token_offset [n_local_expert + 1] int64,
    inv_permuted_idx [T * top_k] int32, permuted_idx [T * top_k] int32). The two maps are inverse permutations of all
    routes: routes of other ranks come last, by id, invalid ids as n_expert. With a map, their rows are not written and
    their permuted_idx is T * top_k; without one they are copied to the end.
    """
    check_tensor("hidden_states", hidden_states, ndim=(2,))
    check_tensor("topk_ids", topk_ids, dtypes=ID_DTYPES, ndim=(2,), device=hidden_states.device)
    check_shape("topk_ids", topk_ids, (hidden_states.shape[0], topk_ids.shape[1]), "one row per token")
    mapped = expert_map is not None
    check_int("n_expert", n_expert, low=1, high=MAX_EXPERTS // 2 if mapped else MAX_EXPERTS - 1)
    n_local = n_expert if n_local_expert == -1 else n_local_expert
    check_int("n_local_expert", n_local, low=1, high=n_expert)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, dtypes=(torch.int32,), ndim=(1,), device=hidden_states.device)
        check_shape("expert_map", expert_map, (n_expert,), "n_expert")
    num_routes, top_k = topk_ids.numel(), topk_ids.shape[1]
    shape = (num_routes, hidden_states.shape[1])
    if permuted_hidden_states is not None:
        check_out("permuted_hidden_states", permuted_hidden_states, shape, hidden_states.dtype, hidden_states.device)

    # every route gets a key, so that one layout over the keys orders the routes of other ranks, too
    ids = local_expert_ids(narrow_ids(topk_ids), None, n_expert)
    keys = torch.where(ids < 0, n_expert, ids)
    if mapped:
        local = local_expert_ids(ids, expert_map, n_expert, n_local)
        keys = torch.where(local >= 0, local, torch.where(ids >= 0, ids + n_expert, n_expert))
    layout = moeyard.moe_align_block_size(keys, num_experts=2 * n_expert if mapped else n_expert + 1, block_size=1)
    offsets = layout.expert_offsets[: n_local + 1]
    inverse, permuted_idx, route_rows = layout.route_rows, layout.sorted_token_ids[:num_routes], layout.route_rows
    if mapped:
        route_rows = torch.where(inverse < offsets[-1], inverse, -1)
        row = torch.arange(num_routes, device=hidden_states.device)
        permuted_idx = torch.where(row < offsets[-1], permuted_idx, num_routes)

    layout = replace(layout, sorted_token_ids=permuted_idx, route_rows=route_rows, top_k=top_k)
    riding = None  # scales that move in the launch that moves the rows
    if (
        a1q_scale is not None
        and a1q_scale.dim() > 1
        and (len(a1q_scale) == len(hidden_states) or a1q_scale.numel() > 1)
    ):
        check_tensor("a1q_scale", a1q_scale, ndim=(2,), device=hidden_states.device)
        check_shape("a1q_scale", a1q_scale, (len(hidden_states), a1q_scale.shape[1]), "one row per token")
        if mapped:
            a1q_scale = a1q_scale[permuted_idx.clamp(max=max(num_routes - 1, 0)) // top_k]
        else:
            riding = a1q_scale
    out = None
    if permuted_hidden_states is not None:
        scales_out = None if riding is None else riding.new_empty(num_routes, riding.shape[1])
        out = moeyard.Permuted(permuted_hidden_states, scales_out)
    permuted = moeyard.permute(hidden_states, layout, scales=riding, out=out)
    return permuted.rows, a1q_scale if riding is None else permuted.scales, offsets, inverse, permuted_idx


def moe_unpermute(
    out: Tensor,
    permuted_hidden_states: Tensor,
    topk_weights: Tensor,
    inv_permuted_idx: Tensor,
    expert_first_token_offset: Tensor | None = None,
) -> None:
    """vLLM's `moe_unpermute`: out[t] = sum over k of topk_weights[t, k] * permuted_hidden_states[inverse[t, k]].

    Rows at or past the last entry of `expert_first_token_offset` (of other ranks) are skipped, and so are map
    entries that point outside the rows.
    """
    check_tensor("permuted_hidden_states", permuted_hidden_states, ndim=(2,))
    device = permuted_hidden_states.device
    check_tensor("topk_weights", topk_weights, dtypes=(torch.float32,), ndim=(2,), device=device)
    check_tensor("inv_permuted_idx", inv_permuted_idx, dtypes=(torch.int32,), ndim=(1, 2), device=device)
    inverse = inv_permuted_idx.reshape(-1)
    check_shape("inv_permuted_idx", inverse, (topk_weights.numel(),), "one entry a weight")
    limit = permuted_hidden_states.shape[0]
    taken = (inverse >= 0) & (inverse < limit)
    if expert_first_token_offset is not None:
        taken = taken & (inverse < expert_first_token_offset[-1])
    combine_routes(
        permuted_hidden_states,
        torch.where(taken, inverse, -1),
        topk_weights,
        topk_weights.shape[1],
        out=out,
        impl="auto",
    )


def moe_sum(input: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    """vLLM's `moe_sum`: output [T, H] = input [T, top_k, H] summed over top_k, skipping dropped routes."""
    moeyard.moe_sum(input, topk_ids=topk_ids, expert_map=expert_map, out=output)


def shuffle_rows(input_tensor: Tensor, dst2src_map: Tensor) -> Tensor:
    """vLLM's `shuffle_rows`: rows gathered by a map; zeros where it points outside."""
    return moeyard.shuffle_rows(input_tensor, dst2src_map)


def fused_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
    scoring_func: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM's `fused_topk`: (topk_weights [T, topk] float32, topk_ids [T, topk], token_expert_indices [T, topk] int32).

    `indices_type` is int32 (also for None), int64 or uint32; token_expert_indices[t, k] is k * T + t. `hidden_states`
    is looked at for its number of tokens alone.
    """
    _check_tokens(hidden_states, gating_output)
    routing = moeyard.route(gating_output, top_k=topk, scoring=scoring_func, renormalize=renormalize)
    own = torch.arange(routing.topk_ids.numel(), dtype=torch.int32, device=gating_output.device)
    indices = own.view(topk, -1).t().contiguous()
    return routing.topk_weights, _as_indices(routing.topk_ids, indices_type), indices


def grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """vLLM's `grouped_topk`: (topk_weights [T, topk] float32, topk_ids [T, topk] int32); no groups for 0."""
    _check_tokens(hidden_states, gating_output)
    bias = None if e_score_correction_bias is None else e_score_correction_bias.float()
    routing = moeyard.route(
        gating_output,
        top_k=topk,
        scoring=scoring_func,
        renormalize=renormalize,
        selection_bias=bias,
        num_groups=num_expert_group or 1,
        top_k_groups=topk_group or 1,
        routed_scaling_factor=routed_scaling_factor,
    )
    return routing.topk_weights, routing.topk_ids


def _check_tokens(hidden_states: Tensor, gating_output: Tensor) -> None:
    if hidden_states.shape[0] != gating_output.shape[0]:
        raise ValueError(
            f"gating_output: expected {hidden_states.shape[0]} rows (as hidden_states has), "
            f"got {gating_output.shape[0]}"
        )


def _as_indices(ids: Tensor, kind: torch.dtype | None) -> Tensor:
    if kind not in (None, *ID_DTYPES):
        raise TypeError(f"indices_type: expected int32, int64 or uint32, got {kind}")
    return ids.view(kind) if kind == torch.uint32 else ids.to(kind or torch.int32)


if __name__ == "__main__":
    from moeyard.integrations.launch import main

    sys.exit(main(sys.argv))
