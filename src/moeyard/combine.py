"""rows -> hidden_states: each token's expert outputs, weighted and summed in a fixed order."""

from typing import Any

import torch
from torch import Tensor

from moeyard.dispatch.checks import FLOATS, ID_DTYPES, check_layout, check_out, check_shape, check_tensor
from moeyard.dispatch.ids import local_expert_ids, narrow_ids
from moeyard.dispatch.op import Gradient, Op
from moeyard.dispatch.table import among
from moeyard.values import Layout, Segments


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    rows, route_rows, topk_weights, ctx.top_k, _ = inputs
    ctx.save_for_backward(rows, route_rows, topk_weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """A row's gradient is its token's, weighted; a weight's is the product of its row and its token's gradient."""
    rows, route_rows, topk_weights = ctx.saved_tensors
    wide = torch.promote_types(rows.dtype, torch.float32)
    valid = (route_rows >= 0).unsqueeze(1)
    slots = torch.where(route_rows >= 0, route_rows, rows.shape[0])  # one more row takes what is dropped
    routes = grad.repeat_interleave(ctx.top_k, dim=0)
    grad_weights = None
    if ctx.needs_input_grad[2]:
        taken = torch.where(valid, rows[route_rows.clamp(min=0)], 0).to(wide)
        grad_weights = (taken * routes.to(wide)).sum(1).to(topk_weights.dtype).view_as(topk_weights)
    if topk_weights is not None:
        routes = routes.to(wide) * topk_weights.reshape(-1, 1)
    base = rows.new_zeros(rows.shape[0] + 1, rows.shape[1])
    grad_rows = base.index_copy(0, slots.long(), torch.where(valid, routes, 0).to(rows.dtype))[:-1]
    return grad_rows, None, grad_weights, None, None


COMBINE = Op(
    "combine(Tensor rows, Tensor route_rows, Tensor? topk_weights, SymInt top_k, str impl) -> Tensor",
    allocate=lambda rows, route_rows, weights, top_k: rows.new_empty((route_rows.shape[0] // top_k, rows.shape[1])),
    launch=lambda launch, out, rows, route_rows, weights, top_k: launch(
        rows, weights, route_rows=route_rows, top_k=top_k, out=out
    ),
    gradient=Gradient(("rows", "topk_weights"), _setup, _backward),
)


def _moe_sum_setup(ctx: Any, inputs: Any, output: Any) -> None:
    rows, topk_ids, expert_map, _ = inputs
    ctx.shape = rows.shape
    ctx.save_for_backward(topk_ids, expert_map)


def _moe_sum_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    topk_ids, expert_map = ctx.saved_tensors
    spread = grad.unsqueeze(1).expand(ctx.shape)
    if topk_ids is not None:
        taken = local_expert_ids(narrow_ids(topk_ids), expert_map) >= 0
        spread = torch.where(taken.unsqueeze(2), spread, 0)
    return spread, None, None, None


MOE_SUM = Op(
    "moe_sum(Tensor rows, Tensor? topk_ids, Tensor? expert_map, str impl) -> Tensor",
    allocate=lambda rows, *_: rows.new_empty((rows.shape[0], rows.shape[2])),
    launch=lambda launch, out, rows, ids, expert_map: launch(
        rows, None if ids is None else narrow_ids(ids), expert_map, out=out
    ),
    gradient=Gradient(("rows",), _moe_sum_setup, _moe_sum_backward),
)


def combine(
    rows: Tensor,
    layout: Layout,
    topk_weights: Tensor | None = None,
    *,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sums the rows of each token's routes, weighted: the inverse of `permute`.

    Args:
        rows: [capacity, hidden_size] float32, bfloat16, float16 or float64, in the layout's slots.
        layout: where the routes are. Dropped routes count as zero, and padding rows are never read.
        topk_weights: [num_tokens, top_k] float32; 1 unless given.
        out: [num_tokens, hidden_size] of the dtype of `rows`, to overwrite.

    Returns [num_tokens, hidden_size]: products and sums in float32 (float64 rows: in float64), in k order, rounded
    once; so the same inputs always give the same bits. Gradients flow to `rows` and `topk_weights`.
    Raises TypeError or ValueError naming the argument. Follows vLLM's `moe_unpermute`.
    """
    check_layout(layout)
    check_tensor("rows", rows, dtypes=FLOATS, ndim=(2,), device=layout.route_rows.device)
    check_shape("rows", rows, (layout.capacity, rows.shape[1]), "the slots of layout")
    if topk_weights is not None:
        check_tensor("topk_weights", topk_weights, dtypes=(torch.float32,), ndim=(2,), device=rows.device)
        shape = (layout.num_routes // layout.top_k, layout.top_k)
        check_shape("topk_weights", topk_weights, shape, "the tokens and top_k of layout")
    return combine_routes(rows, layout.route_rows, topk_weights, layout.top_k, out=out, impl=impl)


def combine_routes(
    rows: Tensor, route_rows: Tensor, topk_weights: Tensor | None, top_k: int, *, out: Tensor | None, impl: str
) -> Tensor:
    """`combine` from the inverse map alone: row `route_rows[t * top_k + k]` of `rows`, nothing where it is -1."""
    shape = (route_rows.shape[0] // top_k, rows.shape[1])
    if out is not None:
        check_out("out", out, shape, rows.dtype, rows.device)
    result: Tensor = COMBINE((rows, route_rows, topk_weights, top_k), impl, out)
    return result


def held_results(segments: Segments, num_results: int) -> Tensor:
    """[num_results] bool: whether an expert has a row of the result."""
    first_rows, row_counts, slots, *_ = segments
    if slots is not None:
        held = torch.zeros(num_results + 1, dtype=torch.bool, device=slots.device)
        return held.scatter(0, slots.long().clamp(0, num_results), True)[:-1]
    row = torch.arange(num_results, device=first_rows.device)
    expert = torch.searchsorted(first_rows, row, right=True) - 1
    inside = row < (first_rows + row_counts)[expert.clamp(min=0)]
    return inside & (expert >= 0)


def sum_neighbours(rows: Tensor, held: Tensor, divisor: int, impl: str) -> Tensor:
    """Every `divisor` rows added up in float32, in their order; those that are not held count as zero."""
    if divisor == 1:
        return rows.masked_fill(~held.unsqueeze(1), 0)
    where = torch.where(held, torch.arange(rows.shape[0], device=rows.device), -1).int()
    return combine_routes(rows, where, None, divisor, out=None, impl=among("combine", impl))


def sums_in_order(rows: Tensor, impl: str) -> Tensor:
    """[num_rows]: each row's values added up in their order, so that no sum depends on how many rows there are."""
    num_rows, columns = rows.shape
    if not rows.numel():
        return rows.new_zeros(num_rows)
    parts = []
    for part in rows.split(max(1, _MOST_VALUES // columns)):
        where = torch.arange(part.numel(), dtype=torch.int32, device=rows.device)
        values = part.reshape(-1, 1)
        parts.append(combine_routes(values, where, None, columns, out=None, impl=among("combine", impl)))
    return torch.cat(parts).squeeze(1)


_MOST_VALUES = 1 << 30
"""Of rows whose values int32 counts."""


def moe_sum(
    rows: Tensor,
    *,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sums [num_tokens, top_k, hidden_size] over top_k, in k order.

    Args:
        rows: float32, bfloat16, float16 or float64, of any strides.
        topk_ids: [num_tokens, top_k] int32, int64 or uint32: routes with an id below 0, or of 2^31 - 1 and above, are
            not read.
        expert_map: [num_experts] int32: routes whose id it sends below 0, or does not hold, are not read either.
        out: [num_tokens, hidden_size] of the dtype of `rows`, to overwrite.

    Returns [num_tokens, hidden_size], summed as in `combine`. Follows vLLM's `moe_sum`.
    """
    check_tensor("rows", rows, dtypes=FLOATS, ndim=(3,))
    if expert_map is not None:
        if topk_ids is None:
            raise ValueError("topk_ids: expected ids beside expert_map, got None")
        check_tensor("expert_map", expert_map, dtypes=(torch.int32,), ndim=(1,), device=rows.device)
    if topk_ids is not None:
        check_tensor("topk_ids", topk_ids, dtypes=ID_DTYPES, ndim=(2,), device=rows.device)
        check_shape("topk_ids", topk_ids, (rows.shape[0], rows.shape[1]), "the tokens and top_k of rows")
    shape = (rows.shape[0], rows.shape[2])
    if out is not None:
        check_out("out", out, shape, rows.dtype, rows.device)
    result: Tensor = MOE_SUM((rows, topk_ids, expert_map), impl, out)
    return result
