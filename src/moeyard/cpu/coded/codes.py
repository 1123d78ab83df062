"""Codes of quantised weights as LLVM vector instructions: widened to float32, times their scale, in registers.

A step is STEP weights. Of 8 bits they are in their own order. Of 4 bits a byte's low one is in the first vector and its
high one in the second, so that no shuffle puts them in order: rows that they meet are split alike (`split_pairs`).

A weight is one value whatever uses it, (code - zero point) times scale, rounded once. So products that widen weights in
registers and those that keep a tile of them have the same bits.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moeyard.cpu.dots import LANES, STEP, add_folded, load_floats, multiply_add, pointer
from moeyard.cpu.pointers import LINE, prefetch

E4M3, INT8, INT4, UINT4, E2M1 = 0, 1, 2, 3, 4
"""Kinds of codes: INT4 is less 8, UINT4 less its zero point. From INT4 on two share a byte."""
BROADCAST, PAIRS, EACH = 0, 1, 2
"""How scales lie: one per step; two per step, of 4 bits alone; one per weight, in the order of the step."""
_I8, _I16, _I32, _I64, _F16, _F32 = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.HalfType(),
    ir.FloatType(),
)
_BYTES, _WORDS, _INTS, _WIDE = (ir.VectorType(kind, LANES) for kind in (_I8, _I16, _I32, _F32))


def _all(kind: ir.Type, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _like(value: Any, kind: ir.Type) -> ir.VectorType:
    """Vectors as long as `value`."""
    return ir.VectorType(kind, value.type.count)


def _from_half(builder: Any, bits: Any) -> Any:
    """Floats whose sign, exponent and mantissa stand in those of a half, whose exponent has another bias."""
    return builder.fpext(builder.bitcast(bits, _like(bits, _F16)), _like(bits, _F32))


def _e4m3(builder: Any, stored: Any) -> Any:
    """2^-8 times the values: a half's exponent has one more bit. A magnitude of 127 is NaN: its successor has bit 7."""
    words = builder.zext(stored, _like(stored, _I16))
    kind = words.type
    size = builder.and_(words, _all(kind, 127))
    sign = builder.shl(builder.and_(words, _all(kind, 128)), _all(kind, 8))
    nan = builder.and_(builder.add(size, _all(kind, 1)), _all(kind, 128))
    bits = builder.shl(builder.or_(size, nan), _all(kind, 7))
    return _from_half(builder, builder.or_(bits, sign))


def _part(builder: Any, vector: Any, first: int) -> Any:
    """LANES of the values of a vector."""
    lanes = ir.Constant(_INTS, [first + lane for lane in range(LANES)])
    return builder.shuffle_vector(vector, vector, lanes)


def _load_e4m3(builder: Any, address: Any) -> tuple[Any, Any]:
    both = _e4m3(builder, builder.load(pointer(builder, address, ir.VectorType(_I8, STEP)), align=1))
    return _part(builder, both, 0), _part(builder, both, LANES)


def _load_int8(builder: Any, address: Any) -> tuple[Any, Any]:
    at = pointer(builder, address, _BYTES)
    both = (builder.load(at, align=1), builder.load(builder.gep(at, [_I32(1)]), align=1))
    first, second = (builder.sitofp(builder.sext(part, _INTS), _WIDE) for part in both)
    return first, second


def _load_nibbles(builder: Any, address: Any) -> tuple[Any, Any]:
    """The bytes of a step, and those shifted right: the low four bits are the first codes and the second ones."""
    pairs = builder.zext(builder.load(pointer(builder, address, _BYTES), align=1), _INTS)
    return pairs, builder.lshr(pairs, _all(_INTS, 4))


def _looked_up(builder: Any, address: Any, values: Any) -> tuple[Any, Any]:
    """A load of 4-bit codes by 16 floats in a register: a permutation reads the low four bits of an index."""
    kind = ir.FunctionType(_WIDE, [_WIDE, _INTS])
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    first, second = (builder.call(permute, [values, codes]) for codes in _load_nibbles(builder, address))
    return first, second


def _by_table(table: list[float]) -> Callable[..., tuple[Any, Any]]:
    return lambda builder, address: _looked_up(builder, address, ir.Constant(_WIDE, table))


def _computed_int4(builder: Any, address: Any) -> tuple[Any, Any]:
    low, high = _computed_uint4(builder, address)
    return builder.fsub(low, _all(_WIDE, 8.0)), builder.fsub(high, _all(_WIDE, 8.0))


def _computed_uint4(builder: Any, address: Any) -> tuple[Any, Any]:
    low, high = _load_nibbles(builder, address)
    return builder.uitofp(builder.and_(low, _all(_INTS, 15)), _WIDE), builder.uitofp(high, _WIDE)


