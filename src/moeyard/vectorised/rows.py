"""Row movement and sums with torch's own gathers: masked, never reading a dropped route's row."""

import torch
from torch import Tensor

from moeyard.dispatch.ids import local_expert_ids


def permute_launch(
    hidden_states: Tensor,
    scales: Tensor | None,
    *,
    sorted_token_ids: Tensor,
    route_rows: Tensor,
    top_k: int,
    rows: Tensor,
    row_scales: Tensor | None,
) -> None:
    """Gathers rows [T, H] (and scales) by slot. Padding slots repeat row 0: their content means nothing."""
    if not route_rows.shape[0]:
        return
    tokens = torch.where(sorted_token_ids < route_rows.shape[0], sorted_token_ids, 0) // top_k
    _select(hidden_states, tokens, rows)
    if scales is not None and row_scales is not None:
        _select(scales, tokens, row_scales)


def permute_to_fp8_launch(
    hidden_states: Tensor,
    *,
    sorted_token_ids: Tensor,
    route_rows: Tensor,
    top_k: int,
    group_size: int | None,
    rows: Tensor,
    row_scales: Tensor,
) -> None:
    """Quantises rows [T, H] in float32, then gathers them and their scales."""
    if not route_rows.shape[0] or not rows.numel():
        return
    num_tokens, hidden_size = hidden_states.shape
    size = group_size or hidden_size
    groups = hidden_states.float().reshape(num_tokens, hidden_size // size, size)
    largest = groups.abs().amax(2).clamp(min=1e-10)
    scales = largest / largest.new_full((), _FP8_MAX)  # by a number, CUDA would multiply by its rounded reciprocal
    values = (groups / scales.unsqueeze(2)).clamp(-_FP8_MAX, _FP8_MAX).to(rows.dtype).view(num_tokens, hidden_size)
    permute_launch(
        values,
        scales.view(num_tokens, *row_scales.shape[1:]),
        sorted_token_ids=sorted_token_ids,
        route_rows=route_rows,
        top_k=top_k,
        rows=rows,
        row_scales=row_scales,
    )


_FP8_MAX = 448.0


def shuffle_rows_launch(input: Tensor, dst2src_map: Tensor, *, out: Tensor) -> None:
    """Gathers rows by a map; sources out of range give zeros."""
    if not out.numel():
        return
    valid = (dst2src_map >= 0) & (dst2src_map < input.shape[0])
    _select(input, torch.where(valid, dst2src_map, 0), out)
    _words(out).masked_fill_(~valid.unsqueeze(1), 0)


def combine_launch(rows: Tensor, topk_weights: Tensor | None, *, route_rows: Tensor, top_k: int, out: Tensor) -> None:
    """Sums in k order, in float32 (float64 rows in float64)."""
    table = route_rows.view(-1, top_k)
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(out.shape, dtype=wide, device=out.device)
    if rows.shape[0]:
        for k in range(top_k):
            valid = (table[:, k] >= 0).unsqueeze(1)
            taken = rows[table[:, k].clamp(min=0)].to(wide)
            if topk_weights is not None:
                taken = taken * topk_weights[:, k : k + 1]
            total += torch.where(valid, taken, 0)
    out.copy_(total)


def moe_sum_launch(rows: Tensor, topk_ids: Tensor | None, expert_map: Tensor | None, *, out: Tensor) -> None:
    """Sums [T, K, H] over K in k order, skipping routes whose id is dropped."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    taken = None if topk_ids is None else (local_expert_ids(topk_ids, expert_map) >= 0).unsqueeze(2)
    total = torch.zeros(out.shape, dtype=wide, device=out.device)
    for k in range(rows.shape[1]):
        total += rows[:, k].to(wide) if taken is None else torch.where(taken[:, k], rows[:, k].to(wide), 0)
    out.copy_(total)


_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def _words(tensor: Tensor, *like: Tensor) -> Tensor:
    """Contiguous [R, ...] as [R, words a row] of the widest integer that fits it and `like`: any dtype can be moved."""
    row = tensor[0].numel() * tensor.element_size()
    offsets = [t.storage_offset() * t.element_size() for t in (tensor, *like)]
    dtype = next(word for size, word in _WORDS if not any(bytes % size for bytes in (row, *offsets)))
    return tensor.view(tensor.shape[0], -1).view(dtype)


def _select(source: Tensor, index: Tensor, out: Tensor) -> None:
    if source.numel() and out.numel():
        source = source.contiguous()
        torch.index_select(_words(source, out), 0, index.long(), out=_words(out, source))
