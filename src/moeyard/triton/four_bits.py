"""Experts of weights of 4 bits in tiles (`pack_experts`), times rows of 16 and 32 bits or of e4m3."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard.dispatch.sizes import expected_routes
from moeyard.quant import QuantScheme, blocks_of
from moeyard.triton import four_bits_kernels
from moeyard.triton.coded import multiplies_e4m3, quantize_step, room_for_codes
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
    quantize: tuple[Any, Any]
    """The rows of both products; None where they stay as they are."""
    coded_rows: int
    """Of the first product."""
    row_dtype: torch.dtype
    """Of rows as products read them."""
    gate_up: Any
    down: Any
    combine: Any


def fused_four_bit_experts_launch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall, *, out: Tensor
) -> None:
    """Layout, product with activation, product, sum: four launches up to 4096 routes, two more to quantise rows.

    Weights become values of the rows' dtype in registers where that rounds none. Otherwise codes are multiplied, and
    the sums of a group of columns are scaled. Rows of e4m3 meet codes always: as e4m3, which holds each of 4 bits, or
    where no matrix instruction takes that as float16.
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
    hidden, factor = _coded(plan, 0, scheme, hidden, plan.coded_rows, tiles)
    middle = out.new_empty(ids.numel(), weights.intermediate_size)
    plan.gate_up(hidden, w13, b13, None, routes, tiles, factor, s13, z13, g13, middle)
    middle, factor = _coded(plan, 1, scheme, middle, ids.numel(), tiles)
    second = out.new_empty(ids.numel(), out.shape[1])
    early = out.dtype == torch.float16 and not call.weight_on_input  # a row may pass what float16 holds
    plan.down(middle, w2, b2, factors if early else None, routes if early else None, tiles, factor, s2, z2, g2, second)
    plan.combine(second, None if early or call.weight_on_input else factors, route_rows, out)


def _coded(
    plan: _Plan, product: int, scheme: QuantScheme, rows: Tensor, count: int, tiles: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Rows as a product reads them, and their scales if they have some."""
    step = plan.quantize[product]
    if step is None:
        return rows, None
    codes, scales = room_for_codes(rows, scheme, count, 1, rows.shape[1])
    step(rows, None, None, tiles, codes, scales)
    return codes.view(plan.row_dtype), scales


def _bytes(tensor: Tensor) -> Tensor:
    """Scales of 8 bits as bytes, which every card reads."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def scales_weights(scheme: QuantScheme, dtype: torch.dtype) -> bool:
    """Whether a code times its scale is a value of a dtype: then weights are scaled, not sums.

    Beside rows of e4m3 it never is: a scale moved into the code would have fewer powers of two than e8m0 has.
    """
    if scheme.activations != "none":
        return False
    return scheme.weights == "e2m1" and (
        scheme.scales == "e4m3" or (dtype != torch.float16 and scheme.scales == "e8m0")
    )


def row_dtype_of(scheme: QuantScheme, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of rows as products read them; matrix instructions sum at least 32 products of e4m3."""
    if scheme.activations == "none":
        return dtype
    return torch.float8_e4m3fn if multiplies_e4m3(device) and scheme.block[1] != 16 else torch.uint8


@lru_cache(MOST_PLANS)
def _plan(
    device: torch.device, dtype: torch.dtype, _id_dtype: torch.dtype, tokens: int, top_k: int, local: int, hidden: int,
    size: int, num_experts: int, activation: Activation, gated: bool, weight_on_input: bool, scheme: QuantScheme,
    row_stride: int, b13_stride: int, b2_stride: int, _scales: tuple[torch.dtype | None, ...] = (),
) -> _Plan:  # fmt: skip
    n, here, programmatic = tokens * top_k, card(device), programmatic_on(device)
    expected = expected_routes(n, local, num_experts)
    scaled, row_dtype = scales_weights(scheme, dtype), row_dtype_of(scheme, dtype, device)
    coded = row_dtype != dtype
    how: dict[str, Any] = {
        "scaled": scaled, "itemsize": 2 if coded else dtype.itemsize, "card": here,
        "widened": row_dtype == torch.uint8,
    }  # fmt: skip
    first_tile = four_bit_tile(expected, local, size, hidden, gated=gated, **how)
    second_tile = four_bit_tile(expected, local, hidden, size, gated=False, **how)
    assert second_tile.rows == first_tile.rows  # one list of tiles serves both
    most_tiles = most_row_tiles(n, local, first_tile.rows)
    layout = layout_steps(n, num_experts, local, first_tile.rows, most_tiles, programmatic=programmatic)
    weigh = weigh_step(n, hidden, row_stride, top_k, programmatic=programmatic) if weight_on_input else None
    row_stride, divisor = (hidden, 1) if weight_on_input else (row_stride, top_k)
    coded_rows = n if weight_on_input else tokens
    quantize: tuple[Any, Any] = (None, None)
    if coded:
        per_row: dict[str, Any] = {
            "groups": 1, "lead": 0, "divisor": 1, "static": False, "most_tiles": most_tiles,
            "tile_rows": first_tile.rows, "programmatic": programmatic,
        }  # fmt: skip
        quantize = (
            quantize_step(scheme, coded_rows, hidden, row_stride, **per_row),
            quantize_step(scheme, n, size, size, **per_row),
        )
        row_stride = hidden
    kind: dict[str, Any] = {"scheme": scheme, "scaled": scaled, "programmatic": programmatic}
    gate_up = _product(
        first_tile, most_tiles, size, hidden, row_stride, b13_stride, divisor, gated=gated, activation=activation,
        gather=True, **kind,
    )  # fmt: skip
    down = _product(second_tile, most_tiles, hidden, size, size, b2_stride, 1, gather=False, **kind)
    combine = combine_step(tokens, hidden, top_k, programmatic=programmatic)
    return _Plan(layout, weigh, quantize, coded_rows, row_dtype, gate_up, down, combine)


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
