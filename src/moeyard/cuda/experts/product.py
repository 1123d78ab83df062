"""One product of experts.cu: a launch of rows of every expert times the expert's weights."""

import torch
from torch import Tensor

from moeyard.cuda.experts.plan import ProductPlan, Way, product_plan
from moeyard.cuda.runtime.barriers import barrier_for
from moeyard.cuda.runtime.cards import card_of
from moeyard.cuda.runtime.launch import Launch, Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import KINDS, float_bits
from moeyard.cuda.runtime.planning import Noted
from moeyard.cuda.runtime.ready import Ready
from moeyard.cuda.runtime.tensor_map import row_map, turned_boxes, turned_map, weight_map
from moeyard.dispatch.call import lies_turned
from moeyard.values import Activation, Layout

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "e4m3", torch.int8: "s8"}
CURVES = {"silu": "SILU", "gelu": "GELU", "gelu_tanh": "GELU_TANH", "relu2": "RELU2"}
TURNS = 64
"""Bytes from a barrier to where products keep their turns, behind what alignment uses."""
ALIGNMENT = 16
"""Of addresses, in bytes."""


def lies_well(tensor: Tensor) -> bool:
    """Whether the copy engine can read or write its rows in place."""
    return tensor.is_contiguous() and not tensor.data_ptr() % ALIGNMENT


def turns_of(device: int) -> int:
    """Where products of the current stream keep their turns (experts_tiles.cuh): behind what alignment uses."""
    return barrier_for(device) + TURNS


def apart(out: Tensor, *others: Tensor | None) -> bool:
    """Whether no other tensor can share memory with `out`, as neighbours in a storage could."""
    storage = out.untyped_storage().data_ptr()
    return all(other is None or other.untyped_storage().data_ptr() != storage for other in others)


def compact_layout(
    topk_ids: Tensor, num_experts: int, experts: int, middle: Tensor, room: Tensor | None, out: Tensor | None
) -> Layout:
    """An uninitialised layout of block_size 1: what the sum reads has memory of its own.

    The rest lies in memory that holds something else later. `expert_ids`, which nothing reads, lie in `middle`, behind
    room for `sorted_token_ids`. These lie in `room` if at most the first product reads them. What both products read
    lies in `out`, where there is room.
    """
    n = topk_ids.numel()
    slots = topk_ids.new_empty(n, dtype=torch.int32) if room is None else room.view(torch.int32).as_strided((n,), (1,))
    lengths = [2 * (experts + 1), experts, 1]
    words = sum(lengths)
    if out is not None and 4 * words <= out.numel() * out.element_size() and not out.storage_offset() % 4:
        table = out.as_strided((2 * words,), (1,)).view(torch.int32)  # of rows of any stride, if there is but one
        routes = topk_ids.new_empty(n, dtype=torch.int32)
    else:
        table, routes = topk_ids.new_empty(words + n, dtype=torch.int32).unsafe_split_with_sizes([words, n])
    offsets, counts, total = table.unsafe_split_with_sizes(lengths)
    blocks = middle.view(torch.int32).as_strided((n,), (1,), n)
    tensors = (slots, blocks, total, offsets.view(torch.int64), counts, routes)
    return Layout.of(tensors, (num_experts, experts, 1, topk_ids.shape[1]))


