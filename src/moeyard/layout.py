"""topk_ids -> Layout: where every route goes, padded to blocks of one expert.

The operators follow vLLM's `moe_align_block_size` family (csrc/moe/moe_align_sum_kernels.cu), with a stable
order, the inverse map and the expert offsets in the same answer.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from moeyard.dispatch.again import Repeats, calling_of
from moeyard.dispatch.call import call_of_alignment
from moeyard.dispatch.checks import (
    LAYOUT_DTYPES,
    check_int,
    check_out,
    check_routes,
    check_shape,
    check_sizes,
    check_tensor,
)
from moeyard.dispatch.ids import narrow_ids
from moeyard.dispatch.op import LAYOUT, SIZES, Op, goes_straight
from moeyard.dispatch.sizes import batched_layout_lengths, cached_layout_lengths, layout_lengths
from moeyard.dispatch.table import companion
from moeyard.layout_memory import Sizes, allocate_layout, allocate_layout_at_once, memory_of
from moeyard.values import Layout


def check_layout_out(out: object, lengths: tuple[int, ...], sizes: Sizes, device: torch.device) -> None:
    """`out` is a layout of these lengths and sizes on `device`."""
    if not isinstance(out, Layout):
        raise TypeError(f"out: expected a Layout, got {type(out).__name__}")
    got = (out.num_experts, out.num_local_experts, out.block_size, out.top_k)
    if got != sizes:
        names = "num_experts, num_local_experts, block_size, top_k"
        raise ValueError(f"out: expected a layout with ({names}) = {sizes}, got {got}")
    for name, length, dtype in zip(Layout.TENSORS, lengths, LAYOUT_DTYPES, strict=True):
        tensor = getattr(out, name)
        fits = tensor.shape == (length,) and tensor.dtype is dtype and tensor.device == device
        if not fits or not tensor.is_contiguous():
            check_out(f"out.{name}", tensor, (length,), dtype, device)


def _of_routes(topk_ids: Tensor, _map: Tensor | None, *sizes: int) -> tuple[tuple[int, ...], Sizes]:
    num_experts, num_local_experts, block_size, top_k = sizes
    lengths = layout_lengths(topk_ids.numel(), num_local_experts, block_size)
    return lengths, (num_experts, num_local_experts, block_size, top_k)


def _of_batches(counts: Tensor, max_num_tokens: int, block_size: int) -> tuple[tuple[int, ...], Sizes]:
    num_experts = counts.shape[0]
    lengths = batched_layout_lengths(num_experts, max_num_tokens, block_size)
    return lengths, (num_experts, num_experts, block_size, 1)


def _allocate_align(
    topk_ids: Tensor, _map: Tensor | None, num_experts: int, num_local: int, block_size: int, top_k: int
) -> Layout:
    lengths = cached_layout_lengths(topk_ids.numel(), num_local, block_size)
    return allocate_layout_at_once(topk_ids.new_empty, lengths, (num_experts, num_local, block_size, top_k))


ALIGN = Op(
    f"moe_align_block_size(Tensor topk_ids, Tensor? expert_map, {SIZES}, str impl) -> {LAYOUT}",
    allocate=lambda ids, *rest: allocate_layout(ids.new_empty, *_of_routes(ids, *rest)),
    allocate_eagerly=_allocate_align,
    assemble=lambda fields, ids, _map, *sizes: Layout.of(fields, sizes),
    call=lambda ids, _map, _num_experts, num_local, *_: call_of_alignment(ids, num_local),
    launch=lambda launch, out, ids, expert_map, *_: launch(narrow_ids(ids), expert_map, out),
)
BATCHED_ALIGN = Op(
    "batched_moe_align_block_size(Tensor expert_num_tokens, SymInt max_num_tokens, SymInt block_size, str impl) -> "
    + LAYOUT,
    allocate=lambda counts, *rest: allocate_layout(counts.new_empty, *_of_batches(counts, *rest)),
    allocate_eagerly=lambda counts, *rest: allocate_layout_at_once(counts.new_empty, *_of_batches(counts, *rest)),
    assemble=lambda fields, counts, _most, block: Layout.of(fields, (counts.shape[0], counts.shape[0], block, 1)),
    launch=lambda launch, out, counts, max_num_tokens, _block_size: launch(counts, max_num_tokens, out),
)
LORA_ALIGN = Op(
    "moe_lora_align_block_size(Tensor topk_ids, Tensor token_lora_mapping, Tensor? expert_map, SymInt max_loras, "
    f"{SIZES}, str impl) -> {LAYOUT}",
    allocate=lambda ids, _loras, expert_map, max_loras, *sizes: allocate_layout(
        ids.new_empty, *_of_routes(ids, expert_map, *sizes), stack=(max_loras,)
    ),
    assemble=lambda fields, ids, _loras, _map, _max, *sizes: Layout.of(fields, sizes),
    launch=lambda launch, out, ids, loras, expert_map, *_: launch(narrow_ids(ids), loras, expert_map, out),
)


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

    Sizes mean what they mean there. Raises ValueError naming the argument, also when capacity passes int32.
    """
    num_local = num_experts if num_local_experts is None else num_local_experts
    check_int("num_routes", num_routes, low=0)
    check_int("top_k", top_k, low=1)
    check_sizes(num_experts, num_local, block_size)
    lengths = layout_lengths(num_routes, num_local, block_size)
    anchor = torch.empty(0, dtype=torch.int32, device=device)
    layout = allocate_layout_at_once(anchor.new_empty, lengths, (num_experts, num_local, block_size, top_k))
    offsets = anchor.new_empty(num_local + 1, dtype=torch.int64)  # compilers mutate no memory of two dtypes
    return replace(layout, expert_offsets=offsets)


