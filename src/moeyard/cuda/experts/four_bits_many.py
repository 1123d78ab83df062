"""The experts of many tokens with weights of 4 bits in tiles: experts.cu widens their codes in registers."""

import torch
from torch import Tensor

from moeyard.cuda.align.launchers import align_launch
from moeyard.cuda.experts.four_bits import SCALE_KINDS, dense, dense_rows
from moeyard.cuda.experts.four_bits_many_plan import PLANNED, Operand, Tile, many_plan, streams
from moeyard.cuda.experts.plan import ProductPlan
from moeyard.cuda.experts.product import CURVES, ELEMENTS, apart, compact_layout, lies_well, turns_of
from moeyard.cuda.rows.launchers import combine_launch
from moeyard.cuda.runtime.cards import WARP, card_of
from moeyard.cuda.runtime.launch import Launch, Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import KINDS, float_bits
from moeyard.cuda.runtime.planning import Noted
from moeyard.cuda.runtime.ready import Ready
from moeyard.cuda.runtime.tensor_map import row_map, tile_boxes, tile_map
from moeyard.dispatch.call import Call
from moeyard.dispatch.sizes import expected_routes
from moeyard.quant import TILE_COLUMNS, TILE_ROWS
from moeyard.values import Activation, ExpertCall

_BLOCK = 256
"""Threads of a block that interleaves rows."""
_BLOCKS = 8
"""Of these, per multiprocessor at most."""
INTERLEAVING = (("BLOCK", str(_BLOCK)),)
"""What interleave.cu is compiled for."""
_COLUMNS = 16
"""Columns that are interleaved."""
_STEP_BYTES = TILE_ROWS * TILE_COLUMNS // 2
"""Of a tile."""


def unfit(call: Call) -> str | None:
    """Why these launches are not the way for such a call, in words; None if they are."""
    if call.weight_on_input:
        return "takes no router weights on the input"
    if call.weights is None or call.weights.scheme is None:
        return "takes weights of 4 bits: give weights"
    return call.weights.readable or None


