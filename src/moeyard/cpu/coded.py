"""Products with quantised weights, and the rows that they meet, for kernels over raw addresses.

Kernels know a matrix by the integers of a `Plan` at an address. One row meets weights that are widened in registers;
several rows meet a tile of UNIT weight rows and BLOCK columns that is widened once and stays in the first caches.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeyard.cpu import codes
from moeyard.cpu.codes import BROADCAST, E2M1, E4M3, EACH, INT4, INT8, PAIRS
from moeyard.cpu.dots import LANES, STEP
from moeyard.cpu.pointers import float32_at, int64_at, kernel, uint8_at
from moeyard.cpu.products import BLOCK, COLUMNS, FLOAT32, UNIT, dots_1x1, dots_3x3, dots_rx4, widen
from moeyard.cpu.rows import add_row, store_row
from moeyard.quant import LEAST_MAGNITUDE, QuantScheme, blocks_of
from moeyard.values import ExpertWeights

CODES = {"e4m3": E4M3, "int8": INT8, "int4": INT4, "e2m1": E2M1}
_FLOAT, _BFLOAT, _HALF, _E8M0, _E4M3, _BYTE = range(6)
_SCALES = {torch.float32: _FLOAT, torch.bfloat16: _BFLOAT, torch.float16: _HALF, torch.float8_e8m0fnu: _E8M0,
           torch.float8_e4m3fn: _E4M3, torch.uint8: _BYTE}  # fmt: skip
_AS_THEY_ARE, _TO_E4M3, _TO_INT8 = range(3)
_ROUNDED = {"none": _AS_THEY_ARE, "e4m3": _TO_E4M3, "int8": _TO_INT8}
# The integers of a plan
(_CODE, _MODE, _STORED, _SCALE, _SCALE_KIND, _ZEROS, _GLOBALS, _TALL, _WIDE, _ROW_START, _COLUMN_START, _HALVES, _ROWS,
 _SIZE, _BLOCK_ROWS, _BLOCK_COLUMNS, _ROUND, _GROUP, _GROUP_START, _STATIC) = range(20)  # fmt: skip
_LEAST = np.float32(LEAST_MAGNITUDE)


def plans_of(weights: ExpertWeights) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The plans of both matrices of quantised experts, and the tensors whose addresses they hold."""
    scheme, scales = weights.scheme, weights.scales
    assert scheme is not None and scales is not None
    start, size, hidden_size = scales.block_start, weights.intermediate_size, weights.hidden_size
    halves = 2 if weights.gated else 1
    held: list[Tensor] = []
    first = _plan(
        scheme, halves, (halves * size, hidden_size), (start, 0), held,
        (weights.w13, scales.w13, scales.w13_zero_points, scales.w13_global, scales.w13_input),
    )  # fmt: skip
    second = _plan(
        scheme, 1, (hidden_size, size), (0, start), held,
        (weights.w2, scales.w2, scales.w2_zero_points, scales.w2_global, scales.w2_input),
    )  # fmt: skip
    return first, second, held


