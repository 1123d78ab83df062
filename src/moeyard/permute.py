"""hidden_states -> rows grouped by expert; the inverse is `combine`."""

import torch
from torch import Tensor

from moeyard.checks import check_int, check_out, check_shape, check_tensor
from moeyard.impls import launcher
from moeyard.library import goes_straight
from moeyard.outputs import allocate_fp8, check_permuted_out
from moeyard.values import Layout, Permuted

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    check_tensor("hidden_states", hidden_states, ndim=(2,), device=layout.route_rows.device)
    num_tokens = layout.num_routes // layout.top_k
    check_shape("hidden_states", hidden_states, (num_tokens, hidden_states.shape[1]), "the tokens of layout")
    if scales is not None:
        check_tensor("scales", scales, ndim=(1, 2), device=hidden_states.device)
        check_shape("scales", scales, (num_tokens, *scales.shape[1:]), "one row a token")
        if scales.requires_grad and torch.is_grad_enabled():
            raise ValueError("scales: expected a tensor that needs no gradient, got one with requires_grad=True")
    if out is not None:
        of_scales = None if scales is None else (tuple(scales.shape[1:]), scales.dtype)
        check_permuted_out(
            out, layout, hidden_states.device, tuple(hidden_states.shape[1:]), hidden_states.dtype, of_scales
        )
    if not goes_straight(hidden_states, scales):
        rows, moved = torch.ops.moeyard.permute(
            hidden_states, scales, layout.sorted_token_ids, layout.route_rows, layout.top_k, impl
        )
        result = Permuted(rows, None if scales is None else moved)
        return result if out is None else out.copy_(result)
    if out is None:
        rows = hidden_states.new_empty((layout.capacity, hidden_states.shape[1]))
        out = Permuted(rows, None if scales is None else scales.new_empty((layout.capacity, *scales.shape[1:])))
    launch = launcher("permute", impl, hidden_states.device, hidden_states.dtype)
    launch(
        hidden_states,
        scales,
        sorted_token_ids=layout.sorted_token_ids,
        route_rows=layout.route_rows,
        top_k=layout.top_k,
        rows=out.rows,
        row_scales=out.scales,
    )
    return out


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
        group_size: None for one scale a token, 128 for one scale of 128 neighbours (hidden_size is a multiple then).
        out: tensors to overwrite, of the shapes and dtypes of the result.

    Returns `Permuted(rows [capacity, hidden_size] float8_e4m3fn, scales [capacity] or [capacity, hidden_size / 128]
    float32)`: scale = max(largest magnitude, 1e-10) / 448, rows = value / scale rounded to nearest even, in float32.
    A NaN or an infinity makes its scale NaN or infinite. Raises TypeError or ValueError naming the argument. Follows
    vLLM's `per_token_group_quant_fp8` before its `moe_permute`.
    """
    check_tensor("hidden_states", hidden_states, dtypes=_FLOATS, ndim=(2,), device=layout.route_rows.device)
    num_tokens, hidden_size = layout.num_routes // layout.top_k, hidden_states.shape[1]
    check_shape("hidden_states", hidden_states, (num_tokens, hidden_size), "the tokens of layout")
    if hidden_states.requires_grad and torch.is_grad_enabled():
        raise ValueError("hidden_states: expected a tensor that needs no gradient, got one with requires_grad=True")
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
    if not goes_straight(hidden_states):
        result = Permuted(
            *torch.ops.moeyard.permute_to_fp8(
                hidden_states, layout.sorted_token_ids, layout.route_rows, layout.top_k, group_size, impl
            )
        )
        return result if out is None else out.copy_(result)
    if out is None:
        out = Permuted(*allocate_fp8(hidden_states, layout.capacity, group_size))
    launcher("permute_to_fp8", impl, hidden_states.device, hidden_states.dtype)(
        hidden_states,
        sorted_token_ids=layout.sorted_token_ids,
        route_rows=layout.route_rows,
        top_k=layout.top_k,
        group_size=group_size,
        rows=out.rows,
        row_scales=out.scales,
    )
    return out


def shuffle_rows(input: Tensor, dst2src_map: Tensor, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Gathers rows by a map: row i of the result is row `dst2src_map[i]` of the input.

    Args:
        input: [num_rows, hidden_size] of any dtype; rows may be strided.
        dst2src_map: [num_results] int32 or int64; values outside [0, num_rows) give a row of zeros.
        out: [num_results, hidden_size] to overwrite.

    Returns [num_results, hidden_size]. Follows vLLM's `shuffle_rows`.
    """
    check_tensor("input", input, ndim=(2,))
    check_tensor("dst2src_map", dst2src_map, dtypes=(torch.int32, torch.int64), ndim=(1,), device=input.device)
    shape = (dst2src_map.shape[0], input.shape[1])
    if out is not None:
        check_out("out", out, shape, input.dtype, input.device)
    if not goes_straight(input, dst2src_map):
        result = torch.ops.moeyard.shuffle_rows(input, dst2src_map, impl)
        return result if out is None else out.copy_(result)
    if out is None:
        out = input.new_empty(shape)
    launcher("shuffle_rows", impl, input.device, input.dtype)(input, dst2src_map, out=out)
    return out
