"""The Triton kernel of weights of 4 bits in tiles (`pack.py`), which are widened in registers. Sizes count elements.

A step is 64 columns: words of 16 bits, each of four codes. Codes s of the words are columns 16s to 16s + 15, in order.
"""

import triton
import triton.language as tl

from moeyard.triton.coded_kernels import summed, widened
from moeyard.triton.kernels import activated, start, tile_of_program


@triton.jit
def codes_of(words, zero, S: tl.constexpr, E2M1: tl.constexpr):
    """Codes s of words: of e2m1 float16 times 2^-14, of int4 float32 less `zero`."""
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
def weight_of(words, zero, scale, S: tl.constexpr, E2M1: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr):
    """Weights [COLUMNS, 16] of a type; unscaled unless SCALED."""
    value = codes_of(words, zero, S, E2M1)
    if SCALED:
        value = value.to(tl.float32) * (16384.0 if E2M1 else 1.0) * scale[:, None]
    return value.to(TYPE)


@triton.jit(do_not_specialize=["most_tiles", "divisor"])
def four_bits_product_kernel(
    rows_ptr,
    weight_ptr,  # int16
    bias_ptr,  # [experts, columns (gate, then up)] or None
    factors_ptr,  # float32 by route, or None
    routes_ptr,  # int32: the route of a slot, and times divisor its row; None: slots are rows
    tiles_ptr,  # int32 [3, most_tiles]: expert (-1: no tile), first slot, number of slots
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
        products: tl.constexpr = 4 // parts
        shape: tl.constexpr = (COLUMNS, ROWS) if SWAPPED else (ROWS, COLUMNS)
        operand: tl.constexpr = rows_ptr.dtype.element_ty
        place = tl.arange(0, ROWS)
        slots = first + tl.minimum(place, count - 1)
        targets = slots
        if routes_ptr is not None:
            targets = tl.load(routes_ptr + slots)
        sources = (targets // divisor if GATHER else slots).to(tl.int64)
        held = (place < count)[:, None]
        within = tl.arange(0, 16)
        row_at = rows_ptr + (sources * row_stride)[:, None] + within[None, :]
        weight_row = tl.minimum(column, columns - 1)
        in_tile: tl.constexpr = 8 if GATED else 16
        tile = expert.to(tl.int64) * (columns // in_tile) + weight_row // in_tile
        eighth = weight_row % 8
        half = weight_row % in_tile // 8
        word = (within // 4 * 8 + within % 4)[None, :]
        gate_at = weight_ptr + (tile * (size * 4) + eighth * 32 + half * 4)[:, None] + word
        scale_at = tile * groups * 16 + eighth * 2 + half
        gate = tl.zeros(shape, dtype=tl.float32)
        up = gate
        zero = tl.full((COLUMNS,), 8.0, tl.float32)
        up_zero = zero
        scale = zero
        up_scale = zero
        for step in range(0, size // 64):
            words = tl.load(gate_at + step * 256)
            up_words = tl.load(gate_at + 4 + step * 256) if GATED else words
            gate_part = gate
            up_part = up
            for s in tl.static_range(4):
                rows = tl.load(row_at + (step * 64 + s * 16), mask=held, other=0.0)
                if s % products == 0:
                    group = step * parts + s // products
                    if parts == 1:
                        group = step * 64 // WIDE if WIDE != 0 else 0
                    at = scale_at + group * 16
                    scale = scale_of(tl.load(scales_ptr + at), KIND)
                    if zeros_ptr is not None:
                        zero = tl.load(zeros_ptr + at).to(tl.float32)
                    if GATED:
                        up_scale = scale_of(tl.load(scales_ptr + at + 1), KIND)
                        if zeros_ptr is not None:
                            up_zero = tl.load(zeros_ptr + at + 1).to(tl.float32)
                    if not SCALED:
                        gate_part = tl.zeros(shape, dtype=tl.float32)
                        up_part = gate_part
                weight = weight_of(words, zero[:, None], scale, s, E2M1, SCALED, operand)
                if SCALED:
                    gate = summed(weight, rows, gate, SWAPPED)
                else:
                    gate_part = summed(weight, rows, gate_part, SWAPPED)
                if GATED:
                    weight = weight_of(up_words, up_zero[:, None], up_scale, s, E2M1, SCALED, operand)
                    if SCALED:
                        up = summed(weight, rows, up, SWAPPED)
                    else:
                        up_part = summed(weight, rows, up_part, SWAPPED)
                if not SCALED and s % products == products - 1:
                    gate += gate_part * (scale[:, None] if SWAPPED else scale[None, :])
                    if GATED:
                        up += up_part * (up_scale[:, None] if SWAPPED else up_scale[None, :])
        if E2M1 and not SCALED:
            gate *= 16384.0
            up *= 16384.0
        if globals_ptr is not None:
            gate *= tl.load(globals_ptr + expert * (2 if GATED else 1))
            if GATED:
                up *= tl.load(globals_ptr + expert * 2 + 1)
        if bias_ptr is not None:
            bias_at = bias_ptr + expert.to(tl.int64) * bias_stride + weight_row
            bias = tl.load(bias_at).to(tl.float32)
            gate += bias[:, None] if SWAPPED else bias[None, :]
            if GATED:
                bias = tl.load(bias_at + columns).to(tl.float32)
                up += bias[:, None] if SWAPPED else bias[None, :]
        if NAME != "":
            gate = activated(gate, up if GATED else None, NAME, ALPHA, BETA, LIMIT)
        if factors_ptr is not None:
            factor = tl.load(factors_ptr + targets)
            gate *= factor[None, :] if SWAPPED else factor[:, None]
        if SWAPPED:
            gate = tl.trans(gate)
        out_at = out_ptr + (slots.to(tl.int64) * out_stride)[:, None] + column[None, :]
        tl.store(out_at, gate.to(out_ptr.dtype.element_ty), mask=held & (column < columns)[None, :])
