"""Matrices of quantised weights as kernels know them: the integers of a plan at an address; and their scales, read."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeyard.cpu.coded import codes
from moeyard.cpu.coded.codes import BROADCAST, E2M1, E4M3, EACH, INT4, INT8, PAIRS, UINT4
from moeyard.cpu.dots import LANES, STEP
from moeyard.cpu.pointers import float32_at, int64_at, kernel
from moeyard.quant import QuantScheme, blocks_of
from moeyard.values import ExpertWeights

AS_THEY_ARE, TO_E4M3, TO_INT8 = range(3)
"""How rows are rounded before a product."""
(CODE, MODE, STORED, SCALE, SCALE_KIND, ZEROS, GLOBALS, TALL, WIDE, ROW_START, COLUMN_START, HALVES, ROWS, SIZE,
 BLOCK_ROWS, BLOCK_COLUMNS, ROUND, GROUP, GROUP_START, STATIC) = range(20)  # fmt: skip
"""The integers of a plan: kind of codes, how scales lie, four addresses and a dtype, rows and columns of a block, where
in it the first ones lie, matrices one below the other, their rows and columns, blocks of each and of a row, how rows
are rounded, columns of a group, where the first one lies, and the address of static scales."""
_CODES = {"e4m3": E4M3, "int8": INT8, "int4": INT4, "e2m1": E2M1}
_ROUNDED = {"none": AS_THEY_ARE, "e4m3": TO_E4M3, "int8": TO_INT8}
_FLOAT, _BFLOAT, _HALF, _E8M0, _E4M3, _BYTE = range(6)
_SCALES = {torch.float32: _FLOAT, torch.bfloat16: _BFLOAT, torch.float16: _HALF, torch.float8_e8m0fnu: _E8M0,
           torch.float8_e4m3fn: _E4M3, torch.uint8: _BYTE}  # fmt: skip


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
    code, mode = UINT4 if scheme.zero_points else _CODES[scheme.weights], _mode(scheme, wide, column_start, size)
    fields = {
        CODE: code, MODE: mode, STORED: stored, SCALE: scale,
        SCALE_KIND: _SCALES[dense[1].dtype], ZEROS: zeros, GLOBALS: more, TALL: tall, WIDE: wide,
        ROW_START: row_start, COLUMN_START: column_start, HALVES: halves, ROWS: rows, SIZE: size,
        BLOCK_ROWS: blocks_of(rows // halves, tall, row_start), BLOCK_COLUMNS: blocks_of(size, wide, column_start),
        ROUND: _ROUNDED[scheme.activations], GROUP: scheme.activation_group, GROUP_START: starts[1],
        STATIC: static,
    }  # fmt: skip
    return torch.tensor([fields[i] for i in range(len(fields))], dtype=torch.int64)


def _mode(scheme: QuantScheme, wide: int, column_start: int, size: int) -> int:
    if not wide or column_start + size <= wide or (wide % STEP == 0 and column_start % STEP == 0):
        return BROADCAST
    if scheme.per_byte == 2 and 2 * wide == STEP and column_start == 0:
        return PAIRS
    return EACH


@kernel
def scale_room(size: int) -> Any:
    """float32 values that `read_scales` needs for one weight row: scales, then zero points."""
    return 2 * (size + 4 * STEP)


@kernel
def block_of(p: Any, row: int) -> Any:
    """The row of blocks that a weight row is in, among those of its expert."""
    each = p[ROWS] // p[HALVES]
    half = 1 if row >= each and p[HALVES] == 2 else 0
    if p[TALL] == 0:
        return half
    inside = p[ROW_START] + row - half * each
    return half * p[BLOCK_ROWS] + (inside // p[TALL] if p[TALL] > 1 else inside)


@kernel
def _first_scale(p: Any, expert: int, row: int) -> Any:
    """Where the scales of a row begin."""
    return (expert * p[HALVES] * p[BLOCK_ROWS] + block_of(p, row)) * p[BLOCK_COLUMNS]


@kernel
def _global_scale(p: Any, expert: int, row: int) -> Any:
    """The scale of the matrix that a row is of."""
    if p[GLOBALS] == 0:
        return np.float32(1)
    half = 1 if row >= p[ROWS] // p[HALVES] else 0
    return float32_at(p[GLOBALS], (expert + 1) * p[HALVES])[expert * p[HALVES] + half]


@kernel
def _laid_out(p: Any) -> Any:
    """Whether scales lie as steps read them."""
    return p[MODE] != EACH and (p[MODE] == PAIRS or p[BLOCK_COLUMNS] == 1 or p[WIDE] == STEP)


@kernel
def read_side_by_side(plan: int, expert: int, row: int, rows: int, target: int) -> Any:
    """Writes the scales of rows of one matrix one behind the other, as they lie, if steps can read them so.

    Returns the bytes from row to row; 0 where `read_scales` has to write each row's.
    """
    p = int64_at(plan, 20)
    if not _laid_out(p) or p[TALL] != 1 or p[CODE] == UINT4 or p[SIZE] % STEP != 0:
        return 0
    count = p[BLOCK_COLUMNS]
    first, more = _first_scale(p, expert, row), _global_scale(p, expert, row)
    _widen_scales(p[SCALE_KIND], target, p[SCALE], first, more, rows * count)
    return 4 * count


@kernel
def read_scales(plan: int, expert: int, row: int, target: int, spare: int) -> None:
    """Writes the scales of a row as its mode reads them, and zero points half of `scale_room` behind.

    `spare` has `scale_room` floats.
    """
    p = int64_at(plan, 20)
    at, count, more = _first_scale(p, expert, row), p[BLOCK_COLUMNS], _global_scale(p, expert, row)
    laid_out = _laid_out(p)
    kind, source, out = p[SCALE_KIND], p[SCALE], target
    for _ in range(2 if p[CODE] == UINT4 else 1):
        given = out if laid_out else spare
        _widen_scales(kind, given, source, at, more, count)
        if not laid_out:
            _lay_out(p, out, given)
        _lay_out_rest(p, out, given)
        kind, source, more, out = _BYTE, p[ZEROS], np.float32(1), target + 2 * scale_room(p[SIZE])


@kernel
def _widen_scales(kind: int, target: int, source: int, first: int, factor: Any, count: int) -> None:
    """target[:count] = factor * source[first : first + count]; the last vector begins early, so that it fits."""
    width = 4 if kind == _FLOAT else (2 if kind in (_BFLOAT, _HALF) else 1)
    here = source + width * first
    for begin in range(0, count if count >= LANES else 0, LANES):
        i = min(begin, count - LANES)
        at, out = here + width * i, target + 4 * i
        if kind == _FLOAT:
            codes.widen_floats(out, at, factor)
        elif kind == _BFLOAT:
            codes.widen_bfloats(out, at, factor)
        elif kind == _HALF:
            codes.widen_halves(out, at, factor)
        elif kind == _E8M0:
            codes.widen_e8m0s(out, at, factor)
        elif kind == _E4M3:
            codes.widen_e4m3s(out, at, factor)
        else:
            codes.widen_bytes(out, at, factor)
    for i in range(0 if count < LANES else count, count):
        at, out = here + width * i, target + 4 * i
        if kind == _FLOAT:
            codes.widen_float(out, at, factor)
        elif kind == _BFLOAT:
            codes.widen_bfloat(out, at, factor)
        elif kind == _HALF:
            codes.widen_half(out, at, factor)
        elif kind == _E8M0:
            codes.widen_e8m0(out, at, factor)
        elif kind == _E4M3:
            codes.widen_e4m3(out, at, factor)
        else:
            codes.widen_byte(out, at, factor)


@kernel
def _lay_out(p: Any, target: int, source: int) -> None:
    """Scales of blocks as steps read them."""
    size, wide, start, count = p[SIZE], p[WIDE], p[COLUMN_START], p[BLOCK_COLUMNS]
    steps = size // STEP
    given, out = float32_at(source, count), float32_at(target, size)
    if p[MODE] == EACH:
        for k in range(steps * STEP):
            out[k] = given[(start + _column(p[CODE], k)) // wide]
        return
    repeat, step = wide // STEP, -(start // STEP)  # blocks are whole steps here
    for i in range(count):
        for k in range(max(step, 0), min(step + repeat, steps)):
            out[k] = given[i]
        step += repeat


@kernel
def _lay_out_rest(p: Any, target: int, source: int) -> None:
    """One scale per weight for what is left over behind whole steps."""
    size, count = p[SIZE], p[BLOCK_COLUMNS]
    given, out = float32_at(source, count), float32_at(target + 4 * rest_at(size), STEP)
    whole = size // STEP * STEP
    for k in range(whole, size):
        out[k - whole] = given[(p[COLUMN_START] + k) // p[WIDE] if count > 1 else 0]


@kernel
def rest_at(size: int) -> Any:
    return size + 3 * STEP


@kernel
def _column(code: int, k: int) -> Any:
    """The column of the weight that has place `k` of its row's steps."""
    if code < INT4:
        return k
    place = k % STEP
    return k - place + (2 * place if place < LANES else 2 * (place - LANES) + 1)


@kernel
def step_bytes(p: Any) -> Any:
    """From the scales of a step to those of the next."""
    if p[MODE] == EACH:
        return 4 * STEP
    if p[MODE] == PAIRS:
        return 8
    return 4 if p[BLOCK_COLUMNS] > 1 else 0
