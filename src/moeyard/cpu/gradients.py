"""Sums of outer products: the gradients of expert weights. Every thread has its columns of all experts."""

from typing import Any

import numpy as np
from torch import Tensor

from moeyard.cpu.pointers import int32_at, int64_at, kernel
from moeyard.cpu.products import COLUMNS, FLOAT32, KINDS, ROWS, UNIT, dense_rows, product, share_parts
from moeyard.cpu.rows import add_row, store_row
from moeyard.cpu.threads import dense, run_parts
from moeyard.values import Segments

_LONGEST = 4096
"""Rows whose products are summed before the next ones are packed: 48 of their columns are 768 KiB."""


def grouped_outer_launch(grads: Tensor, rows: Tensor, segments: Segments, row_divisor: int, *, out: Tensor) -> None:
    """Fills out[e] = the sum over the rows r of expert e of grads[r // divisor] x rows[r // row_divisor]."""
    first_rows, row_counts, slots, divisor, *_ = segments
    num_experts, columns, size = out.shape
    if not out.numel():
        return
    grads, rows = dense_rows(grads), dense_rows(rows)
    width = grads.element_size()
    work = divisor * grads.shape[0] * size * columns // 16  # products, in bytes of weights that take as long
    run_parts(
        _outer_kernel, share_parts(columns, work), -(-columns // UNIT),
        (grads, rows, dense(slots), first_rows.contiguous(), row_counts.contiguous(), out), KINDS[grads.dtype],
        KINDS[out.dtype], grads.stride(0) * width, rows.stride(0) * width, divisor, row_divisor, num_experts, columns,
        size,
    )  # fmt: skip


@kernel
def _outer_kernel(
    part: int, start: int, stop: int, grads: int, rows: int, slots: int, first_rows: int, row_counts: int, out: int,
    kind: int, out_kind: int, grad_stride: int, row_stride: int, divisor: int, row_divisor: int, num_experts: int,
    columns: int, size: int,
) -> None:  # fmt: skip
    """Both operands are packed as float32 columns, so that a sum over rows is a dot product.

    A sum is that of its spans of `_LONGEST` rows, in their order.
    """
    width, out_width = 4 if kind == FLOAT32 else 2, 4 if out_kind == FLOAT32 else 2
    firsts, counts = int64_at(first_rows, num_experts), int32_at(row_counts, num_experts)
    low, high = start * UNIT, min(stop * UNIT, columns)
    most: Any = 0
    for expert in range(num_experts):
        most = max(most, min(np.int64(counts[expert]), _LONGEST))
    left, right = np.empty(ROWS * most + 1, np.float32), np.empty(COLUMNS * most + 1, np.float32)
    sums, total = np.empty(ROWS * COLUMNS, np.float32), np.empty(ROWS * COLUMNS, np.float32)
    line = np.empty(COLUMNS, np.float32)
    for expert in range(num_experts):
        first, count = firsts[expert], np.int64(counts[expert])
        for column in range(low, high, ROWS):
            tall = min(ROWS, high - column)
            for other in range(0, size, COLUMNS):
                some = min(COLUMNS, size - other)
                total[:] = 0
                for begin in range(0, count, _LONGEST):
                    span = min(_LONGEST, count - begin)
                    if other == 0 or count > _LONGEST:
                        _pack(kind, left, line, grads + width * column, grad_stride, slots, first + begin, span,
                              divisor, tall)  # fmt: skip
                    _pack(kind, right, line, rows + width * other, row_stride, slots, first + begin, span,
                          row_divisor, some)  # fmt: skip
                    product(FLOAT32, sums.ctypes.data, tall, left.ctypes.data, right.ctypes.data, some, span)
                    total += sums
                for i in range(tall):
                    at = (expert * columns + column + i) * size + other
                    store_row(out_kind, out + out_width * at, total.ctypes.data + 4 * i * COLUMNS, some, 0)
    left[:1] = 0  # numba frees an array after its last use, though its address is still in use
    right[:1] = 0
    sums[:1] = 0
    total[:1] = 0
    line[:1] = 0


@kernel
def _pack(
    kind: int, target: Any, line: Any, source: int, stride: int, slots: int, first: int, count: int,
    divisor: int, columns: int,
) -> None:  # fmt: skip
    """target[j, k] = column j of the row that entry first + k reads, as float32."""
    for k in range(count):
        entry = np.int64(int32_at(slots, first + k + 1)[first + k]) if slots != 0 else np.int64(first + k)
        row = source + entry // divisor * stride
        line[:] = 0
        add_row(kind, line.ctypes.data, np.float32(1), row, row, columns)
        for j in range(columns):
            target[j * count + k] = line[j]