def _plan(
    scheme: QuantScheme, halves: int, sizes: tuple[int, int], starts: tuple[int, int], held: list[Tensor],
    tensors: tuple[Tensor | None, ...],
) -> Tensor:  # fmt: skip
    dense = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    held += [tensor for tensor in dense if tensor is not None]
    stored, scale, zeros, more, static = (0 if tensor is None else tensor.data_ptr() for tensor in dense)
    (rows, size), (tall, wide), (row_start, column_start) = sizes, scheme.block, starts
    assert dense[1] is not None
    row_start, column_start = row_start % max(tall, 1), column_start % max(wide, 1)
    fields = {
        _CODE: CODES[scheme.weights], _MODE: _mode(scheme, wide, column_start, size), _STORED: stored, _SCALE: scale,
        _SCALE_KIND: _SCALES[dense[1].dtype], _ZEROS: zeros, _GLOBALS: more, _TALL: tall, _WIDE: wide,
        _ROW_START: row_start, _COLUMN_START: column_start, _HALVES: halves, _ROWS: rows, _SIZE: size,
        _BLOCK_ROWS: blocks_of(rows // halves, tall, row_start), _BLOCK_COLUMNS: blocks_of(size, wide, column_start),
        _ROUND: _ROUNDED[scheme.activations], _GROUP: scheme.activation_group, _GROUP_START: starts[1],
        _STATIC: static,
    }  # fmt: skip
    return torch.tensor([fields[i] for i in range(len(fields))], dtype=torch.int64)


def _mode(scheme: QuantScheme, wide: int, column_start: int, size: int) -> int:
    if not wide or column_start + size <= wide or (wide % STEP == 0 and column_start % STEP == 0):
        return BROADCAST
    if scheme.per_byte == 2 and 2 * wide == STEP and column_start == 0:
        return PAIRS
    return EACH


def _table(code: int) -> Any:
    """float32 values of the codes of a byte, or of 4 bits."""
    values = np.arange(256, dtype=np.float64)
    if code == INT8:
        values = np.where(values > 127, values - 256, values)
    elif code == E4M3:
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    elif code == E2M1:
        sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = np.resize(np.concatenate((sizes, -sizes)), 256)
    return values.astype(np.float32)


_VALUES = np.stack([_table(code) for code in (E4M3, INT8, INT4, E2M1)])


@kernel
def scale_room(size: int) -> int:
    """float32 values that `read_scales` needs for one weight row: scales, then zero points."""
    return 2 * (size + 4 * STEP)


@kernel
def read_scales(plan: int, expert: int, row: int, target: int, spare: int) -> None:
    """Writes the scales of a row as its mode reads them, and zero points half of `scale_room` behind; `spare` has
    `scale_room` floats.
    """
    p = int64_at(plan, 20)
    half, inside = row // (p[_ROWS] // p[_HALVES]), row % (p[_ROWS] // p[_HALVES])
    block = half * p[_BLOCK_ROWS] + ((p[_ROW_START] + inside) // p[_TALL] if p[_TALL] != 0 else 0)
    at = ((expert * p[_HALVES] * p[_BLOCK_ROWS]) + block) * p[_BLOCK_COLUMNS]
    more = np.float32(1)
    if p[_GLOBALS] != 0:
        more = float32_at(p[_GLOBALS], (expert + 1) * p[_HALVES])[expert * p[_HALVES] + half]
    _widen_scales(p[_SCALE_KIND], spare, p[_SCALE], at, more, p[_BLOCK_COLUMNS])
    _lay_out(p, target, spare)
    if p[_CODE] == INT4:
        behind = target + 2 * scale_room(p[_SIZE])
        if p[_ZEROS] != 0:
            _widen_scales(_BYTE, spare, p[_ZEROS], at, np.float32(1), p[_BLOCK_COLUMNS])
        else:
            float32_at(spare, p[_BLOCK_COLUMNS])[:] = 8
        _lay_out(p, behind, spare)


@kernel
def _widen_scales(kind: int, target: int, source: int, first: int, factor: Any, count: int) -> None:
    """target[:count] = factor * source[first : first + count]."""
    whole = count // LANES * LANES
    width = 4 if kind == _FLOAT else (2 if kind in (_BFLOAT, _HALF) else 1)
    here = source + width * first
    for i in range(0, whole, LANES):
        _widen_vector(kind, target + 4 * i, here + width * i, factor)
    if whole < count:
        rest = np.zeros(4 * LANES, np.uint8)
        given, kept = uint8_at(here + width * whole, width * (count - whole)), np.empty(LANES, np.float32)
        for i in range(given.size):
            rest[i] = given[i]
        _widen_vector(kind, kept.ctypes.data, rest.ctypes.data, factor)
        out = float32_at(target + 4 * whole, count - whole)
        for i in range(count - whole):
            out[i] = kept[i]
        rest[:1] = 0  # numba frees an array after its last use, though its address is still in use


@kernel
def _widen_vector(kind: int, target: int, source: int, factor: Any) -> None:
    if kind == _FLOAT:
        codes.widen_float_scales(target, source, factor)
    elif kind == _BFLOAT:
        codes.widen_bfloat_scales(target, source, factor)
    elif kind == _HALF:
        codes.widen_half_scales(target, source, factor)
    elif kind == _E8M0:
        codes.widen_e8m0_scales(target, source, factor)
    elif kind == _E4M3:
        codes.widen_e4m3_scales(target, source, factor)
    else:
        codes.widen_bytes(target, source, factor)


@kernel
def _lay_out(p: Any, target: int, source: int) -> None:
    """Scales of blocks as steps read them."""
    size, wide, start, count = p[_SIZE], p[_WIDE], p[_COLUMN_START], p[_BLOCK_COLUMNS]
    whole = size // STEP * STEP
    given, out = float32_at(source, count), float32_at(target, size + 4 * STEP)
    if p[_MODE] == EACH:
        for k in range(whole):
            out[k] = given[(start + _column(p[_CODE], k)) // wide]
    elif p[_MODE] == PAIRS or (count > 1 and wide == STEP):
        for i in range(count):
            out[i] = given[i]
    elif count == 1:
        out[0] = given[0]
    else:
        step = 0
        for i in range(count):
            end = min(((i + 1) * wide - start) // STEP, whole // STEP)
            while step < end:
                out[step] = given[i]
                step += 1
    for k in range(whole, size):  # what is left over has one scale per weight, behind those of steps
        out[size + 3 * STEP + k - whole] = given[(start + k) // wide if count > 1 else 0]


@kernel
def _column(code: int, k: int) -> Any:
    """The column of the weight that has place `k` of its row's steps."""
    if code < INT4:
        return k
    place = k % STEP
    return k - place + (2 * place if place < LANES else 2 * (place - LANES) + 1)


@kernel
def _step_bytes(p: Any) -> Any:
    """From the scales of a step to those of the next."""
    if p[_MODE] == EACH:
        return 4 * STEP
    if p[_MODE] == PAIRS:
        return 8
    return 4 if p[_BLOCK_COLUMNS] > 1 else 0


@kernel
def _dots(p: Any, sums: int, x: int, w: int, w_stride: int, scales: int, s_stride: int, zeros: int, steps: int) -> None:
    code, step = p[_CODE], _step_bytes(p)
    if code == E4M3:
        codes.e4m3_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, steps)
    elif code == INT8:
        codes.int8_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, steps)
    elif code == INT4:
        if p[_MODE] == PAIRS:
            codes.int4_pair_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, steps)
        else:
            codes.int4_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, steps)
    elif p[_MODE] == PAIRS:
        codes.e2m1_pair_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, steps)
    else:
        codes.e2m1_dots(sums, x, w, w_stride, scales, s_stride, step, zeros, steps)


