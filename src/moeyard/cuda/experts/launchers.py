"""Products and experts of CUDA tensors on Hopper: launches of experts.cu, straight from Python."""

import torch
from torch import Tensor

from moeyard.cuda.align.launchers import align_launch
from moeyard.cuda.experts.plan import ProductPlan, Way, product_plan, way_of
from moeyard.cuda.rows.launchers import combine_launch, permute_launch, shuffle_rows_launch
from moeyard.cuda.runtime.barriers import barrier_for
from moeyard.cuda.runtime.cards import card_of
from moeyard.cuda.runtime.driver import current_stream
from moeyard.cuda.runtime.launch import Launch
from moeyard.cuda.runtime.parameters import KINDS, float_bits
from moeyard.cuda.runtime.ready import Ready
from moeyard.cuda.runtime.tensor_map import row_map, weight_map
from moeyard.dispatch.call import Call
from moeyard.dispatch.sizes import expected_routes
from moeyard.values import Activation, ExpertCall, Layout, Segments

_ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}
_CURVES = {"silu": "SILU", "gelu": "GELU", "gelu_tanh": "GELU_TANH", "relu2": "RELU2"}
_ALIGNMENT = 16
"""Of addresses, in bytes."""
_UNIT = 16
"""What sizes are multiples of, so that every row and every half of w13 begins where the copy engine can."""


