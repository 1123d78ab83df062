"""Products and experts of CUDA tensors on Hopper: launches of experts.cu, straight from Python."""

import torch
from torch import Tensor

from moeyard.cuda.experts.coded import fused_coded_experts_launch, unfit_scheme
from moeyard.cuda.experts.layer import LayerSizes, blocks_of, layer_launches, table_bytes
from moeyard.cuda.experts.plan import Way, way_of
from moeyard.cuda.experts.product import TURNS, apart, lies_well, product, turns_of
from moeyard.cuda.rows.launchers import shuffle_rows_launch
from moeyard.cuda.runtime.barriers import barrier_for
from moeyard.cuda.runtime.tensor_map import row_map, weight_map
from moeyard.dispatch.call import Call, lies_turned
from moeyard.dispatch.sizes import expected_routes
from moeyard.values import ExpertCall, Segments

_UNIT = 16
"""What sizes are multiples of, so that every row and every half of w13 begins where the copy engine can."""
_BLOCK = 64
"""Columns of transposed weights that come as one block."""


def unfit_for_products(call: Call) -> str | None:
    """Why `grouped_gemm_launch` does not take such a call, in words; None if it does."""
    weights = call.weights
    if weights is None:
        return None
    for name, size in (("columns", weights.columns // (1 + weights.gated)), ("hidden_size", weights.size)):
        if size % _UNIT or not size:
            return f"weights: expected {name} that are a positive multiple of {_UNIT}, got {size}"
    if weights.turned and weights.columns % _BLOCK:
        return f"weights: expected columns of transposed ones that are a multiple of {_BLOCK}, got {weights.columns}"
    return weights.readable or None


def unfit_for_experts(call: Call) -> str | None:
    """Why `fused_experts_launch` does not take such a call, in words; None if it does."""
    if call.weight_on_input:
        return "takes no router weights on the input"
    weights = call.weights
    if weights is not None and weights.scheme is not None:
        reason = unfit_scheme(weights.scheme, weights.block_start)
        if reason is not None:
            return reason
    return unfit_for_products(call)


def _in_place(rows: Tensor) -> Tensor:
    """These rows, or a copy of them where the copy engine can read it."""
    return rows if lies_well(rows) else rows.clone(memory_format=torch.contiguous_format)


def grouped_gemm_launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    segments: Segments,
    *,
    out: Tensor,
) -> None:
    """Results by route gather their rows through `sorted_token_ids`, or have them copied into that order first where
    `way_of` says so; others are read and written where they lie. Beside transposed weights, of backward passes, rows
    are gathered: a backward has less memory to spare.
    """
    if not out.shape[0]:
        return
    device = rows.get_device()
    first_rows, row_counts, sorted_token_ids, row_divisor, num_experts, _ = segments
    by_route = gather = sorted_token_ids is not None
    expected = expected_routes(out.shape[0], weight.shape[0], num_experts)
    way = way_of(expected, weight.shape[0], out.shape[1], layer=False)
    if sorted_token_ids is not None and way.copied and not lies_turned(weight):
        gather = False
        source, rows = rows, rows.new_empty(sorted_token_ids.shape[0], rows.shape[1])
        shuffle_rows_launch(source, sorted_token_ids // row_divisor, out=rows)
    results = out if lies_well(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    product(
        _in_place(rows), weight, bias, first_rows.contiguous(), row_counts.contiguous(), results,
        slots=None if sorted_token_ids is None else sorted_token_ids.contiguous(), divisor=row_divisor, gather=gather,
        factors=topk_weights, by_route=by_route, way=way, expected=expected, turns=turns_of(device),
    )  # fmt: skip
    if results is not out:
        out.copy_(results)


def fused_experts_launch(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    call: ExpertCall,
    *,
    out: Tensor,
    way: Way | None = None,
) -> None:
    """Layout, product with activation, product, sum: four launches, each placed while the one before drains.

    What stands between is compact: [routes, intermediate_size] and [routes, hidden_size] of the dtype. The second of
    these first holds the rows in the order of experts where a fifth launch copies them there (`way_of`).

    A row of float16 is multiplied by the router's weight before it is rounded: it may be larger than float16 holds
    where the weighted one is not. bfloat16 has the range of float32: there the sum multiplies, and blocks of the
    second product need not know their routes.

    Quantised weights have launches of their own (coded.py).
    """
    if call.weights.scheme is not None:
        fused_coded_experts_launch(hidden_states, topk_weights, topk_ids, call, out=out, way=way)
        return
    num_tokens, top_k = topk_ids.shape
    num_routes = num_tokens * top_k
    if not num_routes:
        return
    weights, activation, num_experts, expert_map, *_ = call
    device, dtype, weighs = hidden_states.get_device(), hidden_states.dtype, hidden_states.dtype == torch.float16
    w13, w2, b13, b2 = weights.w13, weights.w2, weights.w13_bias, weights.w2_bias
    experts, columns, hidden_size = w13.shape
    size = w2.shape[2]
    way = way or way_of(expected_routes(num_routes, experts, num_experts), experts, columns)
    hidden_states, topk_ids, topk_weights = _in_place(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()
    b13, b2, expert_map = (None if given is None else given.contiguous() for given in (b13, b2, expert_map))
    ids, result = topk_ids.data_ptr(), out.data_ptr()
    lent = lies_well(out) and apart(out, hidden_states, topk_weights, topk_ids, expert_map)
    layer = layer_launches(LayerSizes(
        num_tokens, top_k, experts, columns, hidden_size, size, dtype, topk_ids.dtype, activation, weights.gated,
        (b13 is not None, b2 is not None), num_experts, expert_map is not None, ids % 16 == 0, result % 16, lent, way,
        device,
    ))  # fmt: skip
    memory = hidden_states.new_empty(layer.num_bytes, dtype=torch.uint8)
    middle = memory.data_ptr()
    rows, slots, route_rows = middle + layer.rows, middle + layer.slots, middle + layer.route_rows
    offsets = result if layer.table is None else middle + layer.table
    at_counts, at_total, _ = table_bytes(experts)
    counts, barrier = offsets + at_counts, barrier_for(device)
    turns, factors, source = barrier + TURNS, topk_weights.data_ptr(), hidden_states.data_ptr()

    align, shape = layer.align
    align(
        shape, ids, 0 if expert_map is None else expert_map.data_ptr(), slots, middle + blocks_of(num_routes),
        offsets + at_total, offsets, counts, route_rows, middle + layer.exchange, barrier,
    )  # fmt: skip
    if layer.permute is not None:
        permute, shape = layer.permute
        permute(shape, source, route_rows, rows, 0, 0)
    first, shape, plan = layer.first
    up = weight_map(w13.data_ptr(), *w13.shape, dtype, plan.weight_rows, plan.turn, not plan.streams)
    boxes = row_map(rows, num_routes, hidden_size, dtype, plan.box) if way.copied else up
    first.with_maps(
        shape, (up, boxes), rows if way.copied else source, 0 if b13 is None else b13.data_ptr(), 0,
        0 if way.copied else slots, offsets, counts, middle, turns,
    )  # fmt: skip
    second, shape, plan = layer.second
    down = weight_map(w2.data_ptr(), *w2.shape, dtype, plan.weight_rows, plan.turn, not plan.streams)
    second.with_maps(
        shape, (down, row_map(middle, num_routes, size, dtype, plan.box)), middle, 0 if b2 is None else b2.data_ptr(),
        factors if weighs else 0, slots if weighs else 0, offsets, counts, rows, turns,
    )  # fmt: skip
    total, shape = layer.sum
    total(shape, rows, route_rows, 0 if weighs else factors, 0, result)
