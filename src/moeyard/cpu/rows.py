"""Row movement and sums: one pass over the bytes, dropped routes neither read nor written.

Large outputs are written with streaming stores: an ordinary store first reads the line that it overwrites, half as
many bytes again for nothing.
"""

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeyard.cpu.pointers import (
    LANES,
    LINE,
    add_bfloat,
    add_bfloats,
    add_float,
    add_floats,
    add_half,
    add_halves,
    copy_row,
    float32_at,
    int32_at,
    int64_at,
    kernel,
    prefetch_line,
    store_bfloat,
    store_bfloats,
    store_half,
    store_halves,
    stream_bfloats,
    stream_fence,
    stream_halves,
    uint8_at,
)
from moeyard.cpu.threads import count_parts, dense, run_parts
from moeyard.dispatch.ids import local_expert_ids

_LEAST_BYTES = 1 << 20  # a part smaller than this is not worth the hand-over to a thread
_STREAMED_BYTES = 1 << 23  # outputs from here on do not stay in a core's caches anyway
_FLOAT32, _BFLOAT16, _FLOAT16 = 0, 1, 2
_KINDS = {torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}


def permute_launch(
    hidden_states: Tensor,
    scales: Tensor | None,
    *,
    sorted_token_ids: Tensor,
    route_rows: Tensor,
    top_k: int,
    rows: Tensor,
    row_scales: Tensor | None,
) -> None:
    """Sends each token's row (and scales) to the slots of its routes; every row is read once."""
    _send_rows(hidden_states, route_rows, top_k, rows)
    if scales is not None and row_scales is not None:
        _send_rows(scales, route_rows, top_k, row_scales)


def _send_rows(source: Tensor, route_rows: Tensor, top_k: int, out: Tensor) -> None:
    source, row_bytes, stride = _as_rows(source)
    if row_bytes == 0:
        return
    route_rows = route_rows.contiguous()
    parts = count_parts(route_rows.shape[0] * row_bytes, _LEAST_BYTES)
    run_parts(
        _send_kernel, parts, source.shape[0], (source, route_rows, out), stride, top_k, row_bytes,
        _streams(out, row_bytes),
    )  # fmt: skip


def shuffle_rows_launch(input: Tensor, dst2src_map: Tensor, *, out: Tensor) -> None:
    """Gathers rows by an int32 or int64 map; sources out of range give zeros."""
    num_rows = input.shape[0]
    input, row_bytes, stride = _as_rows(input)
    dst2src_map = dst2src_map.contiguous()
    parts, wide = count_parts(out.nbytes, _LEAST_BYTES), int(dst2src_map.dtype == torch.int64)
    run_parts(_shuffle_kernel, parts, out.shape[0], (input, dst2src_map, out), stride, num_rows, wide, row_bytes)


def combine_launch(rows: Tensor, topk_weights: Tensor | None, *, route_rows: Tensor, top_k: int, out: Tensor) -> None:
    """Sums in k order in float32."""
    _sum_rows(rows, topk_weights, route_rows, top_k, out)


def moe_sum_launch(rows: Tensor, topk_ids: Tensor | None, expert_map: Tensor | None, *, out: Tensor) -> None:
    """Sums [T, K, H] over K in k order in float32, skipping routes whose id is dropped."""
    num_tokens, top_k, hidden_size = rows.shape
    taken = None
    if topk_ids is not None:
        row = torch.arange(num_tokens * top_k, dtype=torch.int32)
        taken = torch.where(local_expert_ids(topk_ids.reshape(-1), expert_map) >= 0, row, -1)
    _sum_rows(rows.reshape(num_tokens * top_k, hidden_size), None, taken, top_k, out)


def _sum_rows(rows: Tensor, weights: Tensor | None, row_of_route: Tensor | None, top_k: int, out: Tensor) -> None:
    rows, row_bytes, stride = _as_rows(rows)
    num_tokens, hidden_size = out.shape
    parts = count_parts(num_tokens * (top_k + 1) * hidden_size * rows.element_size(), _LEAST_BYTES)
    run_parts(
        _sum_kernel, parts, num_tokens, (rows, dense(weights), dense(row_of_route), out), _KINDS[rows.dtype], stride,
        top_k, hidden_size, row_bytes, _streams(out, row_bytes),
    )  # fmt: skip


def _streams(out: Tensor, row_bytes: int) -> int:
    """Whether to write past the caches: the output is large and its rows are whole aligned lines."""
    return int(out.nbytes >= _STREAMED_BYTES and row_bytes % LINE == 0 and out.data_ptr() % LINE == 0)


