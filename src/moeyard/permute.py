"""hidden_states -> rows grouped by expert; the inverse is `combine`."""

from typing import Any

import torch
from torch import Tensor

from moeyard.dispatch.checks import check_int, check_layout, check_out, check_shape, check_tensor
from moeyard.dispatch.op import Gradient, Op, ops
from moeyard.values import Layout, Permuted

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _allocate(hidden_states: Tensor, scales: Tensor | None, sorted_token_ids: Tensor, *_: Any) -> Permuted:
    capacity = sorted_token_ids.shape[0]
    rows = hidden_states.new_empty((capacity, hidden_states.shape[1]))
    return Permuted(rows, None if scales is None else scales.new_empty((capacity, *scales.shape[1:])))


def _launch(
    launch: Any, out: Permuted, hidden_states: Tensor, scales: Tensor | None, slots: Tensor, routes: Tensor, top_k: int
) -> None:
    launch(
        hidden_states, scales, sorted_token_ids=slots, route_rows=routes, top_k=top_k, rows=out.rows,
        row_scales=out.scales,
    )  # fmt: skip


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, _, route_rows, ctx.top_k, _ = inputs
    ctx.save_for_backward(route_rows)
    if output[1].is_floating_point():
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_rows: Tensor, _grad_scales: Any) -> tuple[Any, ...]:
    """The transpose of `permute` is `combine`, by what takes the dtype: what moves rows need not sum them."""
    (route_rows,) = ctx.saved_tensors
    return ops.combine(grad_rows, route_rows, None, ctx.top_k, "auto"), None, None, None, None, None


PERMUTE = Op(
    "permute(Tensor hidden_states, Tensor? scales, Tensor sorted_token_ids, Tensor route_rows, SymInt top_k, "
    "str impl) -> (Tensor rows, Tensor row_scales)",
    allocate=_allocate,
    launch=_launch,
    assemble=lambda fields, _hidden, scales, *_: Permuted(fields[0], None if scales is None else fields[1]),
    gradient=Gradient(("hidden_states",), _setup, _backward),
)