def moe_align_block_size(
    topk_ids: Tensor,
    *,
    num_experts: int,
    block_size: int,
    expert_map: Tensor | None = None,
    num_local_experts: int | None = None,
    top_k: int | None = None,
    out: Layout | None = None,
    impl: str = "auto",
) -> Layout:
    """Groups routes by expert and pads every expert's segment to a multiple of `block_size`.

    Args:
        topk_ids: [num_tokens, top_k] or [num_tokens * top_k], int32, int64 or uint32, of any strides. Ids below 0
            and of `num_experts` and above are dropped: they take no slot.
        num_experts: global number of experts, at most 8192.
        block_size: rows of a block, any positive number.
        expert_map: [num_experts] int32, the local expert of each global one; values below 0 or of
            `num_local_experts` and above drop the route.
        num_local_experts: experts of this rank, `num_experts` unless given (an upper bound: reading it off the map
            would wait for the device).
        top_k: routes of a token; the second size of 2-D ids, 1 for 1-D ids unless given.
        out: a layout of the right sizes to overwrite (`empty_layout`); allocated unless given. torch.compile takes no
            tensors of a workspace that holds other item sizes, too; `Layout.clone` gives each its own memory.
        impl: an implementation by name, or "auto".

    Returns a `Layout`. Raises TypeError or ValueError naming the argument; also when capacity passes int32.
    """
    asked = (num_experts, block_size, num_local_experts, top_k, impl)
    calling = None if out is not None else calling_of(topk_ids, (expert_map,), asked)
    repeated: Layout | None = _REPEATS.repeated(calling, topk_ids, expert_map)
    if repeated is not None:
        return repeated
    straight = out is not None and goes_straight(topk_ids, expert_map)
    notes: Any = out._notes if straight and type(out) is Layout else None
    if out is not None and notes and notes.again is not None and expert_map is None:
        call = (topk_ids.shape, topk_ids.dtype, num_experts, block_size, num_local_experts, top_k, impl)
        if notes.call == call and notes.apart(topk_ids) and notes.again(topk_ids, out):
            increment_version(out.tensors)
            return out
    num_local = num_experts if num_local_experts is None else num_local_experts
    check_sizes(num_experts, num_local, block_size)
    given, top_k = top_k, check_routes(topk_ids, top_k, expert_map, num_experts)
    sizes = (num_experts, num_local, block_size, top_k)
    if out is not None:
        lengths_of = cached_layout_lengths if straight else layout_lengths  # a compiler looks through caches
        check_layout_out(out, lengths_of(topk_ids.numel(), num_local, block_size), sizes, topk_ids.device)
    apart = bool(notes) and notes.apart(topk_ids) and (expert_map is None or notes.apart(expert_map))
    layout: Layout = ALIGN((topk_ids, expert_map, *sizes), impl, out, apart)
    _REPEATS.add(calling, lambda: _repeat_of(topk_ids, expert_map, layout, impl))
    if isinstance(out, Layout) and straight and expert_map is None:
        call = (topk_ids.shape, topk_ids.dtype, num_experts, block_size, num_local_experts, given, impl)
        if not notes or notes.call != call:
            object.__setattr__(out, "_notes", _notes_of(out, topk_ids, call))
    return layout


_REPEATS = Repeats()
"""Alignments of tensors of GPUs."""


def _repeat_of(
    topk_ids: Tensor, expert_map: Tensor | None, layout: Layout, impl: str
) -> Callable[[Tensor, Tensor | None], Layout | None] | None:
    """What gives the layout of other ids: (ids, map) -> layout, or None where it could not."""
    start = aligned_anew(topk_ids, expert_map, layout, impl)
    if start is None:
        return None
    words, split = memory_of(layout)

    def repeat(ids: Tensor, mapping: Tensor | None) -> Layout | None:
        memory = ids.new_empty(words, dtype=torch.int32)
        return split(memory) if start(ids.data_ptr(), mapping, memory.data_ptr()) else None

    return repeat