@kernel
def _tile(p: Any, target: int, w: int, scales: int, zeros: int, steps: int) -> None:
    """The weights of whole steps as float32."""
    code, mode, step = p[_CODE], p[_MODE], _step_bytes(p)
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
    elif mode == EACH:
        codes.e2m1_each_tile(target, w, scales, step, zeros, steps)
    elif mode == PAIRS:
        codes.e2m1_pair_tile(target, w, scales, step, zeros, steps)
    else:
        codes.e2m1_tile(target, w, scales, step, zeros, steps)


@kernel
def coded_room(size: int) -> int:
    """float32 values that `coded_product` needs beside its arguments."""
    return int((UNIT + 1) * scale_room(size) + UNIT * BLOCK)


@kernel
def coded_product(plan: int, sums: int, rows: int, x: int, expert: int, row: int, columns: int, room: int) -> None:
    """sums[i, j] = x[i] . w[row + j] for at most COLUMNS weight rows of an expert; `sums` has COLUMNS columns.

    Sums go over blocks and then the last elements one by one, as in `product`, whichever way a row takes.
    """
    p = int64_at(plan, 20)
    size, per_byte = p[_SIZE], 2 if p[_CODE] >= INT4 else 1
    whole, width, apart = size // STEP * STEP, size // per_byte, 4 * scale_room(size)
    scales, spare, tile = room, room + UNIT * apart, room + (UNIT + 1) * apart
    zeros = apart // 2
    alone = rows == 1 and p[_MODE] != EACH
    float32_at(sums, rows * COLUMNS)[:] = 0
    unit = 4 if alone else UNIT
    for j in range(0, columns, unit):
        some = min(unit, columns - j)
        w = p[_STORED] + (expert * p[_ROWS] + row + j) * width
        for i in range(some):
            read_scales(plan, expert, row + j + i, scales + i * apart, spare)
        for start in range(0, whole, BLOCK):
            steps = min(BLOCK, whole - start) // STEP
            ahead = start // STEP * _step_bytes(p)
            here = sums + 4 * j
            if alone and some == 4:
                _dots(p, here, x + 4 * start, w + start // per_byte, width, scales + ahead, apart, zeros, steps)
            else:
                for i in range(some):
                    _tile(p, tile + 4 * BLOCK * i, w + i * width + start // per_byte, scales + i * apart + ahead, zeros,
                          steps)  # fmt: skip
                _tile_dots(here, rows, x + 4 * start, size, tile, some, steps)
        if whole < size:
            _last_ones(p, sums + 4 * j, rows, x, w, some, scales, whole)


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
def _last_ones(p: Any, sums: int, rows: int, x: int, w: int, columns: int, scales: int, whole: int) -> None:
    """Adds what is left over of rows behind whole steps."""
    size, code = p[_SIZE], p[_CODE]
    width, apart = size // (2 if code >= INT4 else 1), 4 * scale_room(size)
    totals, floats = float32_at(sums, rows * COLUMNS), float32_at(x, rows * size)
    for j in range(columns):
        stored = uint8_at(w + j * width, width)
        factors = float32_at(scales + j * apart, 2 * scale_room(size))
        for k in range(whole, size):
            at = size + 3 * STEP + k - whole
            if code >= INT4:
                byte = np.int64(stored[k // 2])
                value = _VALUES[code, byte >> 4 if k % 2 else byte & 15]
                if code == INT4:
                    value -= factors[scale_room(size) // 2 + at]
            else:
                value = _VALUES[code, np.int64(stored[k])]
            value *= factors[at]
            for i in range(rows):
                totals[i * COLUMNS + j] += floats[i * size + k] * value


@kernel
def take_row(
    plan: int, kind: int, target: int, source: int, expert: int, factor: Any, weighted: bool, spare: int
) -> None:
    """A row of a 32- or 16-bit kind as the matrix of a plan takes it: float32, rounded by its scheme, in its order.

    `weighted` rows are multiplied by `factor` and rounded to their kind first. `spare` has room for the row as float32.
    """
    p = int64_at(plan, 20)
    size = p[_SIZE]
    row = float32_at(spare, size)
    row[:] = 0
    add_row(kind, spare, np.float32(1), source, source, size)
    if weighted:
        for k in range(size):
            row[k] *= factor
        if kind != FLOAT32:
            store_row(kind, target, spare, size, 0)
            row[:] = 0
            add_row(kind, spare, np.float32(1), target, target, size)
    if p[_ROUND] != _AS_THEY_ARE:
        group = p[_GROUP] if p[_GROUP] != 0 else size + 1
        lead = p[_GROUP_START] % group if p[_GROUP] != 0 else 0
        first = 0
        while first < size:
            count = min(group - lead, size - first)
            _round_group(p, spare + 4 * first, count, expert)
            first, lead = first + count, 0
    if p[_CODE] >= INT4:
        whole = size // STEP * STEP
        for k in range(0, whole, STEP):
            codes.split_pairs(target + 4 * k, spare + 4 * k)
        out = float32_at(target, size)
        for k in range(whole, size):
            out[k] = row[k]
    else:
        widen(FLOAT32, target, spare, size)


@kernel
def _round_group(p: Any, values: int, count: int, expert: int) -> None:
    """Values that share a scale become their codes times it."""
    whole = count // LANES * LANES
    last = np.zeros(LANES, np.float32)
    rest, edge = float32_at(values + 4 * whole, count - whole), last.ctypes.data
    for k in range(count - whole):
        last[k] = rest[k]
    bits = np.int64(0)
    if p[_STATIC] == 0 or p[_ROUND] == _TO_INT8:
        for k in range(0, whole, LANES):
            bits = codes.largest_bits(values + 4 * k, bits)
        bits = codes.largest_bits(edge, bits)
    if p[_STATIC] != 0:
        scale = float32_at(p[_STATIC], expert + 1)[expert]
        if bits > 0x7F800000:  # int8 has no NaN
            scale = np.float32(np.nan)
    else:
        amax = np.int32(bits).view(np.float32)
        largest = np.float32(448) if p[_ROUND] == _TO_E4M3 else np.float32(127)
        scale = (_LEAST if amax < _LEAST else amax) / largest
    if p[_ROUND] == _TO_E4M3:
        for k in range(0, whole, LANES):
            codes.round_to_e4m3(values + 4 * k, scale)
        codes.round_to_e4m3(edge, scale)
    else:
        for k in range(0, whole, LANES):
            codes.round_to_int8(values + 4 * k, scale)
        codes.round_to_int8(edge, scale)
    for k in range(count - whole):
        rest[k] = last[k]
    last[:1] = 0  # numba frees an array after its last use, though its address is still in use