def _allocate_fp8(
    hidden_states: Tensor, sorted_token_ids: Tensor, _routes: Tensor, _top_k: int, group_size: int | None
) -> Permuted:
    capacity, hidden_size = sorted_token_ids.shape[0], hidden_states.shape[1]
    groups = () if group_size is None else (hidden_size // group_size,)
    rows = hidden_states.new_empty((capacity, hidden_size), dtype=torch.float8_e4m3fn)
    return Permuted(rows, hidden_states.new_empty((capacity, *groups), dtype=torch.float32))


def _launch_fp8(
    launch: Any, out: Permuted, hidden_states: Tensor, slots: Tensor, routes: Tensor, top_k: int, group_size: int | None
) -> None:
    launch(
        hidden_states, sorted_token_ids=slots, route_rows=routes, top_k=top_k, group_size=group_size, rows=out.rows,
        row_scales=out.scales,
    )  # fmt: skip


PERMUTE_TO_FP8 = Op(
    "permute_to_fp8(Tensor hidden_states, Tensor sorted_token_ids, Tensor route_rows, SymInt top_k, int? group_size, "
    "str impl) -> (Tensor rows, Tensor row_scales)",
    allocate=_allocate_fp8,
    launch=_launch_fp8,
    assemble=lambda fields, *_: Permuted(*fields),
)


def _shuffle_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.num_rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _shuffle_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Every row of the input sums the rows that it was copied to, in their order, in float32, rounded once."""
    (sources,) = ctx.saved_tensors
    valid = (sources >= 0) & (sources < ctx.num_rows)
    order = torch.sort(torch.where(valid, sources, ctx.num_rows).long(), stable=True)
    ends = torch.searchsorted(order.values, torch.arange(ctx.num_rows + 1, device=grad.device))
    wide = grad[order.indices].to(torch.promote_types(grad.dtype, torch.float32))
    total = torch.segment_reduce(wide, "sum", offsets=ends, axis=0, unsafe=True, initial=0)
    return total.to(grad.dtype), None, None


SHUFFLE_ROWS = Op(
    "shuffle_rows(Tensor input, Tensor dst2src_map, str impl) -> Tensor",
    allocate=lambda input, dst2src_map: input.new_empty((dst2src_map.shape[0], input.shape[1])),
    launch=lambda launch, out, input, dst2src_map: launch(input, dst2src_map, out=out),
    gradient=Gradient(("input",), _shuffle_setup, _shuffle_backward),
)


def _without_conjugation(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its values: a complex one may be conjugated by a bit alone."""
    return tensor.resolve_conj() if tensor.dtype.is_complex else tensor


def check_permuted_out(
    out: object,
    layout: Layout,
    device: torch.device,
    row: tuple[int, ...],
    dtype: torch.dtype,
    scales: tuple[tuple[int, ...], torch.dtype] | None,
) -> None:
    """`out` fits: `row` is the shape of a row; `scales` the shape of a row's scales and their dtype."""
    if not isinstance(out, Permuted):
        raise TypeError(f"out: expected a Permuted, got {type(out).__name__}")
    check_out("out.rows", out.rows, (layout.capacity, *row), dtype, device)
    if scales is not None:
        check_out("out.scales", out.scales, (layout.capacity, *scales[0]), scales[1], device)
    elif out.scales is not None:
        raise ValueError("out.scales: expected None (no scales were given), got a tensor")


def permute(
    hidden_states: Tensor,
    layout: Layout,
    *,
    scales: Tensor | None = None,
    out: Permuted | None = None,
    impl: str = "auto",
) -> Permuted:
    """Copies each token's row to the slots of its routes, and its quantisation scales with it.

    Args:
        hidden_states: [num_tokens, hidden_size] of any dtype; rows may be strided.
        layout: of the same tokens. With block_size 1 the rows are compact: `expert_offsets` then are what vLLM calls
            `expert_first_token_offset`. With a larger block_size, rows of padding slots stay unwritten.
        scales: [num_tokens] or [num_tokens, groups] of any dtype, moved along bit by bit.
        out: tensors to overwrite, of the shapes and dtypes of the result.

    Returns `Permuted(rows [capacity, hidden_size], scales)`. Gradients flow to `hidden_states`, not to scales.
    Raises TypeError or ValueError naming the argument. Follows vLLM's `moe_permute`.
    """
    check_layout(layout)
    check_tensor("hidden_states", hidden_states, ndim=(2,), device=layout.route_rows.device)
    num_tokens = layout.num_routes // layout.top_k
    check_shape("hidden_states", hidden_states, (num_tokens, hidden_states.shape[1]), "the tokens of layout")
    if scales is not None:
        check_tensor("scales", scales, ndim=(1, 2), device=hidden_states.device)
        check_shape("scales", scales, (num_tokens, *scales.shape[1:]), "one row per token")
    if out is not None:
        of_scales = None if scales is None else (tuple(scales.shape[1:]), scales.dtype)
        check_permuted_out(
            out, layout, hidden_states.device, tuple(hidden_states.shape[1:]), hidden_states.dtype, of_scales
        )
    hidden_states = _without_conjugation(hidden_states)
    scales = None if scales is None else _without_conjugation(scales)
    permuted: Permuted = PERMUTE(
        (hidden_states, scales, layout.sorted_token_ids, layout.route_rows, layout.top_k), impl, out
    )
    return permuted


def permute_to_fp8(
    hidden_states: Tensor,
    layout: Layout,
    *,
    group_size: int | None = None,
    out: Permuted | None = None,
    impl: str = "auto",
) -> Permuted:
    """`permute` that quantises on its way: each row is read and quantised once, then written to its slots.

    Args:
        hidden_states: [num_tokens, hidden_size] float32, bfloat16 or float16 of finite values; rows may be strided.
        layout: as in `permute`.
        group_size: None for one scale per token; 128 for one per 128 neighbours (hidden_size is a multiple then).
        out: tensors to overwrite, of the shapes and dtypes of the result.

    Returns `Permuted(rows [capacity, hidden_size] float8_e4m3fn, scales [capacity] or [capacity, hidden_size / 128]
    float32)`: scale = max(largest magnitude, 1e-10) / 448, rows = value / scale rounded to nearest even, in float32.
    A NaN or an infinity makes its scale NaN or infinite. Raises TypeError or ValueError naming the argument. Follows
    vLLM's `per_token_group_quant_fp8` before its `moe_permute`.
    """
    check_layout(layout)
    check_tensor("hidden_states", hidden_states, dtypes=_FLOATS, ndim=(2,), device=layout.route_rows.device)
    num_tokens, hidden_size = layout.num_routes // layout.top_k, hidden_states.shape[1]
    check_shape("hidden_states", hidden_states, (num_tokens, hidden_size), "the tokens of layout")
    if group_size not in (None, 128):
        raise ValueError(f"group_size: expected None or 128, got {group_size!r}")
    if group_size is not None and hidden_size % group_size:
        raise ValueError(f"hidden_states: expected a hidden size that is a multiple of {group_size}, got {hidden_size}")
    check_int("hidden_states.shape[1]", hidden_size, low=1)
    if out is not None:
        groups = () if group_size is None else (hidden_size // group_size,)
        check_permuted_out(
            out, layout, hidden_states.device, (hidden_size,), torch.float8_e4m3fn, (groups, torch.float32)
        )
    permuted: Permuted = PERMUTE_TO_FP8(
        (hidden_states, layout.sorted_token_ids, layout.route_rows, layout.top_k, group_size), impl, out
    )
    return permuted


def shuffle_rows(input: Tensor, dst2src_map: Tensor, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Gathers rows by a map: row i of the result is row `dst2src_map[i]` of the input.

    Args:
        input: [num_rows, hidden_size] of any dtype; rows may be strided.
        dst2src_map: [num_results] int32 or int64; values outside [0, num_rows) give a row of zeros.
        out: [num_results, hidden_size] to overwrite.

    Returns [num_results, hidden_size]. Gradients flow to `input`: float32 sums in the order of results, rounded once.
    Follows vLLM's `shuffle_rows`.
    """
    check_tensor("input", input, ndim=(2,))
    check_tensor("dst2src_map", dst2src_map, dtypes=(torch.int32, torch.int64), ndim=(1,), device=input.device)
    shape = (dst2src_map.shape[0], input.shape[1])
    if out is not None:
        check_out("out", out, shape, input.dtype, input.device)
    result: Tensor = SHUFFLE_ROWS((_without_conjugation(input), dst2src_map), impl, out)
    return result
