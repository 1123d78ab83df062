"""Products and experts of CUDA tensors on Hopper: launches of experts.cu, straight from Python."""

from collections.abc import Callable

import torch
from torch import Tensor

from moeyard.cuda.experts.coded import fused_coded_experts_launch, unfit_scheme
from moeyard.cuda.experts.layer import LayerLaunches, LayerSizes, layer_launches
from moeyard.cuda.experts.plan import Way, way_of
from moeyard.cuda.experts.product import ALIGNMENT, apart, lies_well, product, turns_of
from moeyard.cuda.rows.launchers import shuffle_rows_launch
from moeyard.cuda.runtime.barriers import barrier_for
from moeyard.dispatch.call import Call, lies_turned
from moeyard.dispatch.sizes import expected_routes
from moeyard.values import ExpertCall, ExpertWeights, Segments

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
    if not topk_ids.numel():
        return
    weights, expert_map = call.weights, call.expert_map
    hidden_states, topk_ids, topk_weights = _in_place(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()
    b13, b2, expert_map = (
        None if given is None else given.contiguous() for given in (weights.w13_bias, weights.w2_bias, expert_map)
    )
    ids, result = topk_ids.data_ptr(), out.data_ptr()
    lent = lies_well(out) and apart(out, hidden_states, topk_weights, topk_ids, expert_map)
    layer = _layer_of(hidden_states, topk_ids, call, way, ids % ALIGNMENT == 0, result % ALIGNMENT, lent)
    memory = hidden_states.new_empty(layer.num_bytes, dtype=torch.uint8)
    layer.start(
        ids, _address(expert_map), hidden_states.data_ptr(), weights.w13.data_ptr(), weights.w2.data_ptr(),
        _address(b13), _address(b2), topk_weights.data_ptr(), memory.data_ptr(), result,
        barrier_for(hidden_states.get_device()),
    )  # fmt: skip


def fused_experts_anew(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall
) -> Callable[..., bool] | None:
    """What repeats a launch of unquantised weights for other tensors of equal shapes, strides and dtypes: (hidden
    states, router weights, ids, weights, map, out) -> whether it could. None where tensors had to be copied.

    It cannot for tensors at addresses that are no multiples of 16 bytes. `out` shares memory with no other tensor.
    """
    weights = call.weights
    given = (hidden_states, topk_weights, topk_ids, weights.w13_bias, weights.w2_bias, call.expert_map)
    if weights.scheme is not None or not topk_ids.numel():
        return None
    if not all(tensor is None or tensor.is_contiguous() for tensor in given):
        return None
    layer = _layer_of(hidden_states, topk_ids, call, None, True, 0, True)
    num_bytes, start, device = layer.num_bytes, layer.start, hidden_states.get_device()

    def repeat(
        hidden: Tensor, factors: Tensor, ids: Tensor, weights: ExpertWeights, mapping: Tensor | None, out: Tensor
    ) -> bool:
        routes, source, result = ids.data_ptr(), hidden.data_ptr(), out.data_ptr()
        w13, w2 = weights.w13.data_ptr(), weights.w2.data_ptr()
        if (routes | source | result | w13 | w2) & (ALIGNMENT - 1):
            return False
        memory = hidden.new_empty(num_bytes, dtype=torch.uint8)
        start(
            routes, _address(mapping), source, w13, w2, _address(weights.w13_bias), _address(weights.w2_bias),
            factors.data_ptr(), memory.data_ptr(), result, barrier_for(device),
        )  # fmt: skip
        return True

    return repeat


def _layer_of(
    hidden_states: Tensor, topk_ids: Tensor, call: ExpertCall, way: Way | None, ids_aligned: bool, out_bits: int,
    lent: bool,
) -> LayerLaunches:  # fmt: skip
    """The launches of such a call, which copies rows or not unless it is given a way."""
    weights, activation, num_experts, expert_map, *_ = call
    num_tokens, top_k = topk_ids.shape
    experts, columns, hidden_size = weights.w13.shape
    way = way or way_of(expected_routes(num_tokens * top_k, experts, num_experts), experts, columns)
    biased = (weights.w13_bias is not None, weights.w2_bias is not None)
    return layer_launches(LayerSizes(
        num_tokens, top_k, experts, columns, hidden_size, weights.w2.shape[2], hidden_states.dtype, topk_ids.dtype,
        activation, weights.gated, biased, num_experts, expert_map is not None, ids_aligned, out_bits, lent, way,
        hidden_states.get_device(),
    ))  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
