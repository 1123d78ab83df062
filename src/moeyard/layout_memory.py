"""Where the tensors of a layout lie: apart, or as parts of one allocation."""

from collections.abc import Callable

import torch
from torch import Tensor

from moeyard.dispatch.checks import LAYOUT_DTYPES
from moeyard.values import Layout

Sizes = tuple[int, int, int, int]
"""(num_experts, num_local_experts, block_size, top_k) of a layout."""


def allocate_layout(
    new_empty: Callable[..., Tensor], lengths: tuple[int, ...], sizes: Sizes, *, stack: tuple[int, ...] = ()
) -> Layout:
    """An uninitialised layout on the device of `new_empty`; `stack` leads every shape."""
    fields = [new_empty((*stack, n), dtype=dtype) for n, dtype in zip(lengths, LAYOUT_DTYPES, strict=True)]
    return Layout.of(fields, sizes)


def allocate_layout_at_once(new_empty: Callable[..., Tensor], lengths: tuple[int, ...], sizes: Sizes) -> Layout:
    """`allocate_layout` in one allocation, whose slices the tensors are: a third of the cost of six."""
    parts = layout_parts(lengths)
    return split_layout(new_empty(sum(parts), dtype=torch.int32), parts, sizes)


def layout_parts(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Words of 4 bytes of the tensors of a layout in one piece of memory, those of `expert_offsets` first."""
    capacity, num_blocks, one, num_offsets, num_local_experts, num_routes = lengths
    return 2 * num_offsets, capacity, num_routes, num_blocks, num_local_experts, one


def split_layout(memory: Tensor, parts: tuple[int, ...], sizes: Sizes) -> Layout:
    """The layout whose tensors are `layout_parts` of int32 memory."""
    offsets, slots, routes, blocks, counts, used = memory.unsafe_split_with_sizes(parts)
    layout = Layout(slots, blocks, used, offsets.view(torch.int64), counts, routes, *sizes)
    object.__setattr__(layout, "_notes", ())  # `trust`, without a call
    return layout


def memory_of(layout: Layout) -> tuple[int, Callable[[Tensor], Layout]]:
    """Words of 4 bytes that hold such a layout, and what makes one of so many int32."""
    sizes = (layout.num_experts, layout.num_local_experts, layout.block_size, layout.top_k)
    parts = layout_parts(tuple(tensor.numel() for tensor in layout.tensors))
    return sum(parts), lambda memory: split_layout(memory, parts, sizes)