def _computed_e2m1(builder: Any, address: Any) -> tuple[Any, Any]:
    """A half's exponent is 14 higher."""
    pairs = builder.zext(builder.load(pointer(builder, address, _BYTES), align=1), _WORDS)

    def value(size: int, up: int, sign: int, further: int) -> Any:
        bits = builder.shl(builder.and_(pairs, _all(_WORDS, size)), _all(_WORDS, up))
        signs = builder.shl(builder.and_(pairs, _all(_WORDS, sign)), _all(_WORDS, further))
        return builder.fmul(_from_half(builder, builder.or_(bits, signs)), _all(_WIDE, 2.0**14))

    return value(0x07, 9, 0x08, 12), value(0x70, 5, 0x80, 8)


_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_TABLES: dict[int, list[float]] = {
    INT4: [float(code - 8) for code in range(16)],
    UINT4: [float(code) for code in range(16)],
    E2M1: [*_E2M1, *(-value for value in _E2M1)],
} if LANES == 16 else {}  # fmt: skip
"""What codes of 4 bits mean, as a register of 16 floats holds it, with AVX-512."""
_load_int4 = _by_table(_TABLES[INT4]) if _TABLES else _computed_int4
_load_uint4 = _by_table(_TABLES[UINT4]) if _TABLES else _computed_uint4
_load_e2m1 = _by_table(_TABLES[E2M1]) if _TABLES else _computed_e2m1
_UNITS = {E4M3: 2.0**8}
"""What sums of codes are multiplied by: a power of two, exact, which is left out of the values of a step."""
_LOADS: dict[int, tuple[Callable[..., tuple[Any, Any]], int]] = {
    E4M3: (_load_e4m3, STEP), INT8: (_load_int8, STEP), INT4: (_load_int4, LANES),
    UINT4: (_load_uint4, LANES), E2M1: (_load_e2m1, LANES)
}  # fmt: skip
"""How a step is read, and its bytes."""


def _splat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_WIDE, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, _all(_INTS, 0))


