"""Outputs of the layout ops and of fp8 rows: how they are allocated, and whether a given one fits."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from moeyard.checks import check_int, check_out
from moeyard.tiles import batched_layout_capacity, layout_capacity
from moeyard.values import INT32_MAX, MAX_EXPERTS, Layout, Permuted, Routing

_DTYPES = (torch.int32, torch.int32, torch.int32, torch.int64, torch.int32, torch.int32)


def check_sizes(num_experts: int, num_local_experts: int, block_size: int) -> None:
    """The host integers of a layout are in range."""
    if type(num_experts) is type(num_local_experts) is type(block_size) is int:
        in_range = 1 <= num_experts <= MAX_EXPERTS and 1 <= num_local_experts <= MAX_EXPERTS
        if in_range and 1 <= block_size <= INT32_MAX:
            return
    check_int("num_experts", num_experts, low=1, high=MAX_EXPERTS)
    check_int("num_local_experts", num_local_experts, low=1, high=MAX_EXPERTS)
    check_int("block_size", block_size, low=1)


def layout_lengths(
    num_routes: int, num_local_experts: int, block_size: int, *, capacity: int | None = None
) -> tuple[int, ...]:
    """The lengths of a Layout's six tensors; ValueError if capacity passes int32."""
    if capacity is None:
        capacity = layout_capacity(num_routes, num_local_experts, block_size, torch.sym_min)
    if capacity > INT32_MAX:
        raise ValueError(
            f"block_size: expected a capacity of at most {INT32_MAX} slots (int32), got {capacity} from {num_routes} "
            f"routes, {num_local_experts} local experts and block_size={block_size}"
        )
    return capacity, capacity // block_size, 1, num_local_experts + 1, num_local_experts, num_routes


cached_layout_lengths = lru_cache(maxsize=1024)(layout_lengths)
"""`layout_lengths` of plain integers: the same sizes come again with every layer and step."""


def batched_lengths(num_experts: int, max_num_tokens: int, block_size: int) -> tuple[int, ...]:
    """The lengths of the layout of `num_experts` batches of `max_num_tokens` rows."""
    capacity = batched_layout_capacity(num_experts, max_num_tokens, block_size)
    return layout_lengths(num_experts * max_num_tokens, num_experts, block_size, capacity=capacity)


def allocate_layout(
    new_empty: Callable[..., Tensor],
    lengths: tuple[int, ...],
    sizes: tuple[int, int, int, int],
    *,
    stack: tuple[int, ...] = (),
) -> Layout:
    """An uninitialised layout on the device of `new_empty`; `stack` leads every shape.

    `sizes` are (num_experts, num_local_experts, block_size, top_k).
    """
    fields = [new_empty((*stack, n), dtype=dtype) for n, dtype in zip(lengths, _DTYPES, strict=True)]
    return Layout.of(fields, sizes)


def allocate_layout_at_once(
    new_empty: Callable[..., Tensor], lengths: tuple[int, ...], sizes: tuple[int, int, int, int]
) -> Layout:
    """`allocate_layout` in one allocation, the tensors being slices of it: a third of the cost of six."""
    capacity, num_blocks, one, num_offsets, num_local_experts, num_routes = lengths
    total = 2 * num_offsets + capacity + num_blocks + one + num_local_experts + num_routes
    offsets, slots, routes, blocks, counts, used = new_empty(total, dtype=torch.int32).unsafe_split_with_sizes(
        (2 * num_offsets, capacity, num_routes, num_blocks, num_local_experts, one)
    )
    return Layout(slots, blocks, used, offsets.view(torch.int64), counts, routes, *sizes)


def allocate_routing(router_logits: Tensor, top_k: int) -> Routing:
    """An uninitialised routing of the tokens of logits [T, E]."""
    weights, ids = router_logits.new_empty((2, router_logits.shape[0], top_k), dtype=torch.int32).unbind()
    return Routing(weights.view(torch.float32), ids)


def allocate_fp8(hidden_states: Tensor, capacity: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Uninitialised float8_e4m3fn rows [capacity, hidden_size] and their float32 scales: one a row, or one a group."""
    hidden_size = hidden_states.shape[1]
    groups = () if group_size is None else (hidden_size // group_size,)
    rows = hidden_states.new_empty((capacity, hidden_size), dtype=torch.float8_e4m3fn)
    return rows, hidden_states.new_empty((capacity, *groups), dtype=torch.float32)


def empty_layout(
    num_routes: int,
    *,
    num_experts: int,
    block_size: int,
    num_local_experts: int | None = None,
    top_k: int = 1,
    device: torch.device | str = "cpu",
) -> Layout:
    """An uninitialised `Layout` for `num_routes` routes, to pass as `out=` to `moe_align_block_size`.

    Sizes are those of that operator. Raises ValueError naming the argument, also when capacity passes int32.
    """
    num_local = num_experts if num_local_experts is None else num_local_experts
    check_int("num_routes", num_routes, low=0)
    check_int("top_k", top_k, low=1)
    check_sizes(num_experts, num_local, block_size)
    lengths = layout_lengths(num_routes, num_local, block_size)
    anchor = torch.empty(0, dtype=torch.int32, device=device)
    return allocate_layout(anchor.new_empty, lengths, (num_experts, num_local, block_size, top_k))


def check_layout_out(
    out: object, lengths: tuple[int, ...], sizes: tuple[int, int, int, int], device: torch.device
) -> None:
    """`out` is a layout of these lengths and sizes on `device`."""
    if not isinstance(out, Layout):
        raise TypeError(f"out: expected a Layout, got {type(out).__name__}")
    got = (out.num_experts, out.num_local_experts, out.block_size, out.top_k)
    if got != sizes:
        names = "num_experts, num_local_experts, block_size, top_k"
        raise ValueError(f"out: expected a layout with ({names}) = {sizes}, got {got}")
    for name, length, dtype in zip(Layout.TENSORS, lengths, _DTYPES, strict=True):
        tensor = getattr(out, name)
        fits = tensor.shape == (length,) and tensor.dtype is dtype and tensor.device == device
        if not fits or not tensor.is_contiguous():
            check_out(f"out.{name}", tensor, (length,), dtype, device)


def deliver(layout: Layout, out: Layout | None) -> Layout:
    """`layout`, or `out` with its contents if one was given and fits."""
    if out is None:
        return layout
    lengths = tuple(tensor.shape[0] for tensor in layout.tensors)
    sizes = (layout.num_experts, layout.num_local_experts, layout.block_size, layout.top_k)
    check_layout_out(out, lengths, sizes, layout.route_rows.device)
    return out.copy_(layout)


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