def unfit_for_products(call: Call) -> str | None:
    """Why `grouped_gemm_launch` does not take such a call, in words; None if it does."""
    weights = call.weights
    if weights is None:
        return None
    for name, size in (("columns", weights.columns // (1 + weights.gated)), ("hidden_size", weights.size)):
        if size % _UNIT or not size:
            return f"weights: expected {name} that are a positive multiple of {_UNIT}, got {size}"
    return weights.readable or None


def unfit_for_experts(call: Call) -> str | None:
    """Why `fused_experts_launch` does not take such a call, in words; None if it does."""
    return "takes no router weights on the input" if call.weight_on_input else unfit_for_products(call)


def _lies_well(tensor: Tensor) -> bool:
    """Whether the copy engine can read or write its rows in place."""
    return tensor.is_contiguous() and not tensor.data_ptr() % _ALIGNMENT


def _in_place(rows: Tensor) -> Tensor:
    """These rows, or a copy of them where the copy engine can read it."""
    return rows if _lies_well(rows) else rows.clone(memory_format=torch.contiguous_format)


def grouped_gemm_launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    segments: Segments,
    *,
    out: Tensor,
) -> None:
    """Results by route gather their rows through `sorted_token_ids`, or have them copied into that order first where
    `way_of` says so; others are read and written where they lie.
    """
    if not out.shape[0]:
        return
    device = rows.get_device()
    first_rows, row_counts, sorted_token_ids, row_divisor, num_experts = segments
    by_route = gather = sorted_token_ids is not None
    expected = expected_routes(out.shape[0], weight.shape[0], num_experts)
    way = way_of(expected, weight.shape[0], out.shape[1], layer=False)
    if sorted_token_ids is not None and way.copied:
        gather = False
        source, rows = rows, rows.new_empty(sorted_token_ids.shape[0], rows.shape[1])
        shuffle_rows_launch(source, sorted_token_ids // row_divisor, out=rows)
    results = out if _lies_well(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    _product(
        _in_place(rows), weight, bias, first_rows.contiguous(), row_counts.contiguous(), results,
        slots=None if sorted_token_ids is None else sorted_token_ids.contiguous(), divisor=row_divisor, gather=gather,
        factors=topk_weights, by_route=by_route, way=way, expected=expected, turns=_turns(device),
    )  # fmt: skip
    if results is not out:
        out.copy_(results)


def fused_experts_launch(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    call: ExpertCall,
    *,
    out: Tensor,
    way: Way | None = None,
) -> None:
    """Layout, product with activation, product, sum: four launches, each placed while the one before drains.

    What stands between is compact: [routes, intermediate_size] and [routes, hidden_size] of the dtype. The second of
    these first holds the rows in the order of experts where a fifth launch copies them there (`way_of`).

    A row of float16 is multiplied by the router's weight before it is rounded: it may be larger than float16 holds
    where the weighted one is not. bfloat16 has the range of float32: there the sum multiplies, and blocks of the
    second product need not know their routes.
    """
    num_routes, top_k = topk_ids.numel(), topk_ids.shape[1]
    if not num_routes:
        return
    device = hidden_states.get_device()
    weights, activation, num_experts, expert_map, _ = call
    expected = expected_routes(num_routes, weights.num_local_experts, num_experts)
    way = way or way_of(expected, weights.num_local_experts, weights.w13.shape[1])
    hidden_states, weighs = _in_place(hidden_states), hidden_states.dtype == torch.float16
    middle = hidden_states.new_empty((num_routes, weights.intermediate_size))
    rows = hidden_states.new_empty((num_routes, weights.hidden_size))
    inputs = (hidden_states, topk_weights, topk_ids, expert_map)
    layout = _compact_layout(
        topk_ids, num_experts, weights.num_local_experts, middle, None if weighs else middle if way.copied else rows,
        out if _lies_well(out) and _apart(out, *inputs) else None,
    )  # fmt: skip
    align_launch(topk_ids, expert_map, layout, programmatic=True)
    offsets, counts = layout.expert_offsets, layout.expert_counts
    turns = _turns(device)
    if way.copied:
        permute_launch(
            hidden_states, None, sorted_token_ids=layout.sorted_token_ids, route_rows=layout.route_rows, top_k=top_k,
            rows=rows, row_scales=None, programmatic=True,
        )  # fmt: skip
    _product(
        rows if way.copied else hidden_states, weights.w13, weights.w13_bias, offsets, counts, middle,
        slots=None if way.copied else layout.sorted_token_ids, divisor=1 if way.copied else top_k,
        gather=not way.copied, activation=activation, gated=weights.gated, ready=way.copied, way=way,
        expected=expected, turns=turns,
    )  # fmt: skip
    _product(
        middle, weights.w2, weights.w2_bias, offsets, counts, rows, slots=layout.sorted_token_ids if weighs else None,
        factors=topk_weights if weighs else None, ready=True, way=way, expected=expected, turns=turns,
    )  # fmt: skip
    factors = None if weighs else topk_weights
    combine_launch(rows, factors, route_rows=layout.route_rows, top_k=top_k, out=out, programmatic=True)


def _turns(device: int) -> int:
    """Where products of the current stream keep their turns (experts_tiles.cuh): behind what alignment uses."""
    return barrier_for(device, current_stream(device)) + 64


def _apart(out: Tensor, *others: Tensor | None) -> bool:
    """Whether no other tensor can share memory with `out`, as neighbours in a storage could."""
    storage = out.untyped_storage().data_ptr()
    return all(other is None or other.untyped_storage().data_ptr() != storage for other in others)


def _compact_layout(
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


def _product(
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
) -> None:
    """One launch: row r of an expert is row r of `rows`, or with `gather` that of token `slots[r] // divisor`.

    Results go to row r of `out`, or `by_route` to row `slots[r]`; `factors` belong to routes. `expected` counts the
    rows that are likely to come, of as many as `out` has. `ready` says that the launch ahead did not write the
    layout. `turns` is the address of two words of zeros, which are left so.
    """
    device = rows.get_device()
    experts, weight_rows, size = weight.shape
    if bias is not None:
        bias = bias.contiguous()
    if factors is not None:
        factors = factors.contiguous()
    key = (
        out.shape, experts, size, rows.dtype, gather, divisor, factors is None, by_route, activation, gated,
        bias is None, ready, way, expected, device,
    )  # fmt: skip
    launch, plan = _READY.get(key) or _READY.add(key, _prepare(*key))
    weights = weight_map(
        weight.data_ptr(), experts, weight_rows, size, rows.dtype, plan.weight_rows, plan.turn, not plan.streams
    )
    boxes = weights  # where rows are gathered the second map is not read
    if not gather:
        boxes = row_map(rows.data_ptr(), rows.shape[0], size, rows.dtype, plan.box)
    launch.with_maps(
        current_stream(device),
        (weights, boxes),
        rows.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if factors is None else factors.data_ptr(),
        0 if slots is None else slots.data_ptr(),
        first_rows.data_ptr(),
        row_counts.data_ptr(),
        out.data_ptr(),
        turns,
    )


_READY = Ready()
"""Launches and their plans by all that they depend on besides addresses."""


def _prepare(
    shape: torch.Size,
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
) -> tuple[Launch, ProductPlan]:
    routed = by_route or not unweighted
    plan = product_plan(shape[0], experts, shape[1], gated, routed, card_of(device), way, expected)
    clamped = activation is not None and activation.limit is not None
    defines = product_defines(
        plan, dtype, "IDENTITY" if activation is None else _CURVES[activation.name], gated=gated, clamped=clamped,
        gather=gather, by_route=by_route, biased=not unbiased, weighted=not unweighted, ready=ready,
    )  # fmt: skip
    curve = (1.0, 0.0, 0.0) if activation is None else (activation.alpha, activation.beta, activation.limit or 0.0)
    launch = Launch(
        "experts.cu",
        "experts_kernel",
        defines,
        device,
        maps=2,
        pointers=8,
        sizes=(experts, shape[1], size, size * dtype.itemsize, divisor, *map(float_bits, curve)),
        grid=plan.grid,
        threads=plan.threads,
        shared_bytes=plan.shared_bytes,
        overlapping=True,
        suffix="a",
    )
    return launch, plan


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
) -> tuple[tuple[str, str], ...]:
    """What a product is compiled for."""
    flags = {
        "GATED": gated, "CLAMPED": clamped, "GATHER": gather, "RESULTS_BY_ROUTE": by_route, "BIASED": biased,
        "WEIGHTED": weighted, "TABLE_READY": ready, "STREAMING": plan.streams,
    }  # fmt: skip
    return (
        ("ROWS_A_TILE", str(plan.rows)),
        ("CONSUMER_GROUPS", str(plan.groups)),
        ("PRODUCTS_A_GROUP", str(plan.tall)),
        ("STAGES", str(plan.stages)),
        ("BLOCKS_A_PROCESSOR", str(plan.blocks)),
        ("ROW_KIND", KINDS[dtype]),
        ("ELEMENT", _ELEMENTS[dtype]),
        ("ACTIVATION", curve),
        *((name, "true" if flag else "false") for name, flag in flags.items()),
    )
