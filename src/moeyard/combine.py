"""rows -> hidden_states: each token's expert outputs, weighted and summed in a fixed order."""

import torch
from torch import Tensor

from moeyard.checks import ID_DTYPES, check_out, check_shape, check_tensor
from moeyard.ids import narrow_ids
from moeyard.impls import launcher
from moeyard.library import goes_straight
from moeyard.values import Layout

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    check_tensor("rows", rows, dtypes=_FLOATS, ndim=(2,), device=layout.route_rows.device)
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
    if not goes_straight(rows, route_rows, topk_weights):
        result = torch.ops.moeyard.combine(rows, route_rows, topk_weights, top_k, impl)
        return result if out is None else out.copy_(result)
    if out is None:
        out = rows.new_empty(shape)
    launcher("combine", impl, rows.device, rows.dtype)(rows, topk_weights, route_rows=route_rows, top_k=top_k, out=out)
    return out


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
        topk_ids: [num_tokens, top_k] int32, int64 or uint32: routes with an id below 0 are not read.
        expert_map: [num_experts] int32: routes whose id it sends below 0, or does not hold, are not read either.
        out: [num_tokens, hidden_size] of the dtype of `rows`, to overwrite.

    Returns [num_tokens, hidden_size], summed as in `combine`. Follows vLLM's `moe_sum`.
    """
    check_tensor("rows", rows, dtypes=_FLOATS, ndim=(3,))
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
    if not goes_straight(rows, topk_ids, expert_map):
        result = torch.ops.moeyard.moe_sum(rows, topk_ids, expert_map, impl)
        return result if out is None else out.copy_(result)
    if out is None:
        out = rows.new_empty(shape)
    ids = None if topk_ids is None else narrow_ids(topk_ids)
    launcher("moe_sum", impl, rows.device, rows.dtype)(rows, ids, expert_map, out=out)
    return out
