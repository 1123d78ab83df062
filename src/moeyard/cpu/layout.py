"""Layouts by a counting sort in two passes; stable, and exact whatever the number of threads.

The first pass leaves each route's rank among its expert's routes in `route_rows`, and the counts; the second adds the
expert's first slot and writes the route there. Every thread ranks its own span of routes. One prefix over
(expert, thread) gives each thread the first slot of its span in every expert.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeyard.cpu.pointers import IDS, int32_at, int64_at, kernel, ranks_to_slots, uint32_at, uint64_at
from moeyard.cpu.threads import count_parts, dense, run_parts
from moeyard.values import Layout

_LEAST_ROUTES = 1 << 17  # below this two threads lose more on the hand-over than they win

_BATCH = 256  # routes whose slots are found by vectors before any is written: fewer wait for the vector stores
_APART = 32  # counters between two threads' counters: neighbours on one cache line halve the speed of both


def align_launch(topk_ids: Tensor, expert_map: Tensor | None, out: Layout) -> None:
    """Fills the layout of int32 or int64 ids of any shape and strides."""
    topk_ids = topk_ids.contiguous()
    num_routes = topk_ids.numel()
    tensors = (topk_ids, dense(expert_map), *out.tensors)
    sizes = (num_routes, topk_ids.element_size(), out.num_experts, *_sizes(out))
    parts = count_parts(num_routes, _LEAST_ROUTES)
    if parts == 1:
        run_parts(_align_kernel, 1, num_routes, tensors, *sizes)
        return
    counts = torch.empty((parts, out.num_local_experts + 1 + _APART), dtype=torch.int32)
    tensors = (*tensors, counts)
    run_parts(_rank_kernel, parts, num_routes, tensors, *sizes)
    run_parts(_plan_kernel, 1, parts, tensors, *sizes)
    run_parts(_place_kernel, parts, num_routes, tensors, *sizes)


def batched_align_launch(expert_num_tokens: Tensor, max_num_tokens: int, out: Layout) -> None:
    """Fills the layout of a batched buffer."""
    tensors = (expert_num_tokens.contiguous(), *out.tensors)
    run_parts(_batched_kernel, 1, out.route_rows.shape[0], tensors, max_num_tokens, *_sizes(out))


def _sizes(out: Layout) -> tuple[int, int, int]:
    return out.num_local_experts, out.block_size, out.sorted_token_ids.shape[0]


@kernel
def _bucket(expert: Any, mapping: Any, num_experts: int, num_local: int) -> Any:
    """The local expert of an unsigned id, or num_local if the route is dropped. In 32 bits: twice as fast as in 64."""
    if mapping is None:
        return np.uint32(expert) if expert < np.uint32(min(num_experts, num_local)) else np.uint32(num_local)
    local = np.uint32(mapping[expert]) if expert < np.uint32(num_experts) else np.uint32(num_local)
    return min(local, np.uint32(num_local))


@kernel
def _rank(start: int, stop: int, ids: Any, mapping: Any, num_experts: int, num_local: int, counts: Any,
          route_rows: Any) -> None:  # fmt: skip
    """Counts routes [start, stop) and leaves each one's rank in route_rows; the last count is of the dropped."""
    counts[:] = 0
    for i in range(start, stop):
        bucket = _bucket(ids[i], mapping, num_experts, num_local)
        rank = counts[bucket]
        counts[bucket] = rank + 1
        route_rows[i] = rank


@kernel
def _place(
    start: int, stop: int, ids: Any, mapping: Any, num_experts: int, num_local: int, firsts: Any, route_rows: Any,
    sorted_token_ids: Any,
) -> None:  # fmt: skip
    """Turns the ranks of routes [start, stop) into slots and writes the routes there."""
    if mapping is None and ids.itemsize == 4:
        bound = min(num_experts, num_local)
        while start + _BATCH <= stop:
            for i in range(start, start + _BATCH, IDS):
                here = route_rows.ctypes.data + 4 * i
                ranks_to_slots(ids.ctypes.data + 4 * i, here, firsts.ctypes.data, bound)
            for i in range(start, start + _BATCH):
                if route_rows[i] >= 0:
                    sorted_token_ids[np.uint32(route_rows[i])] = i
            start += _BATCH
    for i in range(start, stop):
        bucket = _bucket(ids[i], mapping, num_experts, num_local)
        if bucket < np.uint32(num_local):
            slot = firsts[bucket] + route_rows[i]
            route_rows[i] = slot
            sorted_token_ids[slot] = i
        else:
            route_rows[i] = -1