def aligned_anew(
    topk_ids: Tensor, expert_map: Tensor | None, layout: Layout, impl: str
) -> Callable[[int, Tensor | None, int], bool] | None:
    """What fills memory at an address with the layout of other ids, as `layout`, which was allocated at once, has
    theirs: (address of ids, map, address) -> whether it could. None where the implementation that takes them has
    nothing of the kind.
    """
    facts = call_of_alignment(topk_ids, layout.num_local_experts)
    prepare = companion("moe_align_block_size", "anew", impl, topk_ids.device, topk_ids.dtype, facts)
    return None if prepare is None else prepare(topk_ids, expert_map, layout)


class _Notes(NamedTuple):
    """What a call with `out=` leaves for the next one with this layout."""

    call: tuple[Any, ...]
    """The arguments of the call."""
    again: Callable[[Tensor, Layout], bool] | None
    """What repeats it for other ids, checking only what can have changed; False where it could not."""
    spans: tuple[tuple[int, int], ...]
    """The bytes [low, high) that hold the tensors of the layout."""

    def apart(self, tensor: Tensor) -> bool:
        """Whether a dense tensor lies outside these bytes; False for others, which are looked at more closely."""
        if not tensor.is_contiguous():
            return False
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        return all(start >= high or end <= low for low, high in self.spans)


def _notes_of(out: Layout, topk_ids: Tensor, call: tuple[Any, ...]) -> _Notes:
    prepare = companion("moe_align_block_size", "again", call[-1], topk_ids.device, topk_ids.dtype)
    again = prepare(topk_ids, out) if prepare is not None else None
    spans: list[tuple[int, int]] = []
    for low, size in sorted((tensor.data_ptr(), tensor.nbytes) for tensor in out.tensors):
        if spans and spans[-1][1] == low:
            spans[-1] = (spans[-1][0], low + size)
        else:
            spans.append((low, low + size))
    return _Notes(call, again, tuple(spans))


def batched_moe_align_block_size(
    expert_num_tokens: Tensor, *, max_num_tokens: int, block_size: int, out: Layout | None = None, impl: str = "auto"
) -> Layout:
    """The layout of a batched buffer [num_local_experts, max_num_tokens, hidden_size].

    Args:
        expert_num_tokens: [num_local_experts] int32, the valid rows of each expert, taken into [0, max_num_tokens].
        max_num_tokens: rows of each expert's batch. Route `e * max_num_tokens + j` is row j of expert e.
        block_size, out, impl: as in `moe_align_block_size`.

    Returns a `Layout` with top_k 1 over num_local_experts * max_num_tokens routes, of which the invalid ones are
    dropped; its capacity is num_local_experts * max_num_tokens with max_num_tokens rounded up to whole blocks.
    """
    check_tensor("expert_num_tokens", expert_num_tokens, dtypes=(torch.int32,), ndim=(1,))
    num_experts = expert_num_tokens.shape[0]
    check_sizes(num_experts, num_experts, block_size)
    check_int("max_num_tokens", max_num_tokens, low=0)
    if out is not None:
        lengths, sizes = _of_batches(expert_num_tokens, max_num_tokens, block_size)
        check_layout_out(out, lengths, sizes, expert_num_tokens.device)
    layout: Layout = BATCHED_ALIGN((expert_num_tokens, max_num_tokens, block_size), impl, out)
    return layout


def moe_lora_align_block_size(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    *,
    num_experts: int,
    block_size: int,
    max_loras: int,
    expert_map: Tensor | None = None,
    num_local_experts: int | None = None,
    top_k: int | None = None,
    impl: str = "auto",
) -> tuple[Layout, ...]:
    """One layout per adapter: layout i holds the routes of the tokens whose adapter is i, and drops the others.

    Args:
        token_lora_mapping: [num_tokens] int32 or int64, the adapter of each token; a token outside [0, max_loras)
            (by convention -1: the base model) is in no layout.
        max_loras: adapters, at least 1.
        The others: as in `moe_align_block_size`; every layout has the capacity of all routes.

    Returns `max_loras` layouts that are views of stacked tensors. Follows vLLM's `moe_lora_align_block_size`.
    """
    num_local = num_experts if num_local_experts is None else num_local_experts
    check_sizes(num_experts, num_local, block_size)
    check_int("max_loras", max_loras, low=1)
    top_k = check_routes(topk_ids, top_k, expert_map, num_experts)
    check_tensor(
        "token_lora_mapping", token_lora_mapping, dtypes=(torch.int32, torch.int64), ndim=(1,), device=topk_ids.device
    )
    check_shape("token_lora_mapping", token_lora_mapping, (topk_ids.numel() // top_k,), "one adapter per token")
    sizes = (num_experts, num_local, block_size, top_k)
    stacked: Layout = LORA_ALIGN((topk_ids, token_lora_mapping, expert_map, max_loras, *sizes), impl)
    return tuple(Layout.of([field[lora] for field in stacked.tensors], sizes) for lora in range(max_loras))
