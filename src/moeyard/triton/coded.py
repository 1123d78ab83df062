"""Experts of weights of 8-bit codes: e4m3 and int8, times rows of the same codes or of 16 and 32 bits."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard.dispatch.sizes import expected_routes, power
from moeyard.quant import QuantScheme, blocks_of
from moeyard.triton import coded_kernels
from moeyard.triton.launch import Step, card
from moeyard.triton.plan import Tile, coded_tile, most_row_tiles
from moeyard.triton.steps import (
    MOST_PLANS,
    SIDE_BY_SIDE,
    LayoutSteps,
    combine_step,
    dense_rows,
    layout_steps,
    placed_alike,
    prepared,
    programmatic_on,
    stride_of,
    weigh_step,
)
from moeyard.values import Activation, ExpertCall

GROUP = 128
"""Columns that share a scale, of a row and of a weight: a step of the sum."""


class _Strides(NamedTuple):
    """Elements between rows of tensors that need not be dense."""

    rows: int
    w13: tuple[int, ...]
    w2: tuple[int, ...]
    b13: int
    b2: int
    scales: tuple[tuple[int, ...], tuple[int, ...]]
    """(blocks of rows, blocks of columns) of w13 and w2."""


class _Plan(NamedTuple):
    """The steps of `fused_coded_experts_launch`; a quantisation is None where rows meet codes as they are."""

    native: bool
    """Whether matrix instructions read codes."""
    layout: LayoutSteps
    weigh: Any
    first_codes: Any
    first_shape: tuple[int, int]
    """Rows and groups of the first product's codes."""
    gate_up: Any
    second_codes: Any
    second_groups: int
    down: Any
    combine: Any


