"""Experts of weights of 4 bits in tiles (`pack_experts`), times rows of 16 and 32 bits."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard.dispatch.sizes import expected_routes
from moeyard.quant import QuantScheme, blocks_of
from moeyard.triton import four_bits_kernels
from moeyard.triton.launch import Step, card, dtypes_of
from moeyard.triton.plan import Tile, four_bit_tile, most_row_tiles
from moeyard.triton.steps import (
    MOST_PLANS,
    SIDE_BY_SIDE,
    LayoutSteps,
    combine_step,
    dense_rows,
    layout_steps,
    prepared,
    programmatic_on,
    stride_of,
    weigh_step,
)
from moeyard.values import Activation, ExpertCall


class _Plan(NamedTuple):
    """The steps of `fused_four_bit_experts_launch`."""

    layout: LayoutSteps
    weigh: Any
    gate_up: Any
    down: Any
    combine: Any


def fused_four_bit_experts_launch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall, *, out: Tensor
) -> None:
    """Layout, product with activation, product, sum: four launches up to 4096 routes.

    Weights become values of the rows' dtype in registers where that rounds none. Otherwise codes are multiplied, and
    the sums of a group of columns are scaled.
    """
    weights, scales, scheme = call.weights, call.weights.scales, call.weights.scheme
    assert scales is not None and scheme is not None
    hidden, ids, factors = dense_rows(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()
    w13, w2 = (matrix.contiguous().view(torch.int16) for matrix in (weights.w13, weights.w2))
    b13, b2 = (None if bias is None else dense_rows(bias) for bias in (weights.w13_bias, weights.w2_bias))
    s13, s2, z13, z2, g13, g2 = (None if one is None else _bytes(one.contiguous()) for one in scales.tensors[:6])
    plan: _Plan = prepared(
        _plan, out.device, out.dtype, ids.dtype, *ids.shape, weights.num_local_experts, weights.hidden_size,
        weights.intermediate_size, call.num_experts, call.activation, weights.gated, call.weight_on_input, scheme,
        hidden.stride(0), stride_of(b13), stride_of(b2), dtypes_of((s13, s2)),
    )  # fmt: skip
    routes, route_rows, tiles = plan.layout(ids, call.expert_map)
    if plan.weigh is not None:
        weighed = out.new_empty(ids.numel(), out.shape[1])
        plan.weigh(hidden, factors, weighed)
        hidden = weighed
    middle = out.new_empty(ids.numel(), weights.intermediate_size)
    plan.gate_up(hidden, w13, b13, None, routes, tiles, s13, z13, g13, middle)
    second = out.new_empty(ids.numel(), out.shape[1])
    early = out.dtype == torch.float16 and not call.weight_on_input  # a row may pass what float16 holds
    plan.down(middle, w2, b2, factors if early else None, routes if early else None, tiles, s2, z2, g2, second)
    plan.combine(second, None if early or call.weight_on_input else factors, route_rows, out)


def _bytes(tensor: Tensor) -> Tensor:
    """Scales of 8 bits as bytes, which every card reads."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def scales_weights(scheme: QuantScheme, dtype: torch.dtype) -> bool:
    """Whether a code times its scale is a value of a dtype: then weights are scaled, not sums."""
    return scheme.weights == "e2m1" and (
        scheme.scales == "e4m3" or (dtype != torch.float16 and scheme.scales == "e8m0")
    )


@lru_cache(MOST_PLANS)
def _plan(
    device: torch.device, dtype: torch.dtype, _id_dtype: torch.dtype, tokens: int, top_k: int, local: int, hidden: int,
    size: int, num_experts: int, activation: Activation, gated: bool, weight_on_input: bool, scheme: QuantScheme,
    row_stride: int, b13_stride: int, b2_stride: int, _scales: tuple[torch.dtype | None, ...] = (),
) -> _Plan:  # fmt: skip
    n, here, programmatic = tokens * top_k, card(device), programmatic_on(device)
    expected = expected_routes(n, local, num_experts)
    scaled = scales_weights(scheme, dtype)
    how: dict[str, Any] = {"scaled": scaled, "itemsize": dtype.itemsize, "card": here}
    first_tile = four_bit_tile(expected, local, size, hidden, gated=gated, **how)
    second_tile = four_bit_tile(expected, local, hidden, size, gated=False, **how)
    assert second_tile.rows == first_tile.rows  # one list of tiles serves both
    most_tiles = most_row_tiles(n, local, first_tile.rows)
    layout = layout_steps(n, num_experts, local, first_tile.rows, most_tiles, programmatic=programmatic)
    weigh = weigh_step(n, hidden, row_stride, top_k, programmatic=programmatic) if weight_on_input else None
    row_stride, divisor = (hidden, 1) if weight_on_input else (row_stride, top_k)
    kind: dict[str, Any] = {"scheme": scheme, "scaled": scaled, "programmatic": programmatic}
    gate_up = _product(
        first_tile, most_tiles, size, hidden, row_stride, b13_stride, divisor, gated=gated, activation=activation,
        gather=True, **kind,
    )  # fmt: skip
    down = _product(second_tile, most_tiles, hidden, size, size, b2_stride, 1, gather=False, **kind)
    return _Plan(layout, weigh, gate_up, down, combine_step(tokens, hidden, top_k, programmatic=programmatic))


def _product(
    tile: Tile, most_tiles: int, columns: int, size: int, row_stride: int, bias_stride: int, divisor: int, *,
    scheme: QuantScheme, scaled: bool, programmatic: bool, gated: bool = False, activation: Activation | None = None,
    gather: bool,
) -> Step:  # fmt: skip
    a = activation or Activation()
    return Step(
        four_bits_kernels.four_bits_product_kernel,
        (most_tiles * -(-columns // tile.columns), 1),
        (
            most_tiles, columns, size, row_stride, bias_stride, columns, divisor, blocks_of(size, scheme.block[1]),
        ),
        tile.warps,
        tile.stages,
        GATHER=gather,
        GATED=gated,
        NAME="" if activation is None else a.name,
        ALPHA=a.alpha,
        BETA=a.beta,
        LIMIT=a.limit,
        E2M1=scheme.weights == "e2m1",
        KIND=scheme.scales,
        WIDE=scheme.block[1],
        SCALED=scaled,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        SWAPPED=tile.swapped,
        GROUP=SIDE_BY_SIDE,
        PDL=programmatic,
    )  # fmt: skip
