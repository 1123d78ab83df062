"""rows x expert weights -> rows: every row times the weights of its expert."""

from typing import Any

import torch
from torch import Tensor

from moeyard.combine import held_results, sum_neighbours, sums_in_order
from moeyard.dispatch.call import Call, call_of_sums, facts_of_matrices
from moeyard.dispatch.checks import FLOATS, check_layout, check_out, check_shape, check_tensor, dtypes_of_weights
from moeyard.dispatch.op import Gradient, Op
from moeyard.dispatch.table import for_gradients
from moeyard.values import Layout, Segments


def _flatten(
    rows: Tensor, weight: Tensor, bias: Tensor | None, topk_weights: Tensor | None, segments: Segments, num_results: int
) -> tuple[Any, ...]:  # fmt: skip
    first_rows, row_counts, slots, divisor, num_experts, invariant = segments
    where = (slots, divisor, first_rows, row_counts, num_experts)
    return rows, weight, bias, topk_weights, *where, num_results, invariant


def _gather(*flat: Any) -> tuple[Any, ...]:
    *operands, slots, divisor, first_rows, row_counts, num_experts, num_results, invariant = flat
    return *operands, Segments(first_rows, row_counts, slots, divisor, num_experts, invariant), num_results


def _call(rows: Tensor, weight: Tensor, *rest: Any) -> Call | None:
    invariant = rest[-2].batch_invariant
    if rows.is_cpu and not invariant:  # where no implementation looks at sizes
        return None
    facts = facts_of_matrices(weight, rows.dtype, alone=rest[0] is None and rest[1] is None)
    return Call(rows.device, rows.dtype, facts, rest[-1], batch_invariant=invariant)


