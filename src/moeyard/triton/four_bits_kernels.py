"""The Triton kernel of weights of 4 bits in tiles (`pack.py`), which are widened in registers. Sizes count elements.

A step is 64 columns: words of 16 bits, each of four codes. Codes s of the words are columns 16s to 16s + 15, in order.
"""

import triton
import triton.language as tl

from moeyard.triton.coded_kernels import summed, widened
from moeyard.triton.kernels import finished, start, tile_of_program


@triton.jit
def codes_of(words, zero, S: tl.constexpr, E2M1: tl.constexpr, TYPE: tl.constexpr):
    """Codes s of words: of e2m1 float16 times 2^-14, or e4m3 times 2^-6 if that is the type; of int4 float32 less
    `zero`.
    """
    bits = words.to(tl.int32)
    if E2M1:
        sizes: tl.constexpr = 0x0E00
        sign: tl.constexpr = 0x8000
        if S == 0:
            bits = bits & (sizes | sign)
        elif S == 1:
            bits = (bits << 3) & (sizes | sign)
        elif S == 2:
            bits = ((bits << 6) & sizes) | ((bits << 1) & sign)
        else:
            bits = ((bits << 9) & sizes) | ((bits << 2) & sign)
        if tl.float8e4nv == TYPE:
            value = (((bits >> 8) & 0x80) | ((bits >> 7) & 0x1C)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        else:
            value = bits.to(tl.int16).to(tl.float16, bitcast=True)
    else:
        value = ((bits >> (4 * S)) & 15).to(tl.float32) - zero
    return value


@triton.jit
def scale_of(stored, KIND: tl.constexpr):
    """Scales as float32: floats, or bytes of e4m3 or e8m0."""
    if KIND == "e8m0":
        byte = stored.to(tl.int32)
        bits = tl.where(byte == 0, 0x00400000, byte << 23)
        value = tl.where(byte == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    elif KIND == "e4m3":
        value = widened(stored, True, tl.float32)
    else:
        value = stored.to(tl.float32)
    return value


@triton.jit
def piece_of(words, zero, scale, S: tl.constexpr, E2M1: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr):
    """Weights [COLUMNS, 16] of a type, which holds each code exactly; unscaled unless SCALED."""
    value = codes_of(words, zero[:, None], S, E2M1, TYPE)
    if SCALED:
        value = value.to(tl.float32) * (16384.0 if E2M1 else 1.0) * scale[:, None]
    return value.to(TYPE)


@triton.jit
def scale_at(scales_ptr, at, PART: tl.constexpr, KIND: tl.constexpr):
    """The scale of a part of a step, by rows."""
    return scale_of(tl.load(scales_ptr + at + PART * 16), KIND)


@triton.jit
def zero_at(zeros_ptr, at, PART: tl.constexpr, COLUMNS: tl.constexpr):
    """The zero point of a part of a step, by rows; 8 where there are none."""
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + at + PART * 16).to(tl.float32)
    else:
        zero = tl.full((COLUMNS,), 8.0, tl.float32)
    return zero


@triton.jit
def side_by_side(left, right):
    """[R, C] twice -> [R, 2C]."""
    joined = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(joined, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def part_of_sum(
    words, rows, total, scales_ptr, zeros_ptr, at, PART: tl.constexpr, PARTS: tl.constexpr, E2M1: tl.constexpr,
    KIND: tl.constexpr, SCALED: tl.constexpr, COLUMNS: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """`total` plus the product of a step (SCALED), or of its part and that part's scale."""
    kind: tl.constexpr = rows.dtype
    zero = zero_at(zeros_ptr, at, PART, COLUMNS)
    scale = scale_at(scales_ptr, at, PART, KIND)
    if SCALED:
        second = scale_at(scales_ptr, at, 1, KIND) if PARTS == 4 else scale
        third = scale_at(scales_ptr, at, PARTS // 2, KIND) if PARTS > 1 else scale
        fourth = scale_at(scales_ptr, at, 3, KIND) if PARTS == 4 else third
        low = side_by_side(
            piece_of(words, zero, scale, 0, E2M1, True, kind), piece_of(words, zero, second, 1, E2M1, True, kind)
        )
        high = side_by_side(
            piece_of(words, zero, third, 2, E2M1, True, kind), piece_of(words, zero, fourth, 3, E2M1, True, kind)
        )
        total = summed(side_by_side(low, high), rows, total, SWAPPED)
    else:
        first: tl.constexpr = PART * (4 // PARTS)
        weight = piece_of(words, zero, scale, first, E2M1, False, kind)
        if PARTS < 4:
            weight = side_by_side(weight, piece_of(words, zero, scale, first + 1, E2M1, False, kind))
        if PARTS == 1:
            high = side_by_side(
                piece_of(words, zero, scale, 2, E2M1, False, kind), piece_of(words, zero, scale, 3, E2M1, False, kind)
            )
            weight = side_by_side(weight, high)
        own = summed(weight, rows, tl.zeros(total.shape, dtype=tl.float32), SWAPPED)
        total += own * (scale[:, None] if SWAPPED else scale[None, :])
    return total


@triton.jit(do_not_specialize=["most_tiles", "divisor"])
def four_bits_product_kernel(
    rows_ptr,  # values, or codes of e4m3: as such where matrix instructions read them, else as uint8
    weight_ptr,  # int16
    bias_ptr,  # [experts, columns (gate, then up)] or None
    factors_ptr,  # float32 by route, or None
    routes_ptr,  # int32: the route of a slot, and times divisor its row; None: slots are rows
    tiles_ptr,  # int32 [3, most_tiles]: expert (-1: no tile), first slot, number of slots
    row_scales_ptr,  # float32 by row, or None where rows are values
    scales_ptr,
    zeros_ptr,  # uint8, or None: 8
    globals_ptr,  # float32 [experts, matrices], or None
    out_ptr,
    most_tiles,
    columns,  # of the result
    size,
    row_stride,
    bias_stride,
    out_stride,
    divisor,
    groups,  # of columns
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    NAME: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    E2M1: tl.constexpr,
    KIND: tl.constexpr,  # of scales: "float", "e8m0", "e4m3"
    WIDE: tl.constexpr,  # columns that share a scale; 0: all
    SCALED: tl.constexpr,  # weights are scaled, which rounds none; otherwise sums are
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SWAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of rows x expert weights, as `product_kernel`."""
    start(PDL)
    expert, first, count, column = tile_of_program(tiles_ptr, most_tiles, columns, COLUMNS, GROUP)
    if expert >= 0:
        parts: tl.constexpr = 64 // WIDE if WIDE != 0 and WIDE < 64 else 1
        dots: tl.constexpr = 1 if SCALED else parts
        shape: tl.constexpr = (COLUMNS, ROWS) if SWAPPED else (ROWS, COLUMNS)
        place = tl.arange(0, ROWS)
        slots = first + tl.minimum(place, count - 1)
        targets = slots
        if routes_ptr is not None:
            targets = tl.load(routes_ptr + slots)
        sources = (targets // divisor if GATHER else slots).to(tl.int64)
        held = (place < count)[:, None]
        row_at = rows_ptr + (sources * row_stride)[:, None] + tl.arange(0, 64 // dots)[None, :]
        weight_row = tl.minimum(column, columns - 1)
        in_tile: tl.constexpr = 8 if GATED else 16
        tile = expert.to(tl.int64) * (columns // in_tile) + weight_row // in_tile
        eighth = weight_row % 8
        half = weight_row % in_tile // 8
        within = tl.arange(0, 16)
        word = (within // 4 * 8 + within % 4)[None, :]
        gate_at = weight_ptr + (tile * (size * 4) + eighth * 32 + half * 4)[:, None] + word
        first_at = tile * groups * 16 + eighth * 2 + half
        gate = tl.zeros(shape, dtype=tl.float32)
        up = gate
        for step in range(0, size // 64):
            words = tl.load(gate_at + step * 256)
            up_words = tl.load(gate_at + 4 + step * 256) if GATED else words
            group = step * parts
            if parts == 1:
                group = step * 64 // WIDE if WIDE != 0 else 0
            at = first_at + group * 16
            for part in tl.static_range(dots):
                rows = tl.load(row_at + (step * 64 + part * (64 // dots)), mask=held, other=0.0)
                if rows.dtype == tl.uint8:
                    rows = widened(rows, True, tl.float16)
                gate = part_of_sum(
                    words, rows, gate, scales_ptr, zeros_ptr, at, part, parts, E2M1, KIND, SCALED, COLUMNS, SWAPPED
                )
                if GATED:
                    up = part_of_sum(
                        up_words, rows, up, scales_ptr, zeros_ptr, at + 1, part, parts, E2M1, KIND, SCALED, COLUMNS,
                        SWAPPED,
                    )  # fmt: skip
        if E2M1 and not SCALED:
            unit: tl.constexpr = 64.0 if rows_ptr.dtype.element_ty == tl.float8e4nv else 16384.0
            gate *= unit
            up *= unit
        if row_scales_ptr is not None:
            factor = tl.load(row_scales_ptr + sources)
            gate *= factor[None, :] if SWAPPED else factor[:, None]
            up *= factor[None, :] if SWAPPED else factor[:, None]
        if globals_ptr is not None:
            gate *= tl.load(globals_ptr + expert * (2 if GATED else 1))
            if GATED:
                up *= tl.load(globals_ptr + expert * 2 + 1)
        result = finished(
            gate, up if GATED else None, bias_ptr, expert, bias_stride, weight_row, columns, factors_ptr, targets,
            GATED, NAME, ALPHA, BETA, LIMIT, SWAPPED,
        )  # fmt: skip
        out_at = out_ptr + (slots.to(tl.int64) * out_stride)[:, None] + column[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=held & (column < columns)[None, :])
