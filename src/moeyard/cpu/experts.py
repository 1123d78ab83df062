"""The experts of a layer in two passes over their weights, for one token as for many.

The first pass gathers rows, multiplies by gate and up, and keeps what the activation leaves: one row per route, in the
dtype of the weights. The second multiplies by the down weights and adds each row, weighted, to its token's float32 sum:
experts in ascending order. Each thread has its columns of every expert, so no thread waits in between.
"""

import numpy as np
import torch
from torch import Tensor

from moeyard.cpu.activation import activate_launch, apply, code_of
from moeyard.cpu.coded.experts import quantised_experts_launch
from moeyard.cpu.layout import align_launch
from moeyard.cpu.pointers import float32_at, int32_at, int64_at, kernel
from moeyard.cpu.products import (
    COLUMNS,
    FLOAT32,
    KINDS,
    ROWS,
    UNIT,
    add_bias,
    dense_rows,
    grouped_gemm_launch,
    largest_chunk,
    product,
    share_parts,
    widen,
)
from moeyard.cpu.rows import store_row
from moeyard.cpu.threads import dense, run_parts
from moeyard.values import ExpertCall, Layout

__all__ = ["activate_launch", "fused_experts_launch", "grouped_gemm_launch"]


def fused_experts_launch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall, *, out: Tensor
) -> None:
    """Fills out [T, H]."""
    weights, activation = call.weights, call.activation
    num_tokens, hidden_size = out.shape
    num_routes, top_k = topk_ids.numel(), topk_ids.shape[1]
    if not num_routes:
        out.zero_()
        return
    num_local, size = weights.num_local_experts, weights.intermediate_size
    lengths = (2 * (num_local + 1), num_routes, num_routes, num_routes, num_local, 1)
    parts = torch.empty(sum(lengths), dtype=torch.int32).unsafe_split_with_sizes(lengths)
    offsets, slots, routes, blocks, counts, used = parts[0].view(torch.int64), *parts[1:]
    layout = Layout(slots, blocks, used, offsets, counts, routes, call.num_experts, num_local, 1, top_k)
    align_launch(topk_ids, call.expert_map, layout)
    factors = topk_weights.contiguous()
    if weights.scheme is not None:
        quantised_experts_launch(hidden_states, factors, layout, call, out=out)
        return
    kind, width = KINDS[hidden_states.dtype], hidden_states.element_size()
    hidden_states = dense_rows(hidden_states)
    middle = hidden_states.new_empty((num_routes, size))
    sums = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32)
    w13, w2 = weights.w13.contiguous(), weights.w2.contiguous()
    used_bytes = min(num_routes, num_local) * size * hidden_size * width
    common, shared = (slots, factors, offsets), (kind, top_k, call.weight_on_input, num_local)
    run_parts(
        _first_kernel, share_parts(size, (1 + weights.gated) * used_bytes), -(-size // UNIT),
        (*common, hidden_states, w13, dense(weights.w13_bias), middle), *shared, hidden_states.stride(0) * width,
        hidden_size, size, weights.gated, *code_of(activation),
    )  # fmt: skip
    run_parts(
        _second_kernel, share_parts(hidden_size, used_bytes), -(-hidden_size // UNIT),
        (*common, middle, w2, dense(weights.w2_bias), sums, out), *shared, size, hidden_size, num_tokens,
    )  # fmt: skip


@kernel
def _first_kernel(
    part: int, start: int, stop: int, slots: int, factors: int, offsets: int, rows: int, w13: int, bias: int,
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
    x, gates, ups = packed.ctypes.data, kept.ctypes.data, kept.ctypes.data + 4 * most * COLUMNS
    scratch, wide = kept[2 * most * COLUMNS :], (2 if gated else 1) * size
    for expert in range(num_local):
        for chunk in range(firsts[expert], firsts[expert + 1], ROWS):
            taken = min(ROWS, firsts[expert + 1] - chunk)
            for i in range(taken):
                route = np.int64(routes[chunk + i])
                widen(kind, x + 4 * i * hidden_size, rows + route // top_k * row_stride, hidden_size)
                if weight_on_input:
                    float32_at(x + 4 * i * hidden_size, hidden_size)[:] *= float32_at(weights, route + 1)[route]
            for column in range(low, high, COLUMNS):
                some, here = min(COLUMNS, high - column), expert * wide + column
                product(kind, gates, taken, x, w13 + width * here * hidden_size, some, hidden_size)
                add_bias(kind, gates, taken, bias + width * here if bias != 0 else 0, some)
                if gated:
                    here += size
                    product(kind, ups, taken, x, w13 + width * here * hidden_size, some, hidden_size)
                    add_bias(kind, ups, taken, bias + width * here if bias != 0 else 0, some)
                for i in range(taken):
                    gate = float32_at(gates + 4 * i * COLUMNS, COLUMNS)
                    up = float32_at(ups + 4 * i * COLUMNS, COLUMNS if gated else 0)
                    apply(code, alpha, beta, limit, gate, up, some, scratch)
                    store_row(kind, middle + width * ((chunk + i) * size + column), gate.ctypes.data, some, 0)
    packed[:1] = 0  # numba frees an array after its last use, though its address is still in use


@kernel
def _second_kernel(
    part: int, start: int, stop: int, slots: int, factors: int, offsets: int, middle: int, w2: int, bias: int,
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
    x, partial = packed.ctypes.data, kept.ctypes.data
    for token in range(num_tokens):
        float32_at(sums + 4 * (token * hidden_size + low), high - low)[:] = 0
    for expert in range(num_local):
        for chunk in range(firsts[expert], firsts[expert + 1], ROWS):
            taken = min(ROWS, firsts[expert + 1] - chunk)
            for i in range(taken):
                widen(kind, x + 4 * i * size, middle + width * (chunk + i) * size, size)
            for column in range(low, high, COLUMNS):
                some, here = min(COLUMNS, high - column), expert * hidden_size + column
                product(kind, partial, taken, x, w2 + width * here * size, some, size)
                add_bias(kind, partial, taken, bias + width * here if bias != 0 else 0, some)
                for i in range(taken):
                    route = np.int64(routes[chunk + i])
                    factor = np.float32(1) if weight_on_input else float32_at(factors, route + 1)[route]
                    total = float32_at(sums + 4 * (route // top_k * hidden_size + column), some)
                    row = float32_at(partial + 4 * i * COLUMNS, some)
                    for j in range(some):
                        total[j] += factor * row[j]
    if kind != FLOAT32:
        for token in range(num_tokens):
            at = token * hidden_size + low
            store_row(kind, out + width * at, sums + 4 * at, high - low, 0)
    packed[:1] = 0  # numba frees an array after its last use, though its address is still in use
    kept[:1] = 0
