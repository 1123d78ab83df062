"""vLLM's permutation of rows, and its inverse."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard.combine import combine_routes
from moeyard.dispatch.checks import ID_DTYPES, check_int, check_out, check_shape, check_tensor
from moeyard.dispatch.ids import local_expert_ids, narrow_ids
from moeyard.values import MAX_EXPERTS


class MoEPermuteScratch:
    """Memory that repeated calls of `moe_permute` share: their rows. It grows to the largest call.

    A call overwrites the rows of the call before it. Not for calls that overlap on several streams.
    """

    def __init__(self, num_experts: int, num_local_experts: int, device: torch.device | str) -> None:
        check_int("num_experts", num_experts, low=1)
        check_int("num_local_experts", num_local_experts, low=1, high=num_experts)
        self.num_experts, self.num_local_experts = num_experts, num_local_experts
        self.device = torch.device(device)
        self.permuted_hidden_states: Tensor | None = None
        """[elements], of the dtype of the last call's rows."""

    def grow(self, elements: int, dtype: torch.dtype) -> None:
        """Makes room for so many elements of a dtype."""
        held = self.permuted_hidden_states
        if held is None or held.dtype != dtype or held.numel() < elements:
            self.permuted_hidden_states = torch.empty(elements, dtype=dtype, device=self.device)


def _check_scratch(scratch: Any, n_expert: int, n_local: int) -> None:
    for name, argument, value in (
        ("num_experts", "n_expert", n_expert),
        ("num_local_experts", "n_local_expert", n_local),
    ):
        held = getattr(scratch, name, None)
        if held != value:
            raise ValueError(f"scratch.{name}: expected {value} ({argument}), got {held}")


def _rows_in(scratch: Any, shape: tuple[int, int], hidden_states: Tensor) -> Tensor | None:
    """The rows of a scratch; None where it has no room for them, as vLLM's may."""
    elements = shape[0] * shape[1]
    if isinstance(scratch, MoEPermuteScratch):
        if scratch.device.type != hidden_states.device.type:
            raise ValueError(f"scratch.device: expected {hidden_states.device}, got {scratch.device}")
        scratch.grow(elements, hidden_states.dtype)
    held = getattr(scratch, "permuted_hidden_states", None)
    if not isinstance(held, Tensor) or held.dtype != hidden_states.dtype or held.numel() < elements:
        return None
    return held.view(-1)[:elements].view(shape)


def moe_permute_unpermute_supported() -> bool:
    """vLLM's question whether both can be called: always."""
    return True


def moe_permute(
    hidden_states: Tensor,
    a1q_scale: Tensor | None,
    topk_ids: Tensor,
    n_expert: int,
    n_local_expert: int = -1,
    expert_map: Tensor | None = None,
    permuted_hidden_states: Tensor | None = None,
    scratch: Any = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """vLLM's `moe_permute`: rows grouped by local expert, everything else behind them.

    Args:
        hidden_states: [T, H] of any dtype.
        a1q_scale: of any dtype, on the same device. [T, 1] or [T, groups]: moved along, and rows that are not written
            have the last token's. One number for all tokens, or 1-D: passed through.
        topk_ids: [T, top_k] int32, int64 or uint32.
        n_local_expert: local experts, n_expert unless given; at most 4096 experts with a map.
        permuted_hidden_states: [T * top_k, H] to overwrite.
        scratch: a `MoEPermuteScratch`, or vLLM's. Rows are written to its `permuted_hidden_states` unless the argument
            of that name is given, so the next call with it overwrites them. Its sizes must be those of this call. The
            index tensors are new in every call, where vLLM's lie in the scratch, too.

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
    if scratch is not None:
        _check_scratch(scratch, n_expert, n_local)
        if permuted_hidden_states is None:
            permuted_hidden_states = _rows_in(scratch, shape, hidden_states)
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
