"""Triton kernels of weights of 8-bit codes: rows are quantised in one, codes are multiplied in the other.

Codes of e4m3 are multiplied by matrix instructions of 8 bits where the card has them, else as float16, which holds each
exactly. Sizes and strides count elements.
"""

import triton
import triton.language as tl

from moeyard.triton.kernels import finished, start, tile_of_program


@triton.jit
def is_nan(value):
    """Element by element."""
    return value != value  # noqa: PLR0124


@triton.jit
def e4m3_code(value):
    """The nearest code of float32 values, ties to even, saturated, as uint8; NaN stays NaN."""
    magnitude = tl.minimum(tl.abs(value), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 960: exponents begin at 7 instead of 127
    small = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15  # below 2^-6 codes are multiples of 2^-9
    code = tl.where(magnitude < 0.015625, small, normal)
    code = tl.where(is_nan(value), 127, code)
    return (code | ((value.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)


@triton.jit
def int8_code(value):
    """The nearest integer of float32 values within -127 and 127, ties to even; 0 for NaN."""
    held = tl.where(is_nan(value), 0.0, tl.minimum(tl.maximum(value, -127.0), 127.0))
    return ((held + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def widened(codes, E4M3: tl.constexpr, TYPE: tl.constexpr):
    """What codes mean: e4m3 from uint8, else the integers themselves."""
    if E4M3:
        bits = codes.to(tl.int32)
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
        value = tl.where((bits & 127) == 127, float("nan"), half)
    else:
        value = codes
    return value.to(tl.float32).to(TYPE)


@triton.jit
def summed(weight, rows, total, SWAPPED: tl.constexpr):
    """`total` plus the product of [COLUMNS, DEPTH] and [ROWS, DEPTH], which is [COLUMNS, ROWS] if swapped."""
    kind: tl.constexpr = total.dtype
    if SWAPPED:
        total = tl.dot(weight, tl.trans(rows), total, input_precision="ieee", out_dtype=kind)
    else:
        total = tl.dot(rows, tl.trans(weight), total, input_precision="ieee", out_dtype=kind)
    return total


@triton.jit(do_not_specialize=["divisor", "most_tiles"])
def quantize_kernel(
    rows_ptr,
    given_ptr,  # float32 [experts]: static scales, or None
    routes_ptr,  # int32: times divisor a slot's row; None: slots are rows. With static scales alone
    tiles_ptr,  # int32 [3, most_tiles], with static scales alone
    codes_ptr,  # [num_rows, columns]
    scales_ptr,  # float32 [num_rows, groups]
    columns,
    row_stride,
    groups,
    lead,  # columns of the first group that lie in another slice
    divisor,
    most_tiles,
    E4M3: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: all of a row
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program per row, or with static scales per row of a tile; a scale is max(amax, 1e-10) / largest code."""
    start(PDL)
    largest: tl.constexpr = 448.0 if E4M3 else 127.0
    slot = tl.program_id(0).to(tl.int64)
    source = slot
    scale = 0.0
    live = True
    if given_ptr is not None:
        tile = tl.program_id(0)
        place = tl.program_id(1)
        expert = tl.load(tiles_ptr + tile)
        live = (expert >= 0) & (place < tl.load(tiles_ptr + 2 * most_tiles + tile))
        slot = (tl.load(tiles_ptr + most_tiles + tile) + tl.where(live, place, 0)).to(tl.int64)
        source = slot
        if live:
            scale = tl.load(given_ptr + expert)
            if routes_ptr is not None:
                source = (tl.load(routes_ptr + slot) // divisor).to(tl.int64)
    if live:
        row_at = rows_ptr + source * row_stride
        code_at = codes_ptr + slot * columns
        offset = tl.arange(0, COLUMNS)
        if GROUP != 0:
            within: tl.constexpr = COLUMNS // GROUP
            for begin in range(0, columns + lead, COLUMNS):
                column = begin - lead + offset
                inside = (column >= 0) & (column < columns)
                value = tl.load(row_at + column, mask=inside, other=0.0).to(tl.float32)
                value = tl.reshape(value, (within, GROUP))
                seen = tl.where(is_nan(value), float("inf"), tl.abs(value))
                part = tl.maximum(tl.max(seen, 1), 1e-10) / largest
                quotient = tl.reshape(value / part[:, None], (COLUMNS,))
                code = e4m3_code(quotient) if E4M3 else int8_code(quotient)
                tl.store(code_at + column, code, mask=inside)
                group = begin // GROUP + tl.arange(0, within)
                tl.store(scales_ptr + slot * groups + group, part, mask=group < groups)
        else:
            amax = 0.0
            broken = 0
            for begin in range(0, columns, COLUMNS):
                column = begin + offset
                value = tl.load(row_at + column, mask=column < columns, other=0.0).to(tl.float32)
                seen = tl.where(is_nan(value), float("inf"), tl.abs(value))
                amax = tl.maximum(amax, tl.max(seen, 0))
                broken = tl.maximum(broken, tl.max(is_nan(value).to(tl.int32), 0))
            if given_ptr is None:
                scale = tl.maximum(amax, 1e-10) / largest
            for begin in range(0, columns, COLUMNS):
                column = begin + offset
                value = tl.load(row_at + column, mask=column < columns, other=0.0).to(tl.float32)
                code = e4m3_code(value / scale) if E4M3 else int8_code(value / scale)
                tl.store(code_at + column, code, mask=column < columns)
            if not E4M3:
                scale = tl.where(broken != 0, float("nan"), scale)  # integers have no NaN of their own
            tl.store(scales_ptr + slot, scale)


@triton.jit(do_not_specialize=["most_tiles", "divisor"])
def coded_product_kernel(
    rows_ptr,  # codes, or values of the dtype of results
    weight_ptr,
    bias_ptr,  # [experts, columns (gate, then up)] or None
    factors_ptr,  # float32 by route, or None
    routes_ptr,  # int32: the route of a slot, and times divisor its row; None: slots are rows
    tiles_ptr,  # int32 [3, most_tiles]: expert (-1: no tile), first slot, number of slots
    row_scales_ptr,  # float32 [rows, groups], or None where rows are values
    weight_scales_ptr,  # float32 [experts, blocks of rows, blocks of columns]
    out_ptr,
    most_tiles,
    columns,  # of the result
    size,
    row_stride,
    expert_stride,
    column_stride,
    bias_stride,
    scale_stride,
    out_stride,
    divisor,
    lead_rows,  # rows and columns of the first block that lie in another slice
    lead,
    groups,
    blocks,  # of columns, of a weight
    half_blocks,  # of rows, of gate alone
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    NAME: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    E4M3: tl.constexpr,
    NATIVE: tl.constexpr,  # codes meet codes in matrix instructions of 8 bits
    GROUPED: tl.constexpr,  # rows have a scale per STEPS * DEPTH columns
    BLOCK: tl.constexpr,  # weight rows that share a scale; 0: all of a matrix
    BLOCKED: tl.constexpr,  # weights have a scale per STEPS * DEPTH columns
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of rows x expert weights, as `product_kernel`; scales count once for a sum, or once for each step."""
    start(PDL)
    expert, first, count, column = tile_of_program(tiles_ptr, most_tiles, columns, COLUMNS, GROUP)
    if expert >= 0:
        stepwise: tl.constexpr = GROUPED or BLOCKED
        shape: tl.constexpr = (COLUMNS, ROWS) if SWAPPED else (ROWS, COLUMNS)
        kind: tl.constexpr = tl.int32 if NATIVE and not E4M3 else tl.float32
        operand: tl.constexpr = tl.float16 if row_scales_ptr is not None else out_ptr.dtype.element_ty
        place = tl.arange(0, ROWS)
        slots = first + tl.minimum(place, count - 1)
        targets = slots
        if routes_ptr is not None:
            targets = tl.load(routes_ptr + slots)
        sources = (targets // divisor if GATHER else slots).to(tl.int64)
        held = (place < count)[:, None]
        depth = tl.arange(0, DEPTH)
        row_at = rows_ptr + (sources * row_stride)[:, None]
        weight_row = tl.minimum(column, columns - 1)
        matrix = weight_ptr + expert.to(tl.int64) * expert_stride
        gate_at = matrix + (weight_row.to(tl.int64) * column_stride)[:, None]
        up_at = gate_at + columns.to(tl.int64) * column_stride
        block = tl.zeros((COLUMNS,), tl.int32) if BLOCK == 0 else (weight_row + lead_rows) // BLOCK
        scale_at = weight_scales_ptr + expert.to(tl.int64) * scale_stride + block * blocks
        up_scale_at = scale_at + half_blocks * blocks
        gate = tl.zeros(shape, dtype=tl.float32 if stepwise else kind)
        up = gate
        for step in range(0, tl.cdiv(size + lead, DEPTH)):
            place_in = step * DEPTH - lead + depth
            inside = ((place_in >= 0) & (place_in < size))[None, :]
            rows = tl.load(row_at + place_in[None, :], mask=held & inside, other=0.0)
            weight = tl.load(gate_at + place_in[None, :], mask=inside, other=0.0)
            if not NATIVE:
                rows = widened(rows, E4M3, operand) if row_scales_ptr is not None else rows
                weight = widened(weight, E4M3, operand)
            if stepwise:
                factor = tl.full((ROWS,), 1.0, tl.float32)
                if GROUPED:
                    factor = tl.load(row_scales_ptr + sources * groups + step // STEPS)
                scale = tl.load(scale_at + step // STEPS) if BLOCKED else tl.full((COLUMNS,), 1.0, tl.float32)
                both = scale[:, None] * factor[None, :] if SWAPPED else factor[:, None] * scale[None, :]
                gate += summed(weight, rows, tl.zeros(shape, dtype=kind), SWAPPED).to(tl.float32) * both
            else:
                gate = summed(weight, rows, gate, SWAPPED)
            if GATED:
                weight = tl.load(up_at + place_in[None, :], mask=inside, other=0.0)
                if not NATIVE:
                    weight = widened(weight, E4M3, operand)
                if stepwise:
                    scale = tl.load(up_scale_at + step // STEPS) if BLOCKED else tl.full((COLUMNS,), 1.0, tl.float32)
                    both = scale[:, None] * factor[None, :] if SWAPPED else factor[:, None] * scale[None, :]
                    up += summed(weight, rows, tl.zeros(shape, dtype=kind), SWAPPED).to(tl.float32) * both
                else:
                    up = summed(weight, rows, up, SWAPPED)
        gate = gate.to(tl.float32)
        up = up.to(tl.float32)
        if row_scales_ptr is not None and not GROUPED:
            factor = tl.load(row_scales_ptr + sources)
            gate *= factor[None, :] if SWAPPED else factor[:, None]
            if GATED:
                up *= factor[None, :] if SWAPPED else factor[:, None]
        if not BLOCKED:
            scale = tl.load(scale_at)
            gate *= scale[:, None] if SWAPPED else scale[None, :]
            if GATED:
                scale = tl.load(up_scale_at)
                up *= scale[:, None] if SWAPPED else scale[None, :]
        result = finished(
            gate, up if GATED else None, bias_ptr, expert, bias_stride, weight_row, columns, factors_ptr, targets,
            GATED, NAME, ALPHA, BETA, LIMIT, SWAPPED,
        )  # fmt: skip
        out_at = out_ptr + (slots.to(tl.int64) * out_stride)[:, None] + column[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=held & (column < columns)[None, :])
