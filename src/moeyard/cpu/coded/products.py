"""Products with quantised weights.

One row meets weights that are widened in registers. Several rows meet a tile of UNIT weight rows and BLOCK columns,
which is widened once and stays in the first caches. The bits are the same.
"""

from typing import Any

import numpy as np
import torch

from moeyard.cpu.coded import codes
from moeyard.cpu.coded.codes import E2M1, E4M3, EACH, INT4, INT8, PAIRS, UINT4
from moeyard.cpu.coded.plan import (
    CODE,
    MODE,
    ROWS,
    SIZE,
    STORED,
    block_of,
    read_scales,
    read_side_by_side,
    rest_at,
    scale_room,
    step_bytes,
)
from moeyard.cpu.dots import STEP
from moeyard.cpu.pointers import float32_at, int64_at, kernel, uint8_at
from moeyard.cpu.products import BLOCK, COLUMNS, FLOAT32, UNIT, dots_1x1, dots_3x3, dots_rx4


def _table(code: int) -> Any:
    """float32 values of the codes of a byte, or of 4 bits."""
    values = np.arange(256, dtype=np.float64)
    if code == INT8:
        values = np.where(values > 127, values - 256, values)
    elif code == E4M3:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    elif code == INT4:
        values = values - 8
    elif code == E2M1:
        sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = np.resize(np.concatenate((sizes, -sizes)), 256)
    return values.astype(np.float32)


_VALUES = np.stack([_table(code) for code in (E4M3, INT8, INT4, UINT4, E2M1)])


@kernel
def _dots(
    p: Any, sums: int, x: int, w: int, w_stride: int, scales: int, s_stride: int, zeros: int, ahead: int, steps: int
) -> None:
    """sums[j] += x . w[j] of four weight rows."""
    code, step = p[CODE], step_bytes(p)
    if code == E4M3:
        codes.e4m3_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, ahead, steps)
    elif code == INT8:
        codes.int8_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, ahead, steps)
    elif code == INT4:
        if p[MODE] == PAIRS:
            codes.int4_pair_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, ahead, steps)
        else:
            codes.int4_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, ahead, steps)
    elif code == UINT4:
        if p[MODE] == PAIRS:
            codes.uint4_pair_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, ahead, steps)
        else:
            codes.uint4_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, ahead, steps)
    elif p[MODE] == PAIRS:
        codes.e2m1_pair_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, ahead, steps)
    else:
        codes.e2m1_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, ahead, steps)


@kernel
def _tile(p: Any, target: int, w: int, scales: int, zeros: int, steps: int) -> None:
    """The weights of whole steps as float32."""
    code, mode, step = p[CODE], p[MODE], step_bytes(p)
    if code == E4M3:
        if mode == EACH:
            codes.e4m3_each_tile(target, w, scales, step, zeros, steps)
        else:
            codes.e4m3_tile(target, w, scales, step, zeros, steps)
    elif code == INT8:
        if mode == EACH:
            codes.int8_each_tile(target, w, scales, step, zeros, steps)
        else:
            codes.int8_tile(target, w, scales, step, zeros, steps)
    elif code == INT4:
        if mode == EACH:
            codes.int4_each_tile(target, w, scales, step, zeros, steps)
        elif mode == PAIRS:
            codes.int4_pair_tile(target, w, scales, step, zeros, steps)
        else:
            codes.int4_tile(target, w, scales, step, zeros, steps)
    elif code == UINT4:
        if mode == EACH:
            codes.uint4_each_tile(target, w, scales, step, zeros, steps)
        elif mode == PAIRS:
            codes.uint4_pair_tile(target, w, scales, step, zeros, steps)
        else:
            codes.uint4_tile(target, w, scales, step, zeros, steps)
    elif mode == EACH:
        codes.e2m1_each_tile(target, w, scales, step, zeros, steps)
    elif mode == PAIRS:
        codes.e2m1_pair_tile(target, w, scales, step, zeros, steps)
    else:
        codes.e2m1_tile(target, w, scales, step, zeros, steps)


@kernel
def coded_room(size: int) -> Any:
    """float32 values that `coded_product` needs beside its arguments."""
    return (UNIT + 1) * scale_room(size) + UNIT * BLOCK