def _as_rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """A tensor whose rows are dense, with the bytes of a row and the bytes from row to row."""
    row_bytes = prod(tensor.shape[1:]) * tensor.element_size()
    if not tensor.shape[0] or not tensor[0].is_contiguous():
        tensor = tensor.contiguous()
    return tensor, row_bytes, tensor.stride(0) * tensor.element_size()


@kernel
def _send_kernel(part: int, start: int, stop: int, source: int, route_rows: int, out: int, stride: int, top_k: int,
                 row_bytes: int, streamed: int) -> None:  # fmt: skip
    rows = int32_at(route_rows, stop * top_k)
    for token in range(start, stop):
        for k in range(top_k):
            row = np.int64(rows[token * top_k + k])
            if row >= 0:
                copy_row(out + row * row_bytes, source + token * stride, row_bytes, streamed)
    stream_fence()


@kernel
def _shuffle_kernel(part: int, start: int, stop: int, source: int, dst2src_map: int, out: int, stride: int,
                    num_rows: int, wide: int, row_bytes: int) -> None:  # fmt: skip
    narrow_map, wide_map = int32_at(dst2src_map, stop), int64_at(dst2src_map, stop)
    for row in range(start, stop):
        come = wide_map[row] if wide else np.int64(narrow_map[row])
        if 0 <= come < num_rows:
            copy_row(out + row * row_bytes, source + come * stride, row_bytes, 0)
        else:
            uint8_at(out + row * row_bytes, row_bytes)[:] = 0


@kernel
def _sum_kernel(part: int, start: int, stop: int, rows: int, weights: int, row_of_route: int, out: int, kind: int,
                stride: int, top_k: int, hidden_size: int, row_bytes: int, streamed: int) -> None:  # fmt: skip
    table, factors = int32_at(row_of_route, stop * top_k), float32_at(weights, stop * top_k)
    sums = np.empty(hidden_size, np.float32)
    total = sums.ctypes.data
    for token in range(start, stop):
        sums[:] = 0
        for route in range(token * top_k, (token + 1) * top_k):
            row = _row_of(route, row_of_route, table)
            if row >= 0:
                factor = factors[route] if weights != 0 else np.float32(1)
                ahead = row
                if route + 1 < stop * top_k:
                    ahead = max(_row_of(route + 1, row_of_route, table), 0)
                add_row(kind, total, factor, rows + row * stride, rows + ahead * stride, hidden_size)
        store_row(kind, out + token * row_bytes, total, hidden_size, streamed)
    stream_fence()


@kernel
def _row_of(route: int, row_of_route: int, table: Any) -> Any:
    return np.int64(table[route]) if row_of_route != 0 else np.int64(route)


@kernel
def add_row(kind: int, total: int, factor: Any, row: int, ahead: int, hidden_size: int) -> None:
    """total += factor * row, in float32, while the row `ahead` is on its way: rows lie anywhere in memory."""
    whole = hidden_size // LANES * LANES
    if kind == _FLOAT32:
        for i in range(0, whole, LANES):
            prefetch_line(ahead + 4 * i)
            prefetch_line(ahead + 4 * i + LINE)
            add_floats(total + 4 * i, factor, row + 4 * i)
        for i in range(whole, hidden_size):
            add_float(total + 4 * i, factor, row + 4 * i)
    elif kind == _BFLOAT16:
        for i in range(0, whole, LANES):
            prefetch_line(ahead + 2 * i)
            add_bfloats(total + 4 * i, factor, row + 2 * i)
        for i in range(whole, hidden_size):
            add_bfloat(total + 4 * i, factor, row + 2 * i)
    else:
        for i in range(0, whole, LANES):
            prefetch_line(ahead + 2 * i)
            add_halves(total + 4 * i, factor, row + 2 * i)
        for i in range(whole, hidden_size):
            add_half(total + 4 * i, factor, row + 2 * i)


@kernel
def store_row(kind: int, out: int, total: int, hidden_size: int, streamed: int) -> None:
    """out = total, rounded to its dtype; `streamed` rows are whole aligned lines."""
    whole = hidden_size // LANES * LANES
    if kind == _FLOAT32:
        copy_row(out, total, 4 * hidden_size, streamed)
    elif kind == _BFLOAT16:
        for i in range(0, whole, LANES):
            if streamed:
                stream_bfloats(out + 2 * i, total + 4 * i)
            else:
                store_bfloats(out + 2 * i, total + 4 * i)
        for i in range(whole, hidden_size):
            store_bfloat(out + 2 * i, total + 4 * i)
    else:
        for i in range(0, whole, LANES):
            if streamed:
                stream_halves(out + 2 * i, total + 4 * i)
            else:
                store_halves(out + 2 * i, total + 4 * i)
        for i in range(whole, hidden_size):
            store_half(out + 2 * i, total + 4 * i)