def fused_coded_experts_launch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall, *, out: Tensor
) -> None:
    """Layout, quantisation, product with activation, quantisation, product, sum: six launches up to 4096 routes.

    A token's row is quantised once. With a static scale, which is an expert's own, it is quantised once per route.
    """
    weights, scales, scheme = call.weights, call.weights.scales, call.weights.scheme
    assert scales is not None and scheme is not None
    hidden, ids, factors = dense_rows(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()
    if call.batch_invariant:
        hidden, ids, factors = map(placed_alike, (hidden, ids, factors))
    w13, w2 = (dense_rows(matrix.view(_stored(scheme))) for matrix in (weights.w13, weights.w2))
    b13, b2 = (None if bias is None else dense_rows(bias) for bias in (weights.w13_bias, weights.w2_bias))
    first_scales, second_scales = scales.w13.float().contiguous(), scales.w2.float().contiguous()
    strides = _Strides(
        hidden.stride(0), w13.stride()[:2], w2.stride()[:2], stride_of(b13),
        stride_of(b2), (tuple(first_scales.shape[1:]), tuple(second_scales.shape[1:])),
    )  # fmt: skip
    plan: _Plan = prepared(
        _plan, out.device, out.dtype, ids.dtype, *ids.shape, w2.shape, call.num_experts, call.activation, weights.gated,
        call.weight_on_input, scheme, scales.block_start, strides, call.batch_invariant,
    )  # fmt: skip
    routes, route_rows, tiles = plan.layout(ids, call.expert_map)
    if plan.weigh is not None:
        weighed = out.new_empty(ids.numel(), out.shape[1])
        plan.weigh(hidden, factors, weighed)
        hidden = weighed
    if plan.native:
        w13, w2 = w13.view(weights.w13.dtype), w2.view(weights.w2.dtype)
    row_scales = None
    if plan.first_codes is not None:
        given = _given(scales.w13_input)
        codes, row_scales = room_for_codes(out, scheme, *plan.first_shape, w13.shape[2])
        plan.first_codes(hidden, given, None if given is None else routes, tiles, codes, row_scales)
        hidden = codes.view(w13.dtype)
    by_slot = scheme.static
    middle = out.new_empty(ids.numel(), w2.shape[2])
    plan.gate_up(hidden, w13, b13, None, None if by_slot else routes, tiles, row_scales, first_scales, middle)
    if plan.second_codes is not None:
        codes, row_scales = room_for_codes(out, scheme, ids.numel(), plan.second_groups, w2.shape[2])
        plan.second_codes(middle, _given(scales.w2_input), None, tiles, codes, row_scales)
        middle = codes.view(w2.dtype)
    second = out.new_empty(ids.numel(), out.shape[1])
    early = out.dtype == torch.float16 and not call.weight_on_input  # a row may pass what float16 holds
    plan.down(
        middle, w2, b2, factors if early else None, routes if early else None, tiles, row_scales, second_scales, second
    )
    plan.combine(second, None if early or call.weight_on_input else factors, route_rows, out)


def _stored(scheme: QuantScheme) -> torch.dtype:
    """What codes are where no matrix instruction reads them: bytes of e4m3, integers."""
    return torch.uint8 if scheme.weights == "e4m3" else torch.int8


def _given(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.float().contiguous()


def multiplies_e4m3(device: torch.device) -> bool:
    """Whether matrix instructions take e4m3; Triton's interpreter does not."""
    return device.type in ("cuda", "meta") and card(device).capability >= (8, 9)


def room_for_codes(out: Tensor, scheme: QuantScheme, rows: int, groups: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns] of activations, as `quantize_step` writes them, and their scales [rows, groups]."""
    kind = torch.uint8 if scheme.activations == "e4m3" else torch.int8
    codes = torch.empty(rows, columns, dtype=kind, device=out.device)
    return codes, torch.empty(rows, groups, dtype=torch.float32, device=out.device)


@lru_cache(MOST_PLANS)
def _plan(
    device: torch.device, dtype: torch.dtype, _id_dtype: torch.dtype, tokens: int, top_k: int,
    w2_shape: tuple[int, int, int], num_experts: int, activation: Activation, gated: bool, weight_on_input: bool,
    scheme: QuantScheme, block_start: int, strides: _Strides,
    pinned: bool = False,
) -> _Plan:  # fmt: skip
    local, hidden, size = w2_shape
    n, here, programmatic = tokens * top_k, card(device), programmatic_on(device)
    expected = expected_routes(n, local, num_experts)
    coded, stepwise = scheme.activations != "none", bool(scheme.activation_group or scheme.block[1])
    native = coded and (scheme.weights == "int8" or multiplies_e4m3(device))
    how: dict[str, Any] = {
        "stepwise": stepwise, "native": native, "wide": not coded and dtype.itemsize > 2, "card": here,
        "pinned": pinned,
    }  # fmt: skip
    first_tile = coded_tile(expected, local, size, hidden, gated=gated, **how)
    second_tile = coded_tile(expected, local, hidden, size, gated=False, **how)
    most_tiles = most_row_tiles(n, local, first_tile.rows)
    assert second_tile.rows == first_tile.rows  # one list of tiles serves both
    layout = layout_steps(n, num_experts, local, first_tile.rows, most_tiles, programmatic=programmatic)
    weigh = weigh_step(n, hidden, strides.rows, top_k, programmatic=programmatic) if weight_on_input else None
    row_stride, divisor = (hidden, 1) if weight_on_input else (strides.rows, top_k)

    group = scheme.activation_group
    lead, lead_rows = block_start % GROUP if stepwise else 0, block_start % max(scheme.block[0], 1)
    first_groups, second_groups = (
        blocks_of(columns, group, start) for columns, start in ((hidden, 0), (size, block_start))
    )
    first_rows = n if scheme.static or weight_on_input else tokens
    first_codes = second_codes = None
    if coded:
        shared: dict[str, Any] = {
            "most_tiles": most_tiles, "tile_rows": first_tile.rows, "programmatic": programmatic,
        }  # fmt: skip
        first_codes = quantize_step(
            scheme, first_rows, hidden, row_stride, first_groups, 0, divisor, static=scheme.static, **shared
        )
        second_codes = quantize_step(
            scheme, n, size, size, second_groups, lead, 1,
            static=scheme.static and not scheme.dynamic_second, **shared,
        )  # fmt: skip
    kind: dict[str, Any] = {"scheme": scheme, "native": native, "programmatic": programmatic}
    by_slot = scheme.static
    gate_up = _product(
        first_tile, most_tiles, size, hidden,
        (hidden if coded else row_stride, *strides.w13, strides.b13, *strides.scales[0]),
        1 if by_slot else divisor, (lead_rows, 0), first_groups, gated=gated, activation=activation,
        gather=not by_slot, **kind,
    )  # fmt: skip
    down = _product(
        second_tile, most_tiles, hidden, size, (size, *strides.w2, strides.b2, *strides.scales[1]), 1,
        (0, lead), second_groups, gather=False, **kind,
    )  # fmt: skip
    combine = combine_step(tokens, hidden, top_k, programmatic=programmatic)
    return _Plan(
        native,
        layout,
        weigh,
        first_codes,
        (first_rows, first_groups),
        gate_up,
        second_codes,
        second_groups,
        down,
        combine,
    )


def quantize_step(
    scheme: QuantScheme, num_rows: int, columns: int, row_stride: int, groups: int, lead: int, divisor: int, *,
    static: bool, most_tiles: int, tile_rows: int, programmatic: bool,
) -> Step:  # fmt: skip
    """Rows to codes of a scheme's activations; tiles count where scales are `static`, an expert's own."""
    grid = (most_tiles, tile_rows) if static else (num_rows, 1)
    return Step(
        coded_kernels.quantize_kernel, grid, (columns, row_stride, groups, lead, divisor, most_tiles),
        E4M3=scheme.activations == "e4m3", GROUP=scheme.activation_group,
        COLUMNS=power(min(columns + lead, 2048), GROUP), PDL=programmatic,
    )  # fmt: skip


def _product(
    tile: Tile, most_tiles: int, columns: int, size: int, strides: tuple[int, ...], divisor: int,
    leads: tuple[int, int], groups: int, *, scheme: QuantScheme, native: bool, programmatic: bool,
    gated: bool = False, activation: Activation | None = None, gather: bool,
) -> Step:  # fmt: skip
    a = activation or Activation()
    *dense, row_blocks, column_blocks = strides
    lead_rows, lead = leads
    return Step(
        coded_kernels.coded_product_kernel,
        (most_tiles * -(-columns // tile.columns), 1),
        (
            most_tiles, columns, size, *dense, row_blocks * column_blocks, columns, divisor, lead_rows, lead, groups,
            column_blocks, row_blocks // 2 if gated else 0,
        ),
        tile.warps,
        tile.stages,
        GATHER=gather,
        GATED=gated,
        NAME="" if activation is None else a.name,
        ALPHA=a.alpha,
        BETA=a.beta,
        LIMIT=a.limit,
        E4M3=scheme.weights == "e4m3",
        NATIVE=native,
        GROUPED=bool(scheme.activation_group),
        BLOCK=scheme.block[0],
        BLOCKED=scheme.block[1] != 0,
        STEPS=max(1, GROUP // tile.depth),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        SWAPPED=tile.swapped,
        GROUP=SIDE_BY_SIDE,
        PDL=programmatic,
    )  # fmt: skip
