"""rows x expert weights -> rows: every row times the weights of its expert."""

from typing import Any

import torch
from torch import Tensor

from moeyard.dispatch.call import Call, WeightFacts, unreadable
from moeyard.dispatch.checks import FLOATS, check_layout, check_out, check_shape, check_tensor
from moeyard.dispatch.op import Op
from moeyard.values import Layout, Segments


def _flatten(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    segments: Segments,
    num_results: int,
) -> tuple[Any, ...]:
    first_rows, row_counts, slots, divisor, num_experts = segments
    return rows, weight, bias, topk_weights, slots, divisor, first_rows, row_counts, num_experts, num_results


def _gather(*flat: Any) -> tuple[Any, ...]:
    *operands, slots, divisor, first_rows, row_counts, num_experts, num_results = flat
    return *operands, Segments(first_rows, row_counts, slots, divisor, num_experts), num_results


def _call(rows: Tensor, weight: Tensor, *rest: Any) -> Call | None:
    if rows.is_cpu:  # where no implementation looks at sizes
        return None
    experts, columns, size = weight.shape
    facts = WeightFacts(weight.dtype, None, experts, columns, size, False, unreadable(weight, "weight"))
    return Call(rows.device, rows.dtype, facts, rest[-1])


def _launch(
    launch: Any,
    out: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    segments: Segments,
    _num_results: int,
) -> None:
    launch(rows, weight, bias, topk_weights, segments, out=out)


GROUPED_GEMM = Op(
    "grouped_gemm(Tensor rows, Tensor weight, Tensor? bias, Tensor? topk_weights, Tensor? sorted_token_ids, "
    "SymInt row_divisor, Tensor first_rows, Tensor row_counts, SymInt num_experts, SymInt num_results, str impl) "
    "-> Tensor",
    flatten=_flatten,
    gather=_gather,
    seen=lambda rows, weight, bias, topk_weights, *_: (rows, weight, bias, topk_weights),
    allocate=lambda rows, weight, *rest: rows.new_empty((rest[-1], weight.shape[1])),
    call=_call,
    launch=_launch,
)


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    layout: Layout | None = None,
    expert_offsets: Tensor | None = None,
    expert_num_tokens: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Multiplies each row by the weights of its expert; `layout`, `expert_offsets` or `expert_num_tokens` names it.

    Args:
        rows: float32, bfloat16, float16 or float64. With `layout` [num_tokens, hidden_size] (a token's row serves all
            its routes) or [num_tokens * top_k, hidden_size] (one row per route); with `expert_offsets` [num_rows,
            hidden_size]; with `expert_num_tokens` [num_local_experts, max_num_tokens, hidden_size].
        weight: [num_local_experts, columns, hidden_size] of the dtype of `rows`.
        bias: [num_local_experts, columns] of that dtype, added to the product.
        topk_weights: [num_tokens, top_k] float32, multiplies product plus bias; with `layout` alone.
        layout: results are by route, [num_tokens * top_k, columns], whatever its block_size.
        expert_offsets: [num_local_experts + 1] int64: expert e has the rows from offset e to offset e + 1, as
            `permute` leaves them with block_size 1. An offset below an earlier one counts as the earlier one, so that
            no row has two experts.
        expert_num_tokens: [num_local_experts] int32: the valid rows of each expert's batch.
        out: the result's shape, dtype of `rows`, to overwrite.

    Returns rows of `columns`, summed in float32 (float64 rows: in float64) and rounded once. Rows of dropped routes,
    past the last offset or past an expert's count hold nothing. Raises TypeError or ValueError naming the argument.
    """
    ways = {"layout": layout, "expert_offsets": expert_offsets, "expert_num_tokens": expert_num_tokens}
    given = [name for name, way in ways.items() if way is not None]
    if len(given) != 1:
        raise ValueError(f"layout: expected exactly one of {tuple(ways)}, got {given or None}")
    check_tensor("rows", rows, dtypes=FLOATS, ndim=(3,) if expert_num_tokens is not None else (2,))
    check_tensor("weight", weight, dtypes=(rows.dtype,), ndim=(3,), device=rows.device)
    experts, columns, size = weight.shape
    if rows.shape[-1] != size:
        raise ValueError(f"rows: expected {size} columns (as weight has), got {rows.shape[-1]}")
    if bias is not None:
        check_tensor("bias", bias, dtypes=(rows.dtype,), ndim=(2,), device=rows.device)
        check_shape("bias", bias, (experts, columns), "one row per expert")
    if topk_weights is not None:
        if layout is None:
            raise ValueError("topk_weights: expected a layout beside them, got none")
        check_layout(layout)
        check_tensor("topk_weights", topk_weights, dtypes=(torch.float32,), ndim=(2,), device=rows.device)
        check_shape(
            "topk_weights", topk_weights, (layout.num_routes // layout.top_k, layout.top_k), "the routes of layout"
        )
    segments = _segments(rows, experts, layout, expert_offsets, expert_num_tokens)
    shape = (*rows.shape[:-1], columns) if layout is None else (layout.num_routes, columns)
    if out is not None:
        check_out("out", out, shape, rows.dtype, rows.device)
    num_results = shape[0] if len(shape) == 2 else shape[0] * shape[1]
    result: Tensor = GROUPED_GEMM(
        (rows.reshape(-1, size), weight, bias, topk_weights, segments, num_results),
        impl,
        None if out is None else out.view(-1, columns),
    )
    return result.view(shape) if out is None else out


def _segments(
    rows: Tensor, experts: int, layout: Layout | None, offsets: Tensor | None, counts: Tensor | None
) -> Segments:
    """The segments that layout, offsets or counts describe: the one of them that is given."""
    if layout is not None:
        check_layout(layout)
        if layout.num_local_experts != experts:
            raise ValueError(f"weight: expected {layout.num_local_experts} experts (as layout has), got {experts}")
        routes, top_k = layout.num_routes, layout.top_k
        if rows.shape[0] not in (routes, routes // top_k):
            raise ValueError(f"rows: expected {routes // top_k} or {routes} rows (of layout), got {rows.shape[0]}")
        divisor = 1 if rows.shape[0] == routes else top_k
        first_rows, slots = layout.expert_offsets[:-1], layout.sorted_token_ids
        return Segments(first_rows, layout.expert_counts, slots, divisor, layout.num_experts)
    if offsets is not None:
        check_tensor("expert_offsets", offsets, dtypes=(torch.int64,), ndim=(1,), device=rows.device)
        check_shape("expert_offsets", offsets, (experts + 1,), "one more than experts")
        bounds = offsets.clamp(0, rows.shape[0]).cummax(0).values
        held = torch.sub(bounds[1:], bounds[:-1], out=bounds.new_empty(experts, dtype=torch.int32))
        return Segments(bounds[:-1], held)
    assert counts is not None
    check_tensor("expert_num_tokens", counts, dtypes=(torch.int32,), ndim=(1,), device=rows.device)
    check_shape("expert_num_tokens", counts, (experts,), "one per expert")
    batches, most = rows.shape[:2]
    if batches != experts:
        raise ValueError(f"rows: expected {experts} batches (the experts of weight), got {batches}")
    firsts = torch.arange(0, experts * max(most, 1), max(most, 1), device=rows.device)
    return Segments(firsts, counts.clamp(0, most))
