"""Rows times the weights of their experts: every thread computes its share of the columns of all experts.

A chunk of an expert's rows is widened to float32 once and stays in the second cache; weights pass once a chunk. Sums
are float32, over blocks of BLOCK elements, in an order that depends on nothing else.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeyard.cpu import dots
from moeyard.cpu.dots import STEP
from moeyard.cpu.pointers import (
    add_bfloat,
    add_float,
    add_half,
    copy_row,
    float32_at,
    int32_at,
    int64_at,
    kernel,
)
from moeyard.cpu.rows import store_row
from moeyard.cpu.threads import count_parts, dense, run_parts
from moeyard.values import Segments

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
ROWS = 48
"""Rows of a chunk: with BLOCK elements of each they fill less than half of a second cache of 512 KiB."""
COLUMNS = 48
"""Columns whose sums are kept at once; shares of columns are multiples of UNIT."""
UNIT = 12
LEAST_BYTES = 1 << 17
"""Weights of a part: fewer are not worth the hand-over to a thread."""
BLOCK = 1024
"""Elements of a row that are summed before the next tile takes its turn."""


def grouped_gemm_launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    segments: Segments,
    *,
    out: Tensor,
) -> None:
    """Fills out[r] = (rows[r // divisor] @ weight[e].T + bias[e]) * topk_weights[r] for the rows r of every expert."""
    first_rows, row_counts, slots, divisor, *_ = segments
    num_experts, columns, size = weight.shape
    rows, weight = dense_rows(rows), weight.contiguous()
    first_rows, row_counts = first_rows.contiguous(), row_counts.contiguous()
    parts = share_parts(columns, min(out.shape[0], num_experts) * columns * size * weight.element_size())
    run_parts(
        _grouped_kernel, parts, -(-columns // UNIT),
        (rows, dense(slots), first_rows, row_counts, weight, dense(bias), dense(topk_weights), out), KINDS[rows.dtype],
        rows.stride(0) * rows.element_size(), divisor, num_experts, columns, size,
    )  # fmt: skip


def dense_rows(rows: Tensor) -> Tensor:
    """Rows whose elements are next to each other."""
    return rows if rows.stride(-1) == 1 or not rows.numel() else rows.contiguous()


def share_parts(columns: int, weight_bytes: int) -> int:
    """Threads for products with `columns` columns that read `weight_bytes`."""
    return max(1, min(count_parts(weight_bytes, LEAST_BYTES), columns // UNIT))


@kernel
def dots_3x3(kind: int, sums: int, stride: int, x: int, x_stride: int, w: int, w_stride: int, steps: int) -> None:
    if kind == FLOAT32:
        dots.float_dots_3x3(sums, stride, x, x_stride, w, w_stride, steps)
    elif kind == BFLOAT16:
        dots.bfloat_dots_3x3(sums, stride, x, x_stride, w, w_stride, steps)
    else:
        dots.half_dots_3x3(sums, stride, x, x_stride, w, w_stride, steps)


@kernel
def dots_rx4(
    kind: int, rows: int, sums: int, stride: int, x: int, x_stride: int, w: int, w_stride: int, steps: int
) -> None:
    if kind == FLOAT32:
        if rows == 2:
            dots.float_dots_2x4(sums, stride, x, x_stride, w, w_stride, steps)
        else:
            dots.float_dots_1x4(sums, stride, x, x_stride, w, w_stride, steps)
    elif kind == BFLOAT16:
        if rows == 2:
            dots.bfloat_dots_2x4(sums, stride, x, x_stride, w, w_stride, steps)
        else:
            dots.bfloat_dots_1x4(sums, stride, x, x_stride, w, w_stride, steps)
    elif rows == 2:
        dots.half_dots_2x4(sums, stride, x, x_stride, w, w_stride, steps)
    else:
        dots.half_dots_1x4(sums, stride, x, x_stride, w, w_stride, steps)


@kernel
def dots_1x1(kind: int, sums: int, x: int, w: int, steps: int) -> None:
    if kind == FLOAT32:
        dots.float_dots_1x1(sums, 0, x, 0, w, 0, steps)
    elif kind == BFLOAT16:
        dots.bfloat_dots_1x1(sums, 0, x, 0, w, 0, steps)
    else:
        dots.half_dots_1x1(sums, 0, x, 0, w, 0, steps)


@kernel
def add_one(kind: int, total: int, factor: Any, value: int) -> None:
    """total += factor * value for one float32 total and one value of a kind, at addresses."""
    if kind == FLOAT32:
        add_float(total, factor, value)
    elif kind == BFLOAT16:
        add_bfloat(total, factor, value)
    else:
        add_half(total, factor, value)


@kernel
def strip(kind: int, width: int, sums: int, rows: int, x: int, w: int, first: int, columns: int, size: int, start: int,
          steps: int) -> None:  # fmt: skip
    """sums[i, j] += dot products of `steps` steps from element `start` on, for columns [first, columns) of all rows."""
    x_at, w_at = x + 4 * start, w + width * start
    quads = first + (columns - first) // 4 * 4
    for j in range(first, quads, 4):
        for i in range(0, rows, 2):
            dots_rx4(kind, min(2, rows - i), sums + 4 * (i * COLUMNS + j), 4 * COLUMNS, x_at + 4 * i * size, 4 * size,
                     w_at + width * j * size, width * size, steps)  # fmt: skip
    for j in range(quads, columns):
        for i in range(rows):
            dots_1x1(kind, sums + 4 * (i * COLUMNS + j), x_at + 4 * i * size, w_at + width * j * size, steps)


@kernel
def product(kind: int, sums: int, rows: int, x: int, w: int, columns: int, size: int) -> None:
    """sums[i, j] = x[i] . w[j] for at most ROWS rows of float32 (from `widen`) and COLUMNS weight rows of a kind.

    `sums` has COLUMNS columns. Every sum is that of its blocks' sums, then of the last elements one by one.
    """
    width = 4 if kind == FLOAT32 else 2
    float32_at(sums, rows * COLUMNS)[:] = 0
    whole = size // STEP * STEP
    threes = 0 if rows < 3 else rows // 3 * 3 - (3 if rows % 3 == 1 else 0)
    tiled = columns if columns % 3 == 0 else columns // 12 * 12
    if threes == 0:  # weights pass once: rows of theirs whole, so that reading runs ahead
        for j in range(0, columns, 4):
            for start in range(0, whole, BLOCK):
                strip(kind, width, sums, rows, x, w, j, min(j + 4, columns), size, start,
                      min(BLOCK, whole - start) // STEP)  # fmt: skip
    else:
        for start in range(0, whole, BLOCK):
            steps = min(BLOCK, whole - start) // STEP
            for j in range(0, tiled, 3):
                for i in range(0, threes, 3):
                    dots_3x3(kind, sums + 4 * (i * COLUMNS + j), 4 * COLUMNS, x + 4 * (i * size + start), 4 * size,
                             w + width * (j * size + start), width * size, steps)  # fmt: skip
            strip(kind, width, sums, threes, x, w, tiled, columns, size, start, steps)
            strip(kind, width, sums + 4 * threes * COLUMNS, rows - threes, x + 4 * threes * size, w, 0, columns, size,
                  start, steps)  # fmt: skip
    if whole < size:
        floats = float32_at(x, rows * size)
        for j in range(columns):
            for i in range(rows):
                for k in range(whole, size):
                    add_one(kind, sums + 4 * (i * COLUMNS + j), floats[i * size + k], w + width * (j * size + k))


@kernel
def widen(kind: int, target: int, source: int, size: int) -> None:
    """A row as float32 in the order in which dot products take weights of its kind."""
    if kind == FLOAT32:
        copy_row(target, source, 4 * size, 0)
        return
    whole = size // STEP * STEP
    for k in range(0, whole, STEP):
        if kind == BFLOAT16:
            dots.widen_bfloats(target + 4 * k, source + 2 * k)
        else:
            dots.widen_halves(target + 4 * k, source + 2 * k)
    float32_at(target + 4 * whole, size - whole)[:] = 0
    for k in range(whole, size):
        add_one(kind, target + 4 * k, np.float32(1), source + 2 * k)


@kernel
def add_bias(kind: int, sums: int, rows: int, bias: int, columns: int) -> None:
    """sums[i, j] += bias[j]; `bias` is an address of values of a kind, or 0."""
    width = 4 if kind == FLOAT32 else 2
    if bias != 0:
        for i in range(rows):
            for j in range(columns):
                add_one(kind, sums + 4 * (i * COLUMNS + j), np.float32(1), bias + width * j)


@kernel
def largest_chunk(offsets: Any, num_local: int) -> int:
    """Rows of the largest chunk of an expert's rows; `offsets` say where those of each begin."""
    most = 0
    for expert in range(num_local):
        most = max(most, min(offsets[expert + 1] - offsets[expert], ROWS))
    return most


@kernel
def _grouped_kernel(
    part: int, start: int, stop: int, rows: int, slots: int, first_rows: int, row_counts: int, weight: int, bias: int,
    factors: int, out: int, kind: int, row_stride: int, divisor: int, num_experts: int, columns: int, size: int,
) -> None:  # fmt: skip
    width = 4 if kind == FLOAT32 else 2
    firsts, counts = int64_at(first_rows, num_experts), int32_at(row_counts, num_experts)
    low, high = start * UNIT, min(stop * UNIT, columns)
    most: Any = 0
    for expert in range(num_experts):
        most = max(most, min(np.int64(counts[expert]), ROWS))
    packed, kept = np.empty(most * size, np.float32), np.empty(most * COLUMNS, np.float32)
    x, sums = packed.ctypes.data, kept.ctypes.data
    for expert in range(num_experts):
        end = firsts[expert] + counts[expert]
        for chunk in range(firsts[expert], end, ROWS):
            taken = min(ROWS, end - chunk)
            for i in range(taken):
                row = _row_at(slots, chunk + i) // divisor
                widen(kind, x + 4 * i * size, rows + row * row_stride, size)
            for column in range(low, high, COLUMNS):
                some = min(COLUMNS, high - column)
                product(kind, sums, taken, x, weight + width * (expert * columns + column) * size, some, size)
                add_bias(kind, sums, taken, bias + width * (expert * columns + column) if bias != 0 else 0, some)
                for i in range(taken):
                    row = _row_at(slots, chunk + i)
                    if factors != 0:
                        float32_at(sums + 4 * i * COLUMNS, some)[:] *= float32_at(factors, row + 1)[row]
                    store_row(kind, out + width * (row * columns + column), sums + 4 * i * COLUMNS, some, 0)
    packed[:1] = 0  # numba frees an array after its last use, though its address is still in use
    kept[:1] = 0


@kernel
def _row_at(slots: int, slot: int) -> Any:
    return np.int64(int32_at(slots, slot + 1)[slot]) if slots != 0 else np.int64(slot)
