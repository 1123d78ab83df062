"""Layouts by a counting sort in two passes; stable, and exact whatever the number of threads.

The first pass leaves each route's rank among its expert's routes in `route_rows`, and the counts; the second adds the
expert's first slot and writes the route there. Every thread ranks its own span of routes, and one prefix over
(expert, thread) gives each thread the first slot of its span in every expert.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeyard.cpu.pointers import IDS, int32_at, int64_at, kernel, ranks_to_slots
from moeyard.cpu.threads import count_parts, run_parts
from moeyard.values import Layout

_LEAST_ROUTES = 1 << 17  # below this two threads lose more on the hand-over than they win

_BATCH = 256  # routes whose slots are found by vectors before any is written: fewer wait for the vector stores
_APART = 32  # counters between two threads' counters: neighbours on one cache line halve the speed of both


def align_launch(topk_ids: Tensor, expert_map: Tensor | None, out: Layout) -> None:
    """Fills the layout of int32 or int64 ids of any shape and strides."""
    unsigned = np.uint64 if topk_ids.dtype == torch.int64 else np.uint32  # negative ids turn large
    ids = topk_ids.contiguous().numpy().reshape(-1).view(unsigned)
    mapping = None if expert_map is None else expert_map.contiguous().numpy()
    num_routes = ids.size
    parts = count_parts(num_routes, _LEAST_ROUTES)
    if parts == 1:
        _align_kernel(ids, mapping, out.num_experts, num_routes, *_sizes(out), *_addresses(out))
        return
    firsts = np.empty((parts, out.num_local_experts + 1 + _APART), np.int32)
    outputs = (*_sizes(out), *out.tensors)
    run_parts(_rank_kernel, parts, num_routes, ids, mapping, out.num_experts, firsts, *outputs)
    _plan_kernel(num_routes, firsts, *_sizes(out), *_addresses(out))
    run_parts(_place_kernel, parts, num_routes, ids, mapping, out.num_experts, firsts, *outputs)


def batched_align_launch(expert_num_tokens: Tensor, max_num_tokens: int, out: Layout) -> None:
    """Fills the layout of a batched buffer."""
    counts = expert_num_tokens.contiguous().numpy()
    _batched_kernel(counts, max_num_tokens, out.route_rows.shape[0], *_sizes(out), *_addresses(out))


def _sizes(out: Layout) -> tuple[int, int, int]:
    return out.num_local_experts, out.block_size, out.sorted_token_ids.shape[0]


def _addresses(out: Layout) -> tuple[int, ...]:
    return (
        out.sorted_token_ids.data_ptr(),
        out.expert_ids.data_ptr(),
        out.num_tokens_post_padded.data_ptr(),
        out.expert_offsets.data_ptr(),
        out.expert_counts.data_ptr(),
        out.route_rows.data_ptr(),
    )


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
def _align_kernel(ids: Any, mapping: Any, num_experts: int, num_routes: int, num_local: int, block_size: int,
                  capacity: int, sorted_token_ids: int, expert_ids: int, num_tokens_post_padded: int,
                  expert_offsets: int, expert_counts: int, route_rows: int) -> None:  # fmt: skip
    """The whole layout on one thread."""
    slots, rows = int32_at(sorted_token_ids, capacity), int32_at(route_rows, num_routes)
    firsts = np.empty((1, num_local + 1), np.int32)
    _rank(0, num_routes, ids, mapping, num_experts, num_local, firsts[0], rows)
    _plan(num_routes, block_size, firsts, slots, int32_at(expert_ids, capacity // block_size),
          int32_at(num_tokens_post_padded, 1), int64_at(expert_offsets, num_local + 1),
          int32_at(expert_counts, num_local))  # fmt: skip
    _place(0, num_routes, ids, mapping, num_experts, num_local, firsts[0], rows, slots)


@kernel
def _rank_kernel(part: int, start: int, stop: int, ids: Any, mapping: Any, num_experts: int, firsts: Any,
                 num_local: int, block_size: int, capacity: int, sorted_token_ids: int, expert_ids: int,
                 num_tokens_post_padded: int, expert_offsets: int, expert_counts: int,
                 route_rows: int) -> None:  # fmt: skip
    _rank(start, stop, ids, mapping, num_experts, num_local, firsts[part], int32_at(route_rows, ids.size))


@kernel
def _plan_kernel(num_routes: int, firsts: Any, num_local: int, block_size: int, capacity: int, sorted_token_ids: int,
                 expert_ids: int, num_tokens_post_padded: int, expert_offsets: int, expert_counts: int,
                 route_rows: int) -> None:  # fmt: skip
    _plan(num_routes, block_size, firsts, int32_at(sorted_token_ids, capacity),
          int32_at(expert_ids, capacity // block_size), int32_at(num_tokens_post_padded, 1),
          int64_at(expert_offsets, num_local + 1), int32_at(expert_counts, num_local))  # fmt: skip


@kernel
def _place_kernel(part: int, start: int, stop: int, ids: Any, mapping: Any, num_experts: int, firsts: Any,
                  num_local: int, block_size: int, capacity: int, sorted_token_ids: int, expert_ids: int,
                  num_tokens_post_padded: int, expert_offsets: int, expert_counts: int,
                  route_rows: int) -> None:  # fmt: skip
    _place(start, stop, ids, mapping, num_experts, num_local, firsts[part], int32_at(route_rows, ids.size),
           int32_at(sorted_token_ids, capacity))  # fmt: skip


@kernel
def _batched_kernel(expert_num_tokens: Any, max_num_tokens: int, num_routes: int, num_local: int, block_size: int,
                    capacity: int, sorted_token_ids: int, expert_ids: int, num_tokens_post_padded: int,
                    expert_offsets: int, expert_counts: int, route_rows: int) -> None:  # fmt: skip
    """Routes of a batched buffer are in order already: every expert's valid rows come first."""
    slots, rows = int32_at(sorted_token_ids, capacity), int32_at(route_rows, num_routes)
    counts = int32_at(expert_counts, num_local)
    firsts = np.empty((1, num_local), np.int32)
    for expert in range(num_local):
        firsts[0, expert] = min(max(expert_num_tokens[expert], 0), max_num_tokens)
    _plan(num_routes, block_size, firsts, slots, int32_at(expert_ids, capacity // block_size),
          int32_at(num_tokens_post_padded, 1), int64_at(expert_offsets, num_local + 1), counts)  # fmt: skip
    for expert in range(num_local):
        first, base = firsts[0, expert], expert * max_num_tokens
        for j in range(counts[expert]):
            slots[first + j] = base + j
            rows[base + j] = first + j
        rows[base + counts[expert] : base + max_num_tokens] = -1
