"""The experts of a layer of quantised weights, in two passes over codes as `cpu/experts.py` makes them over weights.

Rows are rounded as the scheme says when they are gathered: hidden states in the first pass, what the activation left,
in the dtype of the hidden states, in the second. Each thread does that for itself, so none waits in between.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeyard.cpu.activation import apply, code_of
from moeyard.cpu.coded.plan import plans_of
from moeyard.cpu.coded.products import coded_product, coded_room
from moeyard.cpu.coded.rows import take_row
from moeyard.cpu.dots import LANES
from moeyard.cpu.pointers import float32_at, int32_at, int64_at, kernel
from moeyard.cpu.products import COLUMNS, FLOAT32, KINDS, ROWS, UNIT, add_bias, dense_rows, largest_chunk, share_parts
from moeyard.cpu.rows import store_row
from moeyard.cpu.threads import dense, run_parts
from moeyard.values import ExpertCall, Layout


def quantised_experts_launch(
    hidden_states: Tensor, factors: Tensor, layout: Layout, call: ExpertCall, *, out: Tensor
) -> None:
    """Fills out [T, H] from a compact layout of its routes; `factors` are dense."""
    weights = call.weights
    num_tokens, hidden_size = out.shape
    num_local, size, top_k = weights.num_local_experts, weights.intermediate_size, layout.top_k
    kind, width = KINDS[hidden_states.dtype], hidden_states.element_size()
    hidden_states = dense_rows(hidden_states)
    middle = hidden_states.new_empty((layout.num_routes, size))
    sums = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32)
    first, second, _held = plans_of(weights)  # plans hold addresses of tensors, which live until this returns
    used_bytes = min(layout.num_routes, num_local) * weights.w2[0].nbytes
    common, shared = (
        (layout.sorted_token_ids, factors, layout.expert_offsets),
        (kind, top_k, call.weight_on_input, num_local),
    )
    run_parts(
        _first_kernel, share_parts(size, (1 + weights.gated) * used_bytes), -(-size // UNIT),
        (*common, hidden_states, first, dense(weights.w13_bias), middle), *shared, hidden_states.stride(0) * width,
        hidden_size, size, weights.gated, *code_of(call.activation),
    )  # fmt: skip
    run_parts(
        _second_kernel, share_parts(hidden_size, used_bytes), -(-hidden_size // UNIT),
        (*common, middle, second, dense(weights.w2_bias), sums, out), *shared, size, hidden_size, num_tokens,
    )  # fmt: skip


@kernel
def _first_kernel(
    part: int, start: int, stop: int, slots: int, factors: int, offsets: int, rows: int, plan: int, bias: int,
    middle: int, kind: int, top_k: int, weight_on_input: bool, num_local: int, row_stride: int, hidden_size: int,
    size: int, gated: bool, code: int, alpha: float, beta: float, limit: float,
) -> None:  # fmt: skip
    """middle[slot, columns] = act(row @ w13) for this part's columns of every expert."""
    width = 4 if kind == FLOAT32 else 2
    firsts = int64_at(offsets, num_local + 1)
    routes, weights = int32_at(slots, firsts[num_local]), factors
    low, high = start * UNIT, min(stop * UNIT, size)
    most = largest_chunk(firsts, num_local)
    packed, kept = np.empty(most * hidden_size, np.float32), np.zeros((2 * most + 1) * COLUMNS, np.float32)
    room, spare = np.empty(coded_room(hidden_size), np.float32), np.empty(hidden_size + LANES, np.float32)
    x, gates, ups = packed.ctypes.data, kept.ctypes.data, kept.ctypes.data + 4 * most * COLUMNS
    scratch, wide = kept[2 * most * COLUMNS :], (2 if gated else 1) * size
    for expert in range(num_local):
        for chunk in range(firsts[expert], firsts[expert + 1], ROWS):
            taken = min(ROWS, firsts[expert + 1] - chunk)
            for i in range(taken):
                route = np.int64(routes[chunk + i])
                factor = float32_at(weights, route + 1)[route] if weight_on_input else np.float32(1)
                take_row(plan, kind, x + 4 * i * hidden_size, rows + route // top_k * row_stride, expert, factor,
                         weight_on_input, spare.ctypes.data)  # fmt: skip
            for column in range(low, high, COLUMNS):
                some, here = min(COLUMNS, high - column), expert * wide + column
                coded_product(plan, gates, taken, x, expert, column, some, room.ctypes.data)
                add_bias(kind, gates, taken, bias + width * here if bias != 0 else 0, some)
                if gated:
                    coded_product(plan, ups, taken, x, expert, size + column, some, room.ctypes.data)
                    add_bias(kind, ups, taken, bias + width * (here + size) if bias != 0 else 0, some)
                for i in range(taken):
                    gate = float32_at(gates + 4 * i * COLUMNS, COLUMNS)
                    up = float32_at(ups + 4 * i * COLUMNS, COLUMNS if gated else 0)
                    apply(code, alpha, beta, limit, gate, up, some, scratch)
                    store_row(kind, middle + width * ((chunk + i) * size + column), gate.ctypes.data, some, 0)
    packed[:1] = 0  # numba frees an array after its last use, though its address is still in use
    room[:1] = 0
    spare[:1] = 0


