"""Products and experts with torch's own products: rows sorted by expert, then one grouped product, no host sync."""

import torch
from torch import Tensor

from moeyard.dispatch.curves import activated
from moeyard.dispatch.sizes import layout_capacity
from moeyard.values import Activation, ExpertCall, Layout, Segments
from moeyard.vectorised.layout import align_launch
from moeyard.vectorised.quant import Matrices, matrices_of, quantise_rows

_CHUNK_BYTES = 1 << 26  # weights copied at once where there is no grouped product


def activate_launch(rows: Tensor, activation: Activation, *, gated: bool, out: Tensor) -> None:
    """In float32 (float64 rows: in float64), rounded once."""
    out.copy_(activated(rows, gated, activation))


def grouped_gemm_launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    segments: Segments,
    *,
    out: Tensor,
) -> None:
    """Packs the rows of all experts, multiplies, and lets every row of the result find its packed one."""
    num_rows, device = out.shape[0], out.device
    first_rows, row_counts, slots, divisor, *_ = segments
    if not num_rows or not out.shape[1]:
        return
    ends = torch.cumsum(row_counts.long(), 0)
    packed = torch.arange(num_rows, device=device)
    expert = torch.searchsorted(ends, packed, right=True).clamp(max=weight.shape[0] - 1)
    held = packed < ends[-1]
    slot = torch.where(held, first_rows[expert] + packed - (ends - row_counts)[expert], 0)
    target = slot if slots is None else slots[slot].long()
    source = torch.where(held, target // divisor, 0)
    with torch.autocast(_autocast_kind(device), enabled=False):
        result = _product(rows[source], weight, ends, expert)
    if bias is not None:
        result = result + bias[expert]
    if topk_weights is not None:
        result = result * topk_weights.reshape(-1, 1)[torch.where(held, target, 0)]
    where = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    where.scatter_(0, torch.where(held, target, num_rows), packed)
    out.copy_(result[where[:-1]])


def _autocast_kind(device: torch.device) -> str:
    """What autocast calls a device; it has no kind for meta tensors."""
    return "cpu" if device.type == "meta" else device.type


def _product(rows: Tensor, weight: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
    """Rows in the order of their experts, times the weights of their experts, in float32 (float64 rows: in float64).

    A CPU multiplies expert by expert. A GPU has torch's grouped product for bfloat16 (`grouped_product`).
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.is_cpu:
        chunks = zip(rows.tensor_split(ends[:-1]), weight, strict=True)
        return torch.cat([chunk.to(wide) @ one.to(wide).t() for chunk, one in chunks if len(chunk)])
    weight = weight.contiguous()
    aligned = all(size * rows.element_size() % 16 == 0 for size in (*weight.shape[1:], weight.storage_offset()))
    if aligned and rows.shape[1] and rows.dtype == torch.bfloat16:
        return grouped_product(rows, weight, ends.int())
    step = max(1, _CHUNK_BYTES // max(1, weight[0].nbytes))
    parts = [
        torch.bmm(weight[expert[i : i + step]].to(wide), rows[i : i + step].to(wide).unsqueeze(2)).squeeze(2)
        for i in range(0, rows.shape[0], step)
    ]
    return torch.cat(parts)


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped product of bfloat16, in float32: that one rounds its sums to bfloat16.

    A second product has the first one's results as further columns, times -1: it leaves what rounding took away.
    """
    experts, columns, _ = weight.shape
    parts = []
    for first in range(0, columns, _COLUMNS):
        some = weight[:, first : first + _COLUMNS]
        rounded = torch.nn.functional.grouped_mm(rows, some.transpose(1, 2), offs=ends)
        minus = -torch.eye(some.shape[1], dtype=rows.dtype, device=rows.device)
        longer = torch.cat((some, minus.expand(experts, -1, -1)), 2)
        rest = torch.nn.functional.grouped_mm(torch.cat((rows, rounded), 1), longer.transpose(1, 2), offs=ends)
        parts.append(rounded.float() + rest.float())
    return torch.cat(parts, 1)


_COLUMNS = 256


def product_in_blocks(rows: Tensor, matrices: Matrices, experts: Tensor, bias: Tensor | None) -> Tensor:
    """Blocks of rows, each of one expert, times the weights of their experts, which are dequantised part by part.

    rows [blocks * block_size, C], experts [blocks] int64 -> [blocks * block_size, R] float32.
    """
    wide = torch.float32
    blocks = rows.view(experts.shape[0], -1, matrices.columns)
    row_bytes = max(1, wide.itemsize * matrices.columns)
    tall = max(1, min(matrices.rows, _CHUNK_BYTES // row_bytes))
    some = max(1, _CHUNK_BYTES // (row_bytes * tall))
    result = rows.new_empty((*blocks.shape[:2], matrices.rows), dtype=wide)
    for i in range(0, experts.shape[0], some):
        for first in range(0, matrices.rows, tall):
            last = min(first + tall, matrices.rows)
            part = matrices.part(experts[i : i + some], first, last, wide)
            with torch.autocast(_autocast_kind(rows.device), enabled=False):
                result[i : i + some, :, first:last] = blocks[i : i + some].to(wide) @ part.transpose(1, 2)
    if bias is not None:
        result = result + bias[experts].unsqueeze(1)
    return result.view(rows.shape[0], matrices.rows)


_MOST_IN_A_BLOCK = 64


def _block_size(num_routes: int, num_local: int) -> int:
    """Rows that share a dequantised matrix: as many as an expert has on average, a power of two."""
    return min(_MOST_IN_A_BLOCK, 1 << max(0, (num_routes // num_local).bit_length()))


def fused_experts_launch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall, *, out: Tensor
) -> None:
    """Sorts routes, multiplies, activates, multiplies, and sums each token's rows in k order."""
    weights, activation, scheme, scales = call.weights, call.activation, call.weights.scheme, call.weights.scales
    num_tokens, top_k = topk_ids.shape
    n, local = topk_ids.numel(), weights.num_local_experts
    if not n:
        out.zero_()
        return
    block = 1 if scheme is None else _block_size(n, local)
    slots = layout_capacity(n, local, block)
    ints = [topk_ids.new_empty(size, dtype=torch.int32) for size in (slots, slots // block, 1, local, n)]
    offsets = topk_ids.new_empty(local + 1, dtype=torch.int64)
    layout = Layout.of((*ints[:3], offsets, *ints[3:]), (call.num_experts, local, block, top_k))
    align_launch(topk_ids, call.expert_map, layout)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    experts = layout.expert_ids.long().clamp(min=0)

    def product(rows: Tensor, matrices: Matrices, bias: Tensor | None) -> Tensor:
        if scheme is not None:
            return product_in_blocks(rows, matrices, experts, bias)
        result = rows.new_empty((n, matrices.rows), dtype=wide)
        where = Segments(offsets[:-1], layout.expert_counts)
        grouped_gemm_launch(rows, matrices.stored, bias, None, where, out=result)
        return result

    def operand(rows: Tensor, static_scales: Tensor | None, start: int) -> Tensor:
        if scheme is None:
            return rows
        given = None if static_scales is None else static_scales[experts].repeat_interleave(block)
        return quantise_rows(rows, scheme, given, start)

    route = torch.where(layout.sorted_token_ids < n, layout.sorted_token_ids, 0).long()
    rows = hidden_states[route // top_k]
    if call.weight_on_input:
        rows = (rows * topk_weights.reshape(-1, 1)[route]).to(hidden_states.dtype)
    first, second = matrices_of(weights)
    rows = operand(rows, None if scales is None else scales.w13_input, 0)
    middle = rows.new_empty((slots, weights.intermediate_size), dtype=hidden_states.dtype)
    activate_launch(product(rows, first, weights.w13_bias), activation, gated=weights.gated, out=middle)
    rows = operand(middle, *((None, 0) if scales is None else (scales.w2_input, scales.block_start)))
    results = product(rows, second, weights.w2_bias)
    taken = results[layout.route_rows.clamp(min=0).long()].view(num_tokens, top_k, -1)
    if not call.weight_on_input:
        taken = taken * topk_weights.unsqueeze(2)
    dropped = (layout.route_rows < 0).view(num_tokens, top_k, 1)
    out.copy_(taken.masked_fill(dropped, 0).sum(1))