def _launch(launch: Any, out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> None:
    topk_weights, segments, _ = rest
    launch(rows, weight.to(rows.dtype), _like(bias, rows), topk_weights, segments, out=out)


def _like(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """A tensor at the dtype of rows: masters of weights may be float32 beside rows of 16 bits."""
    return None if tensor is None else tensor.to(rows.dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    rows, weight, bias, topk_weights, slots, ctx.divisor, first_rows, row_counts, ctx.num_experts, *rest = inputs
    (ctx.num_results, ctx.impl, ctx.invariant), needs = rest, ctx.needs_input_grad
    weight = weight if needs[0] or needs[1] or needs[3] else None
    kept = (rows if needs[1] or needs[3] else None, weight, bias if needs[2] or needs[3] else None, topk_weights)
    ctx.save_for_backward(*kept, slots, first_rows, row_counts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *operands, slots, first_rows, row_counts = ctx.saved_tensors
    segments = Segments(first_rows, row_counts, slots, ctx.divisor, ctx.num_experts, ctx.invariant)
    found = product_gradients(grad, tuple(operands), segments, ctx.needs_input_grad[:4], ctx.impl)
    return *found, *(None,) * 8


def product_gradients(
    grad: Tensor, operands: tuple[Tensor | None, ...], segments: Segments, needs: tuple[bool, ...], impl: str
) -> tuple[Tensor | None, ...]:
    """Gradients of rows, weight, bias and topk_weights of a grouped product, of those that `needs` asks for.

    Args:
        grad: [num_results, columns], the gradient of the result. Rows of no expert are not read.
        operands: rows, weight, bias and topk_weights of the product; those that no gradient needs may be None.
        segments: those of the product.
        impl: that of the product.

    Gradients of weights and biases have the dtype of these, also of float32 masters beside rows of 16 bits. Every sum
    goes over rows in the order of their slots. All steps are operators, so that gradients have gradients. Of a
    batch-invariant product a row's gradients do not depend on the other rows, either.
    """
    (rows, weight, bias, topk_weights), num_results, impl = operands, grad.shape[0], for_gradients(impl)
    found: list[Tensor | None] = [None] * 4
    weighted = grad if topk_weights is None else (grad * topk_weights.reshape(-1, 1)).to(grad.dtype)
    one_to_one, held = segments._replace(divisor=1), held_results(segments, num_results)
    if needs[0]:
        assert weight is not None
        turned = weight.to(grad.dtype).transpose(1, 2)
        found[0] = _spread_sums(weighted, turned, one_to_one, held, segments.divisor, impl)
    if needs[1]:
        assert rows is not None and weight is not None
        found[1] = outer_sums(weighted, rows, one_to_one, segments.divisor, weight.dtype, impl)
    if needs[2]:
        assert bias is not None
        found[2] = row_sums(weighted, one_to_one, num_results, bias.dtype, impl)
    if needs[3]:
        assert rows is not None and weight is not None and topk_weights is not None
        plain = GROUPED_GEMM((rows, weight, bias, None, segments, num_results), impl)
        wide = torch.promote_types(grad.dtype, torch.float32)
        products = grad.to(wide) * plain
        sums = sums_in_order(products, impl) if segments.batch_invariant else products.sum(1)
        dots = torch.where(held, sums, 0)
        found[3] = dots.to(topk_weights.dtype).view_as(topk_weights)
    return tuple(found)


_MOST_SPREAD_BYTES = 1 << 28
"""Of rows that a product leaves before neighbours are added up: wider ones are made in parts of columns."""
_COLUMNS_OF_A_PART = 256
"""Columns of parts are a multiple of these."""


def width_of_parts(num_results: int, columns: int, itemsize: int, divisor: int) -> int:
    """Columns of results that are made at a time, where every `divisor` of them are added up."""
    if divisor == 1 or num_results * columns * itemsize <= _MOST_SPREAD_BYTES:
        return max(columns, 1)
    fitting = _MOST_SPREAD_BYTES // (num_results * itemsize)
    return max(fitting // _COLUMNS_OF_A_PART, 1) * _COLUMNS_OF_A_PART


def _spread_sums(rows: Tensor, matrices: Tensor, segments: Segments, held: Tensor, divisor: int, impl: str) -> Tensor:
    """[num_results / divisor, columns]: products of rows [num_results, _], every `divisor` of them added up.

    No column meets another, so that parts of columns give the bits of the whole, and take less memory.
    """
    num_results, parts = rows.shape[0], []
    for part in matrices.split(width_of_parts(num_results, matrices.shape[1], rows.itemsize, divisor), 1):
        spread = GROUPED_GEMM((rows, part, None, None, segments, num_results), impl)
        parts.append(sum_neighbours(spread, held, divisor, impl))
        del spread  # before the next one is made
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def outer_sums(
    grads: Tensor, rows: Tensor, segments: Segments, row_divisor: int, dtype: torch.dtype, impl: str
) -> Tensor:
    """[num_experts, columns, size]: per expert the sum of grads[r // divisor] x rows[r // row_divisor] over its rows r.

    `dtype` is that of `grads` or, wider, float32. `segments` has the divisor of `grads` [_, columns]; rows [_, size].
    """
    first_rows, row_counts, slots, divisor, *_ = segments
    wide = dtype != grads.dtype
    result: Tensor = GROUPED_OUTER(
        (grads, rows, slots, divisor, row_divisor, first_rows, row_counts, wide), for_gradients(impl)
    )
    return result


def row_sums(grads: Tensor, segments: Segments, num_results: int, dtype: torch.dtype, impl: str) -> Tensor:
    """[num_experts, columns]: per expert the sum of its rows."""
    return outer_sums(grads, grads.new_ones(1, 1), segments, max(1, num_results), dtype, impl).squeeze(2)


GROUPED_GEMM = Op(
    "grouped_gemm(Tensor rows, Tensor weight, Tensor? bias, Tensor? topk_weights, Tensor? sorted_token_ids, "
    "SymInt row_divisor, Tensor first_rows, Tensor row_counts, SymInt num_experts, SymInt num_results, str impl, "
    "bool batch_invariant=False) -> Tensor",
    flatten=_flatten,
    gather=_gather,
    seen=lambda rows, weight, bias, topk_weights, *_: (rows, weight, bias, topk_weights),
    allocate=lambda rows, weight, *rest: rows.new_empty((rest[-1], weight.shape[1])),
    call=_call,
    launch=_launch,
    gradient=Gradient(("rows", "weight", "bias", "topk_weights"), _setup, _backward),
)


def _allocate_outer(grads: Tensor, rows: Tensor, *rest: Any) -> Tensor:
    *_, row_counts, wide = rest
    dtype = torch.float32 if wide else grads.dtype
    return grads.new_empty((row_counts.shape[0], grads.shape[1], rows.shape[1]), dtype=dtype)


def _launch_outer(launch: Any, out: Tensor, grads: Tensor, rows: Tensor, *rest: Any) -> None:
    slots, divisor, row_divisor, first_rows, row_counts, _ = rest
    launch(grads, rows, Segments(first_rows, row_counts, slots, divisor), row_divisor, out=out)


def _outer_setup(ctx: Any, inputs: Any, output: Any) -> None:
    grads, rows, slots, ctx.divisor, ctx.row_divisor, first_rows, row_counts, _, ctx.impl = inputs
    ctx.save_for_backward(grads, rows, slots, first_rows, row_counts)


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Products of one operand are the gradient of the other."""
    grads, rows, slots, first_rows, row_counts = ctx.saved_tensors
    segments, weight = Segments(first_rows, row_counts, slots), grad.to(grads.dtype)
    found: list[Tensor | None] = [None, None]
    sides = (
        (rows, ctx.row_divisor, weight, ctx.divisor),
        (grads, ctx.divisor, weight.transpose(1, 2), ctx.row_divisor),
    )
    for i, (source, from_divisor, matrices, to_divisor) in enumerate(sides):
        if ctx.needs_input_grad[i]:
            num_results = ctx.divisor * grads.shape[0]
            apart = segments._replace(divisor=from_divisor)
            spread = GROUPED_GEMM((source, matrices, None, None, apart, num_results), ctx.impl)
            found[i] = sum_neighbours(spread, held_results(segments, num_results), to_divisor, ctx.impl)
    return *found, *(None,) * 7


GROUPED_OUTER = Op(
    "grouped_outer(Tensor grads, Tensor rows, Tensor? sorted_token_ids, SymInt grad_divisor, SymInt row_divisor, "
    "Tensor first_rows, Tensor row_counts, bool wide, str impl) -> Tensor",
    allocate=_allocate_outer,
    call=call_of_sums,
    launch=_launch_outer,
    gradient=Gradient(("grads", "rows"), _outer_setup, _outer_backward),
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
        weight: [num_local_experts, columns, hidden_size] of the dtype of `rows`; under torch.autocast to that dtype
            also float32, rounded to it here.
        bias: [num_local_experts, columns] of a dtype that `weight` may have, added to the product.
        topk_weights: [num_tokens, top_k] float32, multiplies product plus bias; with `layout` alone.
        layout: results are by route, [num_tokens * top_k, columns], whatever its block_size.
        expert_offsets: [num_local_experts + 1] int64: expert e has the rows from offset e to offset e + 1, as
            `permute` leaves them with block_size 1. An offset below an earlier one counts as the earlier one, so that
            no row has two experts.
        expert_num_tokens: [num_local_experts] int32: the valid rows of each expert's batch.
        out: the result's shape, dtype of `rows`, to overwrite.

    Returns rows of `columns`, summed in float32 (float64 rows: in float64) and rounded once. Rows of dropped routes,
    past the last offset or past an expert's count hold nothing. Gradients flow to rows, weight, bias and topk_weights;
    they are products by the same rules, and `GROUPED_OUTER`. Raises TypeError or ValueError naming the argument.
    """
    ways = {"layout": layout, "expert_offsets": expert_offsets, "expert_num_tokens": expert_num_tokens}
    given = [name for name, way in ways.items() if way is not None]
    if len(given) != 1:
        raise ValueError(f"layout: expected exactly one of {tuple(ways)}, got {given or None}")
    check_tensor("rows", rows, dtypes=FLOATS, ndim=(3,) if expert_num_tokens is not None else (2,))
    check_tensor("weight", weight, dtypes=dtypes_of_weights(rows), ndim=(3,), device=rows.device)
    experts, columns, size = weight.shape
    if rows.shape[-1] != size:
        raise ValueError(f"rows: expected {size} columns (as weight has), got {rows.shape[-1]}")
    if bias is not None:
        check_tensor("bias", bias, dtypes=dtypes_of_weights(rows), ndim=(2,), device=rows.device)
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