def product(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first_rows: Tensor,
    row_counts: Tensor,
    out: Tensor,
    *,
    slots: Tensor | None = None,
    divisor: int = 1,
    gather: bool = False,
    factors: Tensor | None = None,
    by_route: bool = False,
    activation: Activation | None = None,
    gated: bool = False,
    ready: bool = False,
    way: Way,
    expected: int,
    turns: int,
    weight_scales: Tensor | None = None,
    row_scales: Tensor | None = None,
    result_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """One launch: row r of an expert is row r of `rows`, or with `gather` that of token `slots[r] // divisor`.

    Rows and weights of 8-bit codes have scales: of weights one per matrix, per row, or per block of 128 x 128; of rows
    one, or one per 128 columns beside blocks. With `result_scales` results, which would be of `dtype`, are quantised in
    groups of 128 columns on their way.

    Results go to row r of `out`, or `by_route` to row `slots[r]`; `factors` belong to routes. `expected` counts the
    rows that are likely to come, of as many as `out` has. `ready` says that the launch ahead did not write the
    layout. `turns` is the address of two words of zeros, which are left so.
    """
    device, turned = rows.get_device(), lies_turned(weight)
    experts, weight_rows, size = weight.shape
    if bias is not None:
        bias = bias.contiguous()
    if factors is not None:
        factors = factors.contiguous()
    key = (
        (out.shape[0], out.shape[1]), experts, size, dtype or out.dtype, gather, divisor, factors is None, by_route,
        activation, gated,
        bias is None, ready, way, expected, device, weight.dtype,
        scaling_of(weight_scales, row_scales, 1 + gated), result_scales is not None, turned,
    )  # fmt: skip
    launch, shape, plan = _READY.get(key) or _READY.add(key, prepare_product(*key))
    if turned:
        boxes_of = turned_boxes(weight, plan.weight_rows)
        weights = turned_map(weight.data_ptr(), boxes_of, weight.dtype, not plan.streams)
    else:
        weights = weight_map(
            weight.data_ptr(), experts, weight_rows, size, weight.dtype, plan.weight_rows, plan.turn, not plan.streams
        )
    boxes = weights  # where rows are gathered the second map is not read
    if not gather:
        boxes = row_map(rows.data_ptr(), rows.shape[0], size, rows.dtype, plan.box)
    addresses: tuple[int, ...] = ()
    if weight_scales is not None and row_scales is not None:
        addresses = (
            weight_scales.data_ptr(), row_scales.data_ptr(), 0 if result_scales is None else result_scales.data_ptr()
        )  # fmt: skip
    launch.with_maps(
        shape,
        (weights, boxes),
        rows.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if factors is None else factors.data_ptr(),
        0 if slots is None else slots.data_ptr(),
        first_rows.data_ptr(),
        row_counts.data_ptr(),
        out.data_ptr(),
        turns,
        *addresses,
    )


def scaling_of(weight_scales: Tensor | None, row_scales: Tensor | None, halves: int) -> tuple[str, bool]:
    """What scales a product of codes has, and whether each weight row has one of its own."""
    if weight_scales is None or row_scales is None:
        return "UNSCALED", False
    if row_scales.dim() > 1:
        return "BY_BLOCKS", False
    return "BY_ROWS", weight_scales.shape[1] > halves


_READY = Ready()
"""Launches, their shapes and plans by all that they depend on besides addresses."""


def prepare_product(
    shape: tuple[int, int],
    experts: int,
    size: int,
    dtype: torch.dtype,
    gather: bool,
    divisor: int,
    unweighted: bool,
    by_route: bool,
    activation: Activation | None,
    gated: bool,
    unbiased: bool,
    ready: bool,
    way: Way,
    expected: int,
    device: int,
    element: torch.dtype,
    scaling: tuple[str, bool],
    as_codes: bool,
    turned: bool,
) -> tuple[Launch | Noted, Shape, ProductPlan]:
    """The launch of such a product, its shape and its plan; nothing is kept but the launch."""
    routed = by_route or not unweighted
    plan = product_plan(shape[0], experts, shape[1], gated, routed, card_of(device), way, expected, scaling[0])
    clamped = activation is not None and activation.limit is not None
    defines = product_defines(
        plan, dtype, "IDENTITY" if activation is None else CURVES[activation.name], gated=gated, clamped=clamped,
        gather=gather, by_route=by_route, biased=not unbiased, weighted=not unweighted, ready=ready, element=element,
        scaling=scaling, as_codes=as_codes, turned=turned,
    )  # fmt: skip
    curve = (1.0, 0.0, 0.0) if activation is None else (activation.alpha, activation.beta, activation.limit or 0.0)
    sizes = (experts, shape[1], size, size * element.itemsize, divisor, *map(float_bits, curve))
    words = (8 if scaling[0] == "UNSCALED" else 11) + len(sizes)
    recipe = Recipe("experts.cu", "experts_kernel", defines, plan.threads, words, maps=2, overlapping=True, suffix="a")
    return launch_of(recipe, device), Shape(plan.grid, plan.shared_bytes, sizes), plan


def product_defines(
    plan: ProductPlan,
    dtype: torch.dtype,
    curve: str,
    *,
    gated: bool,
    clamped: bool,
    gather: bool,
    by_route: bool,
    biased: bool,
    weighted: bool,
    ready: bool,
    element: torch.dtype | None = None,
    scaling: tuple[str, bool] = ("UNSCALED", False),
    as_codes: bool = False,
    turned: bool = False,
) -> tuple[tuple[str, str], ...]:
    """What a product is compiled for: rows and weights of `element`, results of `dtype`."""
    element = element or dtype
    flags = {
        "GATED": gated, "CLAMPED": clamped, "GATHER": gather, "RESULTS_BY_ROUTE": by_route, "BIASED": biased,
        "WEIGHTED": weighted, "TABLE_READY": ready, "STREAMING": plan.streams,
        "INTEGERS": element == torch.int8, "CHANNEL_SCALES": scaling[1], "RESULTS_AS_CODES": as_codes,
        "TURNED": turned,
    }  # fmt: skip
    return (
        ("ROWS_A_TILE", str(plan.rows)),
        ("CONSUMER_GROUPS", str(plan.groups)),
        ("PRODUCTS_A_GROUP", str(plan.tall)),
        ("STAGES", str(plan.stages)),
        ("BLOCKS_A_PROCESSOR", str(plan.blocks)),
        ("ROW_KIND", KINDS[dtype]),
        ("ELEMENT", ELEMENTS[element]),
        ("VALUE_BYTES", str(element.itemsize)),
        ("SCALED", scaling[0]),
        ("ACTIVATION", curve),
        *((name, "true" if flag else "false") for name, flag in flags.items()),
        *((("FINE_FROM_128", str(plan.fine)),) if plan.fine and plan.rows >= 128 else ()),
    )