def _load_scales(builder: Any, mode: int, address: Any) -> tuple[Any, Any]:
    """What the first and the second vector of a step are multiplied by."""
    if mode == EACH:
        return load_floats(builder, address)
    if mode == BROADCAST:
        one = _splat(builder, builder.load(pointer(builder, address, _F32), align=4))
        return one, one
    pair = builder.load(pointer(builder, address, ir.VectorType(_F32, 2)), align=4)
    lanes = ir.Constant(_INTS, [2 * lane // LANES for lane in range(LANES)])
    both = builder.shuffle_vector(pair, pair, lanes)
    return both, both


def _load(builder: Any, code: int, mode: int, weights: Any, scales: Any, zeros: Any) -> tuple[Any, Any]:
    """The weights of a step, in units of its code.

    Where a table gives what a code of 4 bits means, a scale that all of a step share multiplies the table: 16 products
    instead of 32, of the same bits.
    """
    if mode == BROADCAST and code in _TABLES:
        table, (factor, _) = ir.Constant(_WIDE, _TABLES[code]), _load_scales(builder, mode, scales)
        if code == UINT4:
            table = builder.fsub(table, _load_scales(builder, mode, builder.add(scales, zeros))[0])
        return _looked_up(builder, weights, builder.fmul(table, factor))
    values = _LOADS[code][0](builder, weights)
    factors = _load_scales(builder, mode, scales)
    if code == UINT4:
        zero = _load_scales(builder, mode, builder.add(scales, zeros))
        values = builder.fsub(values[0], zero[0]), builder.fsub(values[1], zero[1])
    return builder.fmul(values[0], factors[0]), builder.fmul(values[1], factors[1])


def _dots(code: int, mode: int) -> Callable[..., Any]:
    """An intrinsic (sums, x, w, w_stride, scales, scale_stride, scale_step, zeros, ahead, steps) of four weight rows.

    sums[j] += x . w[j]. Strides, of weight rows and of their scales, and the step from one step's scales to the next
    are in bytes; zero points lie `zeros` bytes behind scales. With every step as many bytes from `ahead` on start to be
    read as a step of four rows has.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        sums, x, w, w_stride, scales, scale_stride, scale_step, zeros, ahead, steps = values
        zero = _all(_WIDE, 0.0)
        total = [cgutils.alloca_once_value(builder, zero) for _ in range(4)]
        for cell in total:  # alloca_once_value sets values at the function's entry
            builder.store(zero, cell)
        w_rows = [builder.add(w, builder.mul(w_stride, _I64(j))) for j in range(4)]
        s_rows = [builder.add(scales, builder.mul(scale_stride, _I64(j))) for j in range(4)]
        with cgutils.for_range(builder, steps) as loop:
            given = load_floats(builder, builder.add(x, builder.mul(loop.index, _I64(4 * STEP))))
            w_at = builder.mul(loop.index, _I64(_LOADS[code][1]))
            s_at = builder.mul(loop.index, scale_step)
            soon = builder.add(ahead, builder.mul(w_at, _I64(4)))
            for line in range(0, 4 * _LOADS[code][1], LINE):
                prefetch(builder, builder.add(soon, _I64(line)))
            for j in range(4):
                here = builder.add(w_rows[j], w_at), builder.add(s_rows[j], s_at)
                value = builder.load(total[j])
                for left, right in zip(given, _load(builder, code, mode, *here, zeros), strict=True):
                    value = multiply_add(builder, left, right, value)
                builder.store(value, total[j])
        for j in range(4):
            in_units = builder.fmul(builder.load(total[j]), _all(_WIDE, _UNITS.get(code, 1.0)))
            add_folded(builder, builder.add(sums, _I64(4 * j)), in_units)
        return context.get_dummy_value()

    arguments = types.void(*[types.intp] * 10)
    declared: Callable[..., Any] = intrinsic(
        lambda context, sums, x, w, w_stride, scales, scale_stride, scale_step, zeros, ahead, steps: (
            arguments,
            generate,
        )
    )
    return declared


def _tile(code: int, mode: int) -> Callable[..., Any]:
    """An intrinsic (target, w, scales, scale_step, zeros, steps) that writes the weights of steps as float32."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target, w, scales, scale_step, zeros, steps = values
        with cgutils.for_range(builder, steps) as loop:
            w_at = builder.add(w, builder.mul(loop.index, _I64(_LOADS[code][1])))
            s_at = builder.add(scales, builder.mul(loop.index, scale_step))
            unit = _all(_WIDE, _UNITS.get(code, 1.0))
            first, second = (builder.fmul(part, unit) for part in _load(builder, code, mode, w_at, s_at, zeros))
            out = pointer(builder, builder.add(target, builder.mul(loop.index, _I64(4 * STEP))), _WIDE)
            builder.store(first, out, align=4)
            builder.store(second, builder.gep(out, [_I32(1)]), align=4)
        return context.get_dummy_value()

    declared: Callable[..., Any] = intrinsic(
        lambda context, target, w, scales, scale_step, zeros, steps: (types.void(*[types.intp] * 6), generate)
    )
    return declared


e4m3_dots, int8_dots, int4_dots, uint4_dots, e2m1_dots = (_dots(code, BROADCAST) for code in _LOADS)
e4m3_tile, int8_tile, int4_tile, uint4_tile, e2m1_tile = (_tile(code, BROADCAST) for code in _LOADS)
int4_pair_dots, uint4_pair_dots, e2m1_pair_dots = (_dots(code, PAIRS) for code in (INT4, UINT4, E2M1))
int4_pair_tile, uint4_pair_tile, e2m1_pair_tile = (_tile(code, PAIRS) for code in (INT4, UINT4, E2M1))
e4m3_each_tile, int8_each_tile, int4_each_tile, uint4_each_tile, e2m1_each_tile = (_tile(code, EACH) for code in _LOADS)


@intrinsic
def split_pairs(context: Any, target: Any, source: Any) -> Any:
    """target[:STEP] = the even ones of source[:STEP], then the odd ones; float32 at two addresses."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        first, second = load_floats(builder, values[1])
        target = pointer(builder, values[0], _WIDE)
        for odd in (0, 1):
            lanes = ir.Constant(_INTS, [2 * lane + odd for lane in range(LANES)])
            builder.store(builder.shuffle_vector(first, second, lanes), builder.gep(target, [_I32(odd)]), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


# Scales, widened to float32


def _scale_float(builder: Any, value: Any) -> Any:
    return value


def _scale_bfloat(builder: Any, value: Any) -> Any:
    kind = _like(value, _I32)
    return builder.bitcast(builder.shl(builder.zext(value, kind), _all(kind, 16)), _like(value, _F32))


def _scale_e8m0(builder: Any, value: Any) -> Any:
    """An exponent: that of 0 is a subnormal number, that of 255 NaN."""
    kind = _like(value, _I32)
    byte = builder.zext(value, kind)
    bits = builder.shl(byte, _all(kind, 23))
    bits = builder.select(builder.icmp_unsigned("==", byte, _all(kind, 0)), _all(kind, 1 << 22), bits)
    bits = builder.select(builder.icmp_unsigned("==", byte, _all(kind, 255)), _all(kind, 0x7FC00000), bits)
    return builder.bitcast(bits, _like(value, _F32))


def _scale_e4m3(builder: Any, value: Any) -> Any:
    return builder.fmul(_e4m3(builder, value), _all(_like(value, _F32), _UNITS[E4M3]))


def _scale_byte(builder: Any, value: Any) -> Any:
    return builder.uitofp(value, _like(value, _F32))


def _widener(stored: ir.Type, widen: Callable[..., Any], lanes: int) -> Callable[..., Any]:
    """An intrinsic (target, source, factor): target[:lanes] = factor * source[:lanes]."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target, source, factor = values
        read = builder.load(pointer(builder, source, ir.VectorType(stored, lanes)), align=1)
        wide = ir.VectorType(_F32, lanes)
        undefined = ir.Constant(wide, ir.Undefined)
        one = builder.insert_element(undefined, factor, _I32(0))
        all_ = builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))
        builder.store(builder.fmul(widen(builder, read), all_), pointer(builder, target, wide), align=4)
        return context.get_dummy_value()

    arguments = types.void(types.intp, types.intp, types.float32)
    declared: Callable[..., Any] = intrinsic(lambda context, target, source, factor: (arguments, generate))
    return declared


