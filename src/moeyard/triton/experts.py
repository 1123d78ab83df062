"""Launchers of products, activations and experts. Nothing waits for the device, and no sum depends on an order of
arrival: the same input gives the same bits.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard.dispatch.sizes import expected_routes, power
from moeyard.triton import align_kernels, kernels
from moeyard.triton.coded import fused_coded_experts_launch
from moeyard.triton.four_bits import fused_four_bit_experts_launch
from moeyard.triton.launch import Step, card, on_its_device
from moeyard.triton.plan import Tile, most_row_tiles, product_tile
from moeyard.triton.steps import (
    MOST_PLANS,
    SIDE_BY_SIDE,
    LayoutSteps,
    Lies,
    combine_step,
    dense_rows,
    layout_steps,
    placed_alike,
    prepared,
    programmatic_on,
    readable,
    stride_of,
    weigh_step,
)
from moeyard.values import INT32_MAX, Activation, ExpertCall, Segments


@on_its_device
def activate_launch(rows: Tensor, activation: Activation, *, gated: bool, out: Tensor) -> None:
    """In float32, rounded once."""
    if not out.numel():
        return
    rows = dense_rows(rows)
    _activate_step(out.dtype, *out.shape, rows.stride(0), gated, activation)(rows, out)


@on_its_device
def grouped_gemm_launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    segments: Segments,
    *,
    out: Tensor,
) -> None:
    """Cuts every expert's rows into tiles in a first launch, multiplies in a second."""
    if not out.numel():
        return
    if out.shape[0] > INT32_MAX:
        raise ValueError(f"rows: expected at most {INT32_MAX} rows of the result, got {out.shape[0]}")
    rows = placed_alike(rows) if segments.batch_invariant else dense_rows(rows)
    bias = None if bias is None else dense_rows(bias)
    weight, lies = readable(weight)
    factors = None if topk_weights is None else topk_weights.contiguous()
    cut, product, most_tiles = prepared(
        _gemm_plan,
        out.device, rows.dtype, out.shape[0], segments.num_experts, *weight.shape, rows.stride(0), lies,
        stride_of(bias), segments.divisor, segments.batch_invariant,
    )  # fmt: skip
    tiles = torch.empty(3 * most_tiles, dtype=torch.int32, device=out.device)
    cut(segments.first_rows.contiguous(), segments.row_counts.contiguous(), tiles)
    slots = None if segments.slots is None else segments.slots.contiguous()
    product(rows, weight, bias, factors, slots, tiles, out)