def fused_experts_launch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall, *, out: Tensor,
    tile: Tile = PLANNED,
) -> None:  # fmt: skip
    """Fills `out` by five launches: layout, rows in the order of experts, two products, sum.

    Rows come interleaved, as lanes have the columns of weights (experts_nibbles.cuh). Weights become values of the
    rows' dtype in registers where that rounds none; otherwise codes are multiplied, and the sums of a group are
    scaled. Sums are float32, in a fixed order. A row of float16 is weighted before it is rounded. Tiles are as
    planned unless `tile` says otherwise. Allocates [T * K, I] and [T * K, H] of the dtype.
    """
    weights, activation, num_experts, expert_map, *_ = call
    scheme, scales = weights.scheme, weights.scales
    assert scheme is not None and scales is not None
    num_routes, top_k = topk_ids.numel(), topk_ids.shape[1]
    if not num_routes:
        return
    hidden_states, topk_ids, topk_weights = dense_rows(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()
    device, dtype, weighs = hidden_states.get_device(), hidden_states.dtype, hidden_states.dtype == torch.float16
    experts, hidden_size, size = weights.num_local_experts, weights.hidden_size, weights.intermediate_size
    s13, s2, z13, z2, g13, g2 = (None if one is None else dense(one) for one in scales.tensors[:6])
    assert s13 is not None and s2 is not None
    middle, taken = hidden_states.new_empty(num_routes, size), hidden_states.new_empty(num_routes, hidden_size)
    lent = lies_well(out) and apart(out, hidden_states, topk_weights, topk_ids, expert_map)
    layout = compact_layout(
        topk_ids, num_experts, experts, middle, None if weighs else middle, out if lent else None
    )  # fmt: skip
    align_launch(topk_ids, expert_map, layout, programmatic=True)
    interleave(hidden_states, layout.sorted_token_ids, top_k, taken, count=layout.num_tokens_post_padded)
    expected, turns = expected_routes(num_routes, experts, num_experts), turns_of(device)
    first = Operand(experts, size, hidden_size, weights.gated, scheme, s13.element_size(), dtype)
    second = Operand(experts, hidden_size, size, False, scheme, s2.element_size(), dtype)
    segments = layout.expert_offsets.data_ptr(), layout.expert_counts.data_ptr()
    _product(
        first, taken, weights.w13, weights.w13_bias, (s13, z13, g13), None, None, segments, middle, activation,
        expected, turns, tile,
    )  # fmt: skip
    slots, factors = (layout.sorted_token_ids, topk_weights) if weighs else (None, None)
    _product(
        second, middle, weights.w2, weights.w2_bias, (s2, z2, g2), slots, factors, segments, taken, None, expected,
        turns, tile,
    )  # fmt: skip
    left = None if weighs else topk_weights
    combine_launch(taken, left, route_rows=layout.route_rows, top_k=top_k, out=out, programmatic=True)


def interleave(rows: Tensor, slots: Tensor | None, divisor: int, out: Tensor, *, count: Tensor | None = None) -> None:
    """Row r of `out` is row slots[r] // divisor of `rows`, or row r, with its columns as products take them.

    Rows from `count` on, one int32, are left as they are.
    """
    device = rows.get_device()
    key = (out.shape[0], out.shape[1], rows.stride(0), divisor, device)
    launch, shape = _INTERLEAVES.get(key) or _INTERLEAVES.add(key, _prepare_interleave(*key))
    launch(shape, rows.data_ptr(), _at(slots), _at(count), out.data_ptr())


def _prepare_interleave(
    num_rows: int, columns: int, stride: int, divisor: int, device: int
) -> tuple[Launch | Noted, Shape]:
    blocks = columns // _COLUMNS
    sizes = (num_rows, blocks, 2 * stride, divisor)
    recipe = Recipe("interleave.cu", "interleave_kernel", INTERLEAVING, _BLOCK, 4 + len(sizes), overlapping=True)
    grid = min(card_of(device).processors * _BLOCKS, -(-num_rows * WARP // _BLOCK))
    return launch_of(recipe, device), Shape(max(1, grid), 0, sizes)


_INTERLEAVES, _READY = Ready(), Ready()
"""Launches by all that they depend on besides addresses."""


def _product(
    operand: Operand, rows: Tensor, codes: Tensor, bias: Tensor | None,
    scales: tuple[Tensor, Tensor | None, Tensor | None], slots: Tensor | None, factors: Tensor | None,
    segments: tuple[int, int], out: Tensor, activation: Activation | None, expected: int, turns: int, tile: Tile,
) -> None:  # fmt: skip
    """One launch, as `product` has it. `scales` are those of groups, zero points, global ones."""
    of_groups, zeros, whole = scales
    bias = None if bias is None else bias.contiguous()
    key = (
        operand, out.shape[0], expected, of_groups.dtype, bias is not None, factors is not None, activation, tile,
        rows.get_device(),
    )  # fmt: skip
    launch, shape, plan = _READY.get(key) or _READY.add(key, _prepare(*key))
    maps = operand_maps(operand, plan, codes.data_ptr(), of_groups.data_ptr(), _at(zeros) or of_groups.data_ptr())
    of_rows = row_map(rows.data_ptr(), rows.shape[0], operand.size, operand.dtype, plan.box)
    launch.with_maps(
        shape, (maps[0], of_rows, *maps[1:]), rows.data_ptr(), _at(bias), _at(factors), _at(slots), *segments,
        out.data_ptr(), turns, _at(whole),
    )  # fmt: skip


def operand_boxes(operand: Operand, plan: ProductPlan) -> tuple[tuple[torch.dtype, tuple[tuple[int, ...], ...]], ...]:
    """Elements and boxes of codes, scales and zero points."""
    box, line = plan.weight_rows // TILE_ROWS, TILE_ROWS * operand.scale_bytes
    of = (
        (torch.int32, operand.size // TILE_COLUMNS * _STEP_BYTES, _STEP_BYTES),
        (torch.uint8, operand.groups * line, operand.parts * line),
        (torch.uint8, operand.groups * TILE_ROWS, operand.parts * TILE_ROWS),
    )
    return tuple(
        (dtype, tile_boxes(operand.experts, operand.tiles, row_bytes, dtype.itemsize, brought, box))
        for dtype, row_bytes, brought in of
    )


def operand_maps(operand: Operand, plan: ProductPlan, *addresses: int) -> tuple[bytes, ...]:
    """Maps of codes, scales and zero points at these addresses.

    A box has as little as 16 bytes of scales in a row, and the next step those behind them: the L2 cache brings both.
    """
    boxes = operand_boxes(operand, plan)
    if not operand.scheme.zero_points:  # a map that is not read
        boxes = (*boxes[:2], boxes[1])
    return tuple(
        tile_map(address, (box[0], box[1], box[2]), dtype, dtype == torch.uint8 or not streams(plan))
        for address, (dtype, box) in zip(addresses, boxes, strict=True)
    )


def _prepare(
    operand: Operand, num_rows: int, expected: int, scale_dtype: torch.dtype, biased: bool, weighted: bool,
    activation: Activation | None, tile: Tile, device: int,
) -> tuple[Launch | Noted, Shape, ProductPlan]:  # fmt: skip
    plan = many_plan(operand, num_rows, expected, weighted, card_of(device), tile)
    defines = many_defines(operand, plan, scale_dtype, activation, biased=biased, weighted=weighted)
    curve = (1.0, 0.0, 0.0) if activation is None else (activation.alpha, activation.beta, activation.limit or 0.0)
    sizes = (operand.experts, operand.columns, operand.size, 2 * operand.size, 1, *map(float_bits, curve))
    words = 9 + len(sizes)
    recipe = Recipe("experts.cu", "experts_kernel", defines, plan.threads, words, maps=4, overlapping=True, suffix="a")
    return launch_of(recipe, device), Shape(plan.grid, plan.shared_bytes, sizes), plan


def many_defines(
    operand: Operand, plan: ProductPlan, scale_dtype: torch.dtype, activation: Activation | None, *, biased: bool,
    weighted: bool,
) -> tuple[tuple[str, str], ...]:  # fmt: skip
    """What a product is compiled for. With an activation its results are rows of the next product, and interleaved."""
    scheme = operand.scheme
    flags = {
        "GATED": operand.gated, "CLAMPED": activation is not None and activation.limit is not None, "GATHER": False,
        "RESULTS_BY_ROUTE": False, "BIASED": biased, "WEIGHTED": weighted, "TABLE_READY": True,
        "STREAMING": streams(plan), "INTEGERS": False, "CHANNEL_SCALES": False, "RESULTS_AS_CODES": False,
        "TURNED": False, "TILED": True, "CODES_ARE_E2M1": scheme.weights == "e2m1",
        "ZERO_POINTS": scheme.zero_points, "GLOBAL_SCALES": scheme.global_scales,
        "INTERLEAVED": activation is not None,
    }  # fmt: skip
    return (
        ("ROWS_A_TILE", str(plan.rows)),
        ("CONSUMER_GROUPS", str(plan.groups)),
        ("PRODUCTS_A_GROUP", str(plan.tall)),
        ("STAGES", str(plan.stages)),
        ("BLOCKS_A_PROCESSOR", str(plan.blocks)),
        ("ROW_KIND", KINDS[operand.dtype]),
        ("ELEMENT", ELEMENTS[operand.dtype]),
        ("VALUE_BYTES", "2"),
        ("SCALED", "UNSCALED"),
        ("ACTIVATION", "IDENTITY" if activation is None else CURVES[activation.name]),
        ("SCALE_COLUMNS", str(scheme.block[1])),
        ("SCALE_KIND", SCALE_KINDS.get(scale_dtype) or KINDS[scale_dtype]),
        *((name, "true" if flag else "false") for name, flag in flags.items()),
    )


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
