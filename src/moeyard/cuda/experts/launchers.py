"""Products and experts of CUDA tensors on Hopper: launches of experts.cu, straight from Python."""

import torch
from torch import Tensor

from moeyard.cuda.align.launchers import align_launch
from moeyard.cuda.experts.coded import fused_coded_experts_launch, unfit_scheme
from moeyard.cuda.experts.plan import Way, way_of
from moeyard.cuda.experts.product import apart, compact_layout, lies_well, product, turns_of
from moeyard.cuda.rows.launchers import combine_launch, permute_launch, shuffle_rows_launch
from moeyard.dispatch.call import Call
from moeyard.dispatch.sizes import expected_routes
from moeyard.values import ExpertCall, Segments

_UNIT = 16
"""What sizes are multiples of, so that every row and every half of w13 begins where the copy engine can."""


def unfit_for_products(call: Call) -> str | None:
    """Why `grouped_gemm_launch` does not take such a call, in words; None if it does."""
    weights = call.weights
    if weights is None:
        return None
    for name, size in (("columns", weights.columns // (1 + weights.gated)), ("hidden_size", weights.size)):
        if size % _UNIT or not size:
            return f"weights: expected {name} that are a positive multiple of {_UNIT}, got {size}"
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
    `way_of` says so; others are read and written where they lie.
    """
    if not out.shape[0]:
        return
    device = rows.get_device()
    first_rows, row_counts, sorted_token_ids, row_divisor, num_experts = segments
    by_route = gather = sorted_token_ids is not None
    expected = expected_routes(out.shape[0], weight.shape[0], num_experts)
    way = way_of(expected, weight.shape[0], out.shape[1], layer=False)
    if sorted_token_ids is not None and way.copied:
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
    num_routes, top_k = topk_ids.numel(), topk_ids.shape[1]
    if not num_routes:
        return
    device = hidden_states.get_device()
    weights, activation, num_experts, expert_map, _ = call
    expected = expected_routes(num_routes, weights.num_local_experts, num_experts)
    way = way or way_of(expected, weights.num_local_experts, weights.w13.shape[1])
    hidden_states, weighs = _in_place(hidden_states), hidden_states.dtype == torch.float16
    middle = hidden_states.new_empty((num_routes, weights.intermediate_size))
    rows = hidden_states.new_empty((num_routes, weights.hidden_size))
    inputs = (hidden_states, topk_weights, topk_ids, expert_map)
    layout = compact_layout(
        topk_ids, num_experts, weights.num_local_experts, middle, None if weighs else middle if way.copied else rows,
        out if lies_well(out) and apart(out, *inputs) else None,
    )  # fmt: skip
    align_launch(topk_ids, expert_map, layout, programmatic=True)
    offsets, counts = layout.expert_offsets, layout.expert_counts
    turns = turns_of(device)
    if way.copied:
        permute_launch(
            hidden_states, None, sorted_token_ids=layout.sorted_token_ids, route_rows=layout.route_rows, top_k=top_k,
            rows=rows, row_scales=None, programmatic=True,
        )  # fmt: skip
    product(
        rows if way.copied else hidden_states, weights.w13, weights.w13_bias, offsets, counts, middle,
        slots=None if way.copied else layout.sorted_token_ids, divisor=1 if way.copied else top_k,
        gather=not way.copied, activation=activation, gated=weights.gated, ready=way.copied, way=way,
        expected=expected, turns=turns,
    )  # fmt: skip
    product(
        middle, weights.w2, weights.w2_bias, offsets, counts, rows, slots=layout.sorted_token_ids if weighs else None,
        factors=topk_weights if weighs else None, ready=True, way=way, expected=expected, turns=turns,
    )  # fmt: skip
    factors = None if weighs else topk_weights
    combine_launch(rows, factors, route_rows=layout.route_rows, top_k=top_k, out=out, programmatic=True)