@kernel
def coded_product(plan: int, sums: int, rows: int, x: int, expert: int, row: int, columns: int, room: int) -> None:
    """sums[i, j] = x[i] . w[row + j] for at most COLUMNS weight rows of an expert; `sums` has COLUMNS columns.

    Sums go over blocks and then the last elements one by one, as in `product`, whichever way a row takes.
    """
    p = int64_at(plan, 20)
    size, per_byte = p[SIZE], 2 if p[CODE] >= INT4 else 1
    whole, width, apart = size // STEP * STEP, size // per_byte, 4 * scale_room(size)
    scales, spare, tile = room, room + UNIT * apart, room + (UNIT + 1) * apart
    zeros = apart // 2
    alone = rows == 1 and p[MODE] != EACH
    float32_at(sums, rows * COLUMNS)[:] = 0
    unit = 4 if alone else UNIT
    for j in range(0, columns, unit):
        some = min(unit, columns - j)
        w = p[STORED] + (expert * p[ROWS] + row + j) * width
        next_row = read_side_by_side(plan, expert, row + j, some, scales)
        if next_row == 0:
            shared = block_of(p, row + j) == block_of(p, row + j + some - 1)
            next_row = 0 if shared else apart
            for i in range(1 if shared else some):
                read_scales(plan, expert, row + j + i, scales + i * apart, spare)
        for start in range(0, whole, BLOCK):
            steps, here = min(BLOCK, whole - start) // STEP, sums + 4 * j
            w_at, s_at = w + start // per_byte, scales + start // STEP * step_bytes(p)
            if alone and some == 4:
                ahead = w + 4 * (width + start // per_byte)  # the next four rows
                _dots(p, here, x + 4 * start, w_at, width, s_at, next_row, zeros, ahead, steps)
            else:
                for i in range(some):
                    _tile(p, tile + 4 * BLOCK * i, w_at + i * width, s_at + i * next_row, zeros, steps)
                _tile_dots(here, rows, x + 4 * start, size, tile, some, steps)
        if whole < size:
            _last_ones(p, sums + 4 * j, rows, x, w, some, scales, next_row, whole)


@kernel
def _tile_dots(sums: int, rows: int, x: int, size: int, tile: int, columns: int, steps: int) -> None:
    """sums[i, j] += x[i] . tile[j] over steps of float32."""
    threes = 0 if rows < 3 else rows // 3 * 3 - (3 if rows % 3 == 1 else 0)
    tiled = columns if columns == UNIT else 0
    for i in range(0, threes, 3):
        for j in range(0, tiled, 3):
            dots_3x3(FLOAT32, sums + 4 * (i * COLUMNS + j), 4 * COLUMNS, x + 4 * i * size, 4 * size,
                     tile + 4 * BLOCK * j, 4 * BLOCK, steps)  # fmt: skip
    for i in range(threes if tiled else 0, rows, 2):
        quads = columns // 4 * 4
        for j in range(0, quads, 4):
            dots_rx4(FLOAT32, min(2, rows - i), sums + 4 * (i * COLUMNS + j), 4 * COLUMNS, x + 4 * i * size, 4 * size,
                     tile + 4 * BLOCK * j, 4 * BLOCK, steps)  # fmt: skip
        for j in range(quads, columns):
            for k in range(i, min(i + 2, rows)):
                dots_1x1(FLOAT32, sums + 4 * (k * COLUMNS + j), x + 4 * k * size, tile + 4 * BLOCK * j, steps)


@kernel
def _last_ones(p: Any, sums: int, rows: int, x: int, w: int, columns: int, scales: int, apart: int,
               whole: int) -> None:  # fmt: skip
    """Adds what is left over of rows behind whole steps."""
    size, code = p[SIZE], p[CODE]
    width = size // (2 if code >= INT4 else 1)
    totals, floats = float32_at(sums, rows * COLUMNS), float32_at(x, rows * size)
    for j in range(columns):
        stored = uint8_at(w + j * width, width)
        factors = float32_at(scales + j * apart, 2 * scale_room(size))
        for k in range(whole, size):
            at = rest_at(size) + k - whole
            if code >= INT4:
                byte = np.int64(stored[k // 2])
                value = _VALUES[code, byte >> 4 if k % 2 else byte & 15]
                if code == UINT4:
                    value -= factors[scale_room(size) // 2 + at]
            else:
                value = _VALUES[code, np.int64(stored[k])]
            value *= factors[at]
            for i in range(rows):
                totals[i * COLUMNS + j] += floats[i * size + k] * value