@on_its_device
def fused_experts_launch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall, *, out: Tensor
) -> None:
    """Lays out, multiplies and activates, multiplies, and sums each token's rows in k order: four launches up to
    4096 routes, seven beyond; one more for weights on the input.
    """
    if not out.numel():
        return
    weights = call.weights
    if weights.scheme is not None and weights.scheme.tiled:
        fused_four_bit_experts_launch(hidden_states, topk_weights, topk_ids, call, out=out)
        return
    if weights.scheme is not None:
        fused_coded_experts_launch(hidden_states, topk_weights, topk_ids, call, out=out)
        return
    hidden, ids, factors = dense_rows(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()
    if call.batch_invariant:
        hidden, ids, factors = map(placed_alike, (hidden, ids, factors))
    (w13, w13_lies), (w2, w2_lies) = readable(weights.w13), readable(weights.w2)
    b13, b2 = (None if bias is None else dense_rows(bias) for bias in (weights.w13_bias, weights.w2_bias))
    plan = prepared(
        _experts_plan, out.device, out.dtype, ids.dtype, *ids.shape, w2.shape, call.num_experts, call.activation,
        weights.gated, call.weight_on_input, hidden.stride(0), w13_lies, w2_lies,
        stride_of(b13), stride_of(b2), call.batch_invariant,
    )  # fmt: skip
    routes, route_rows, tiles = plan.layout(ids, call.expert_map)
    if plan.weigh is not None:
        weighed = out.new_empty(ids.numel(), out.shape[1])
        plan.weigh(hidden, factors, weighed)
        hidden = weighed
    middle = out.new_empty(ids.numel(), w2.shape[2])
    plan.gate_up(hidden, w13, b13, None, routes, tiles, middle)
    second = out.new_empty(ids.numel(), out.shape[1])
    early = out.dtype == torch.float16 and not call.weight_on_input  # a row may pass what float16 holds
    plan.down(middle, w2, b2, factors if early else None, routes if early else None, tiles, second)
    plan.combine(second, None if early or call.weight_on_input else factors, route_rows, out)


class _ExpertsPlan(NamedTuple):
    """The steps of `fused_experts_launch`."""

    layout: LayoutSteps
    weigh: Any
    gate_up: Any
    down: Any
    combine: Any


@lru_cache(MOST_PLANS)
def _experts_plan(
    device: torch.device, dtype: torch.dtype, _id_dtype: torch.dtype, tokens: int, top_k: int,
    w2_shape: tuple[int, int, int], num_experts: int, activation: Activation, gated: bool, weight_on_input: bool,
    row_stride: int, w13_lies: Lies, w2_lies: Lies, b13_stride: int, b2_stride: int, pinned: bool = False,
) -> _ExpertsPlan:  # fmt: skip
    local, hidden, size = w2_shape
    n, here, programmatic = tokens * top_k, card(device), programmatic_on(device)
    expected = expected_routes(n, local, num_experts)
    how: dict[str, Any] = {"itemsize": dtype.itemsize, "card": here, "pinned": pinned}
    first_tile = product_tile(expected, local, size, hidden, gated=gated, **how)
    second_tile = product_tile(expected, local, hidden, size, gated=False, **how)
    rows = first_tile.rows
    assert second_tile.rows == rows  # one list of tiles serves both
    most_tiles = most_row_tiles(n, local, rows)
    layout = layout_steps(n, num_experts, local, rows, most_tiles, programmatic=programmatic)
    weigh = weigh_step(n, hidden, row_stride, top_k, programmatic=programmatic) if weight_on_input else None
    source_stride, divisor = (hidden, 1) if weight_on_input else (row_stride, top_k)
    gate_up = _product(
        first_tile, most_tiles, size, hidden, (source_stride, *w13_lies.strides, b13_stride, size, divisor),
        programmatic=programmatic, gated=gated, activation=activation, turned=w13_lies.turned,
    )  # fmt: skip
    down = _product(
        second_tile,
        most_tiles,
        hidden,
        size,
        (size, *w2_lies.strides, b2_stride, hidden, 1),
        programmatic=programmatic,
        gather=False,
        turned=w2_lies.turned,
    )
    combine = combine_step(tokens, hidden, top_k, programmatic=programmatic)
    return _ExpertsPlan(layout, weigh, gate_up, down, combine)


@lru_cache(MOST_PLANS)
def _gemm_plan(
    device: torch.device, dtype: torch.dtype, num_rows: int, num_experts: int, experts: int, columns: int, size: int,
    row_stride: int, lies: Lies, bias_stride: int, divisor: int, pinned: bool = False,
) -> tuple[Step, Step, int]:  # fmt: skip
    expected = expected_routes(num_rows, experts, num_experts)
    tile = product_tile(
        expected, experts, columns, size, gated=False, itemsize=dtype.itemsize, card=card(device), pinned=pinned
    )
    programmatic, most_tiles = programmatic_on(device), most_row_tiles(num_rows, experts, tile.rows)
    cut = Step(
        align_kernels.tiles_kernel, (1, 1), (experts, most_tiles, tile.rows), EXPERTS=power(experts, 32),
        PDL=programmatic,
    )  # fmt: skip
    product = _product(
        tile, most_tiles, columns, size, (row_stride, *lies.strides, bias_stride, columns, divisor),
        programmatic=programmatic, scatter=True, turned=lies.turned,
    )  # fmt: skip
    return cut, product, most_tiles


def _product(
    tile: Tile, most_tiles: int, columns: int, size: int, strides_and_divisor: tuple[int, ...], *, programmatic: bool,
    gated: bool = False, activation: Activation | None = None, gather: bool = True, scatter: bool = False,
    turned: bool = False,
) -> Step:  # fmt: skip
    a = activation or Activation()
    return Step(
        kernels.product_kernel,
        (most_tiles * -(-columns // tile.columns), 1),
        (most_tiles, columns, size, *strides_and_divisor),
        tile.warps,
        tile.stages,
        GATHER=gather,
        SCATTER=scatter,
        GATED=gated,
        NAME="" if activation is None else a.name,
        ALPHA=a.alpha,
        BETA=a.beta,
        LIMIT=a.limit,
        EVEN=size % tile.depth == 0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        SWAPPED=tile.swapped,
        TURNED=turned,
        GROUP=SIDE_BY_SIDE,
        PDL=programmatic,
    )


@lru_cache(MOST_PLANS)
def _activate_step(
    _dtype: torch.dtype, num_rows: int, columns: int, row_stride: int, gated: bool, activation: Activation
) -> Step:
    wide = power(min(columns, 512), 16)
    tall = 2048 // wide
    return Step(
        kernels.activate_kernel, (-(-num_rows // tall), -(-columns // wide)), (num_rows, columns, row_stride),
        GATED=gated, NAME=activation.name, ALPHA=activation.alpha, BETA=activation.beta, LIMIT=activation.limit,
        ROWS=tall, COLUMNS=wide,
    )  # fmt: skip
