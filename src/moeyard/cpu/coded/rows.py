"""Rows as quantised weights take them: rounded by the scheme, as float32, in the order of the codes."""

from typing import Any

import numpy as np

from moeyard.cpu.coded import codes
from moeyard.cpu.coded.codes import INT4
from moeyard.cpu.coded.plan import AS_THEY_ARE, CODE, GROUP, GROUP_START, ROUND, SIZE, STATIC, TO_E4M3, TO_INT8
from moeyard.cpu.dots import LANES, STEP
from moeyard.cpu.pointers import float32_at, int64_at, kernel
from moeyard.cpu.products import FLOAT32, widen
from moeyard.cpu.rows import add_row, store_row
from moeyard.quant import LEAST_MAGNITUDE

_LEAST = np.float32(LEAST_MAGNITUDE)


@kernel
def take_row(
    plan: int, kind: int, target: int, source: int, expert: int, factor: Any, weighted: bool, spare: int
) -> None:
    """A row of a 32- or 16-bit kind as the matrix of a plan takes it: float32, rounded by its scheme, in its order.

    `weighted` rows are multiplied by `factor` and rounded to their kind first. `spare` has room for LANES more
    values of float32 than a row has.
    """
    p = int64_at(plan, 20)
    size = p[SIZE]
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
    if p[ROUND] != AS_THEY_ARE:
        group = p[GROUP] if p[GROUP] != 0 else size + 1
        lead = p[GROUP_START] % group if p[GROUP] != 0 else 0
        first = 0
        while first < size:
            count = min(group - lead, size - first)
            _round_group(p, spare + 4 * first, count, expert, spare + 4 * size)
            first, lead = first + count, 0
    if p[CODE] >= INT4:
        whole = size // STEP * STEP
        for k in range(0, whole, STEP):
            codes.split_pairs(target + 4 * k, spare + 4 * k)
        out = float32_at(target, size)
        for k in range(whole, size):
            out[k] = row[k]
    else:
        widen(FLOAT32, target, spare, size)


@kernel
def _round_group(p: Any, values: int, count: int, expert: int, edge: int) -> None:
    """Values that share a scale become their codes times it; `edge` has room for LANES of them."""
    whole = count // LANES * LANES
    rest, last = float32_at(values + 4 * whole, count - whole), float32_at(edge, LANES)
    last[:] = 0
    for k in range(count - whole):
        last[k] = rest[k]
    bits = np.int64(0)
    if p[STATIC] == 0 or p[ROUND] == TO_INT8:
        for k in range(0, whole, LANES):
            bits = codes.largest_bits(values + 4 * k, bits)
        bits = codes.largest_bits(edge, bits)
    if p[STATIC] != 0:
        scale = float32_at(p[STATIC], expert + 1)[expert]
        if bits > 0x7F800000:  # int8 has no NaN
            scale = np.float32(np.nan)
    else:
        amax = np.int32(bits).view(np.float32)
        largest = np.float32(448) if p[ROUND] == TO_E4M3 else np.float32(127)
        scale = (_LEAST if amax < _LEAST else amax) / largest
    if p[ROUND] == TO_E4M3:
        for k in range(0, whole, LANES):
            codes.round_to_e4m3(values + 4 * k, scale)
        codes.round_to_e4m3(edge, scale)
    else:
        for k in range(0, whole, LANES):
            codes.round_to_int8(values + 4 * k, scale)
        codes.round_to_int8(edge, scale)
    for k in range(count - whole):
        rest[k] = last[k]