@kernel
def _second_kernel(
    part: int, start: int, stop: int, slots: int, factors: int, offsets: int, middle: int, plan: int, bias: int,
    sums: int, out: int, kind: int, top_k: int, weight_on_input: bool, num_local: int, size: int, hidden_size: int,
    num_tokens: int,
) -> None:  # fmt: skip
    """out[token, columns] = sum of weight * (middle[slot] @ w2) for this part's columns, experts in ascending order."""
    width = 4 if kind == FLOAT32 else 2
    firsts = int64_at(offsets, num_local + 1)
    routes = int32_at(slots, firsts[num_local])
    low, high = start * UNIT, min(stop * UNIT, hidden_size)
    most = largest_chunk(firsts, num_local)
    packed, kept = np.empty(most * size, np.float32), np.empty(most * COLUMNS, np.float32)
    room, spare = np.empty(coded_room(size), np.float32), np.empty(size + LANES, np.float32)
    x, partial = packed.ctypes.data, kept.ctypes.data
    for token in range(num_tokens):
        float32_at(sums + 4 * (token * hidden_size + low), high - low)[:] = 0
    for expert in range(num_local):
        for chunk in range(firsts[expert], firsts[expert + 1], ROWS):
            taken = min(ROWS, firsts[expert + 1] - chunk)
            for i in range(taken):
                take_row(plan, kind, x + 4 * i * size, middle + width * (chunk + i) * size, expert, np.float32(1),
                         False, spare.ctypes.data)  # fmt: skip
            for column in range(low, high, COLUMNS):
                some, here = min(COLUMNS, high - column), expert * hidden_size + column
                coded_product(plan, partial, taken, x, expert, column, some, room.ctypes.data)
                add_bias(kind, partial, taken, bias + width * here if bias != 0 else 0, some)
                for i in range(taken):
                    route = np.int64(routes[chunk + i])
                    factor = np.float32(1) if weight_on_input else float32_at(factors, route + 1)[route]
                    total = float32_at(sums + 4 * (route // top_k * hidden_size + column), some)
                    row: Any = float32_at(partial + 4 * i * COLUMNS, some)
                    for j in range(some):
                        total[j] += factor * row[j]
    if kind != FLOAT32:
        for token in range(num_tokens):
            at = token * hidden_size + low
            store_row(kind, out + width * at, sums + 4 * at, high - low, 0)
    packed[:1] = 0  # numba frees an array after its last use, though its address is still in use
    kept[:1] = 0
    room[:1] = 0
    spare[:1] = 0