widen_floats, widen_float = (_widener(_F32, _scale_float, lanes) for lanes in (LANES, 1))
widen_bfloats, widen_bfloat = (_widener(_I16, _scale_bfloat, lanes) for lanes in (LANES, 1))
widen_halves, widen_half = (_widener(_I16, _from_half, lanes) for lanes in (LANES, 1))
widen_e8m0s, widen_e8m0 = (_widener(_I8, _scale_e8m0, lanes) for lanes in (LANES, 1))
widen_e4m3s, widen_e4m3 = (_widener(_I8, _scale_e4m3, lanes) for lanes in (LANES, 1))
widen_bytes, widen_byte = (_widener(_I8, _scale_byte, lanes) for lanes in (LANES, 1))


# Rows that are quantised


@intrinsic
def largest_bits(context: Any, address: Any, largest: Any) -> Any:
    """max(largest, magnitudes of LANES float32 values at an address), as integers, of which NaN has the largest."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.load(pointer(builder, values[0], _INTS), align=4)
        bits = builder.and_(bits, _all(_INTS, 0x7FFFFFFF))
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            upper = [lanes + i if i < lanes else 0 for i in range(LANES)]
            moved = builder.shuffle_vector(bits, bits, ir.Constant(_INTS, upper))
            bits = builder.select(builder.icmp_unsigned(">", bits, moved), bits, moved)
        one = builder.zext(builder.extract_element(bits, _I32(0)), _I64)
        return builder.select(builder.icmp_unsigned(">", one, values[1]), one, values[1])

    return types.intp(types.intp, types.intp), generate


def _bounded(builder: Any, value: Any, largest: float) -> Any:
    """Saturated; NaN stays NaN."""
    high, low = _all(_WIDE, largest), _all(_WIDE, -largest)
    value = builder.select(builder.fcmp_ordered(">", value, high), high, value)
    return builder.select(builder.fcmp_ordered("<", value, low), low, value)


def _to_e4m3(builder: Any, value: Any) -> Any:
    """The nearest value of e4m3, ties to even: three bits of mantissa, or steps of 2^-9 below 2^-6."""
    bits = builder.bitcast(_bounded(builder, value, 448.0), _INTS)
    size = builder.and_(bits, _all(_INTS, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, _all(_INTS, 20)), _all(_INTS, 1))
    normal = builder.add(builder.add(size, _all(_INTS, 0x7FFFF)), odd)
    normal = builder.and_(normal, _all(_INTS, 0xFFF00000 - (1 << 32)))
    small = builder.fadd(builder.bitcast(size, _WIDE), _all(_WIDE, 2.0**14))  # whose last bit is 2^-9
    small = builder.bitcast(builder.fsub(small, _all(_WIDE, 2.0**14)), _INTS)
    is_small = builder.icmp_unsigned("<", size, _all(_INTS, 121 << 23))
    rounded = builder.select(is_small, small, normal)
    sign = builder.and_(bits, _all(_INTS, -(1 << 31)))
    return builder.bitcast(builder.or_(rounded, sign), _WIDE)


def _to_int8(builder: Any, value: Any) -> Any:
    kind = ir.FunctionType(_WIDE, [_WIDE])
    nearest = cgutils.get_or_insert_function(builder.module, kind, f"llvm.roundeven.v{LANES}f32")
    return builder.call(nearest, [_bounded(builder, value, 127.0)])


def _rounder(to_code: Callable[..., Any]) -> Callable[..., Any]:
    """An intrinsic (address, scale): LANES float32 values there become their code times the scale."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        at, scale = pointer(builder, values[0], _WIDE), _splat(builder, values[1])
        code = to_code(builder, builder.fdiv(builder.load(at, align=4), scale))
        builder.store(builder.fmul(code, scale), at, align=4)
        return context.get_dummy_value()

    arguments = types.void(types.intp, types.float32)
    declared: Callable[..., Any] = intrinsic(lambda context, address, scale: (arguments, generate))
    return declared


round_to_e4m3, round_to_int8 = _rounder(_to_e4m3), _rounder(_to_int8)