@kernel
def _plan(num_routes: int, block_size: int, firsts: Any, sorted_token_ids: Any, expert_ids: Any,
          num_tokens_post_padded: Any, expert_offsets: Any, expert_counts: Any) -> None:  # fmt: skip
    """Turns the counts [parts, num_local + 1] in `firsts` into first slots; writes all that needs no route."""
    parts, num_local = firsts.shape[0], expert_counts.size
    slot, block = 0, 0
    for expert in range(num_local):
        first = slot
        for part in range(parts):
            count = firsts[part, expert]
            firsts[part, expert] = slot
            slot += count
        expert_offsets[expert] = first
        expert_counts[expert] = slot - first
        end_block = block + (slot - first + block_size - 1) // block_size
        for b in range(block, end_block):
            expert_ids[b] = expert
        block = end_block
        for s in range(slot, block * block_size):
            sorted_token_ids[s] = num_routes
        slot = block * block_size
    expert_offsets[num_local] = slot
    num_tokens_post_padded[0] = slot
    sorted_token_ids[slot:] = num_routes
    expert_ids[block:] = -1


@kernel
def _rank_any(start: int, stop: int, ids: int, width: int, mapping: int, num_experts: int, num_local: int, counts: Any,
              route_rows: Any) -> None:  # fmt: skip
    """`_rank` of ids at an address; negative ones turn large."""
    if width == 8:
        wide = uint64_at(ids, stop)
        if mapping == 0:
            _rank(start, stop, wide, None, num_experts, num_local, counts, route_rows)
        else:
            _rank(start, stop, wide, int32_at(mapping, num_experts), num_experts, num_local, counts, route_rows)
    else:
        narrow = uint32_at(ids, stop)
        if mapping == 0:
            _rank(start, stop, narrow, None, num_experts, num_local, counts, route_rows)
        else:
            _rank(start, stop, narrow, int32_at(mapping, num_experts), num_experts, num_local, counts, route_rows)


@kernel
def _place_any(start: int, stop: int, ids: int, width: int, mapping: int, num_experts: int, num_local: int, firsts: Any,
               route_rows: Any, slots: Any) -> None:  # fmt: skip
    """`_place` of ids at an address."""
    if width == 8:
        wide = uint64_at(ids, stop)
        if mapping == 0:
            _place(start, stop, wide, None, num_experts, num_local, firsts, route_rows, slots)
        else:
            _place(start, stop, wide, int32_at(mapping, num_experts), num_experts, num_local, firsts, route_rows, slots)
    else:
        narrow = uint32_at(ids, stop)
        if mapping == 0:
            _place(start, stop, narrow, None, num_experts, num_local, firsts, route_rows, slots)
        else:
            known = int32_at(mapping, num_experts)
            _place(start, stop, narrow, known, num_experts, num_local, firsts, route_rows, slots)


@kernel
def _align_kernel(part: int, start: int, stop: int, ids: int, mapping: int, sorted_token_ids: int, expert_ids: int,
                  num_tokens_post_padded: int, expert_offsets: int, expert_counts: int, route_rows: int,
                  num_routes: int, width: int, num_experts: int, num_local: int, block_size: int,
                  capacity: int) -> None:  # fmt: skip
    """The whole layout on one thread."""
    slots, rows = int32_at(sorted_token_ids, capacity), int32_at(route_rows, num_routes)
    firsts = np.empty((1, num_local + 1), np.int32)
    _rank_any(0, num_routes, ids, width, mapping, num_experts, num_local, firsts[0], rows)
    _plan(num_routes, block_size, firsts, slots, int32_at(expert_ids, capacity // block_size),
          int32_at(num_tokens_post_padded, 1), int64_at(expert_offsets, num_local + 1),
          int32_at(expert_counts, num_local))  # fmt: skip
    _place_any(0, num_routes, ids, width, mapping, num_experts, num_local, firsts[0], rows, slots)


@kernel
def _counts_at(address: int, parts: int, num_local: int) -> Any:
    """The counts of every part, [parts, num_local + 1], which stand apart in memory."""
    whole = int32_at(address, parts * (num_local + 1 + _APART))
    return whole.reshape((parts, num_local + 1 + _APART))[:, : num_local + 1]


@kernel
def _rank_kernel(part: int, start: int, stop: int, ids: int, mapping: int, sorted_token_ids: int, expert_ids: int,
                 num_tokens_post_padded: int, expert_offsets: int, expert_counts: int, route_rows: int, counts: int,
                 num_routes: int, width: int, num_experts: int, num_local: int, block_size: int,
                 capacity: int) -> None:  # fmt: skip
    mine = _counts_at(counts, part + 1, num_local)[part]
    _rank_any(start, stop, ids, width, mapping, num_experts, num_local, mine, int32_at(route_rows, num_routes))


@kernel
def _plan_kernel(part: int, start: int, parts: int, ids: int, mapping: int, sorted_token_ids: int, expert_ids: int,
                 num_tokens_post_padded: int, expert_offsets: int, expert_counts: int, route_rows: int, counts: int,
                 num_routes: int, width: int, num_experts: int, num_local: int, block_size: int,
                 capacity: int) -> None:  # fmt: skip
    _plan(num_routes, block_size, _counts_at(counts, parts, num_local), int32_at(sorted_token_ids, capacity),
          int32_at(expert_ids, capacity // block_size), int32_at(num_tokens_post_padded, 1),
          int64_at(expert_offsets, num_local + 1), int32_at(expert_counts, num_local))  # fmt: skip


@kernel
def _place_kernel(part: int, start: int, stop: int, ids: int, mapping: int, sorted_token_ids: int, expert_ids: int,
                  num_tokens_post_padded: int, expert_offsets: int, expert_counts: int, route_rows: int, counts: int,
                  num_routes: int, width: int, num_experts: int, num_local: int, block_size: int,
                  capacity: int) -> None:  # fmt: skip
    firsts = _counts_at(counts, part + 1, num_local)[part]
    _place_any(start, stop, ids, width, mapping, num_experts, num_local, firsts, int32_at(route_rows, num_routes),
               int32_at(sorted_token_ids, capacity))  # fmt: skip


@kernel
def _batched_kernel(part: int, start: int, num_routes: int, counts_given: int, sorted_token_ids: int, expert_ids: int,
                    num_tokens_post_padded: int, expert_offsets: int, expert_counts: int, route_rows: int,
                    max_num_tokens: int, num_local: int, block_size: int, capacity: int) -> None:  # fmt: skip
    """Routes of a batched buffer are in order already: every expert's valid rows come first."""
    slots, rows = int32_at(sorted_token_ids, capacity), int32_at(route_rows, num_routes)
    counts, given = int32_at(expert_counts, num_local), int32_at(counts_given, num_local)
    firsts = np.empty((1, num_local), np.int32)
    for expert in range(num_local):
        firsts[0, expert] = min(max(given[expert], 0), max_num_tokens)
    _plan(num_routes, block_size, firsts, slots, int32_at(expert_ids, capacity // block_size),
          int32_at(num_tokens_post_padded, 1), int64_at(expert_offsets, num_local + 1), counts)  # fmt: skip
    for expert in range(num_local):
        first, base = firsts[0, expert], expert * max_num_tokens
        for j in range(counts[expert]):
            slots[first + j] = base + j
            rows[base + j] = first + j
        rows[base + counts[expert] : base + max_num_tokens] = -1
