"""Dot products of float32 rows with weight rows of 32 or 16 bits, as LLVM vector instructions: the heart of products.

Both operands run along their rows, so a tile of rows x weights is a set of dot products that share loads. One dot
product is always summed the same way, LANES partial sums first, whatever the tile that it is part of: a token's result
does not depend on which other tokens come with it.
"""

import math
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I16, _I32, _I64, _F16, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Partial sums of a dot product: a vector register's worth."""
STEP = 2 * LANES
"""Elements of one step; what is left over at the end of a row is the caller's."""


def pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    """An address as a pointer to values of a kind."""
    return builder.inttoptr(address, ir.PointerType(kind))


def load_floats(builder: Any, address: Any) -> tuple[Any, Any]:
    """A step of float32."""
    at = pointer(builder, address, ir.VectorType(_F32, LANES))
    return builder.load(at, align=4), builder.load(builder.gep(at, [_I32(1)]), align=4)


def _load_bfloats(builder: Any, address: Any) -> tuple[Any, Any]:
    """The even ones, then the odd ones: a shift and a mask widen what keeping the order would take shuffles for."""
    kind, wide = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
    pairs = builder.load(pointer(builder, address, kind), align=2)
    even = builder.shl(pairs, ir.Constant(kind, [16] * LANES))
    odd = builder.and_(pairs, ir.Constant(kind, [-65536] * LANES))
    return builder.bitcast(even, wide), builder.bitcast(odd, wide)


def _load_halves(builder: Any, address: Any) -> tuple[Any, Any]:
    at, wide = pointer(builder, address, ir.VectorType(_F16, LANES)), ir.VectorType(_F32, LANES)
    first, second = builder.load(at, align=2), builder.load(builder.gep(at, [_I32(1)]), align=2)
    return builder.fpext(first, wide), builder.fpext(second, wide)


def _fold(builder: Any, value: Any) -> Any:
    """The sum of a vector: halves first, always in this order."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        upper = [lanes + i if i < lanes else 0 for i in range(LANES)]
        moved = builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, LANES), upper))
        value = builder.fadd(value, moved)
    return builder.extract_element(value, _I32(0))


def add_folded(builder: Any, address: Any, value: Any) -> None:
    """The float32 at an address += the sum of a vector."""
    cell = pointer(builder, address, _F32)
    folded = _fold(builder, value)
    builder.store(builder.fadd(builder.load(cell, align=4), folded), cell, align=4)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32 vectors, rounded once."""
    wide = ir.VectorType(_F32, LANES)
    kind = ir.FunctionType(wide, [wide] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _dots(load: Callable[..., tuple[Any, Any]], width: int, rows: int, weights: int) -> Callable[..., Any]:
    """An intrinsic (sums, sums_stride, x, x_stride, w, w_stride, steps) that adds dot products of whole steps.

    sums[i, j] += x[i, :] . w[j, :] for `rows` x `weights` float32 sums; strides are in bytes. x is float32, in the
    order in which `load` delivers weights.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        sums, sums_stride, x, x_stride, w, w_stride, steps = values
        wide = ir.VectorType(_F32, LANES)
        zero = ir.Constant(wide, [0.0] * LANES)
        total = [[cgutils.alloca_once_value(builder, zero) for _ in range(weights)] for _ in range(rows)]
        for row in total:  # alloca_once_value sets values at the function's entry
            for cell in row:
                builder.store(zero, cell)
        x_rows = [builder.add(x, builder.mul(x_stride, _I64(i))) for i in range(rows)]
        w_rows = [builder.add(w, builder.mul(w_stride, _I64(j))) for j in range(weights)]
        with cgutils.for_range(builder, steps) as loop:
            x_at = builder.mul(loop.index, _I64(4 * STEP))
            w_at = builder.mul(loop.index, _I64(width * STEP))
            loaded = [load_floats(builder, builder.add(row, x_at)) for row in x_rows]
            for j, weight_row in enumerate(w_rows):
                both = load(builder, builder.add(weight_row, w_at))
                for i in range(rows):
                    value = builder.load(total[i][j])
                    for left, right in zip(loaded[i], both, strict=True):
                        value = multiply_add(builder, left, right, value)
                    builder.store(value, total[i][j])
        for i in range(rows):
            for j in range(weights):
                at = builder.add(builder.add(sums, builder.mul(sums_stride, _I64(i))), _I64(4 * j))
                add_folded(builder, at, builder.load(total[i][j]))
        return context.get_dummy_value()

    arguments = types.void(*[types.intp] * 7)
    declared: Callable[..., Any] = intrinsic(
        lambda context, sums, sums_stride, x, x_stride, w, w_stride, steps: (arguments, generate)
    )
    return declared


def _widener(load: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """An intrinsic (target, source) that writes STEP elements as float32 in the order that `load` delivers."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target = pointer(builder, values[0], ir.VectorType(_F32, LANES))
        first, second = load(builder, values[1])
        builder.store(first, target, align=4)
        builder.store(second, builder.gep(target, [_I32(1)]), align=4)
        return context.get_dummy_value()

    declared: Callable[..., Any] = intrinsic(lambda context, target, source: (types.void(*[types.intp] * 2), generate))
    return declared


def _exponential(builder: Any, x: Any) -> Any:
    """exp of a float32 vector, within about two units in the last place, after Cephes' expf.

    0 below -87.3, infinite above 88.7, NaN where it was: a polynomial of what whole powers of two leave.
    """
    wide, whole = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)

    def floats(value: float) -> Any:
        return ir.Constant(wide, [value] * LANES)

    shifted = multiply_add(
        builder, x, floats(1.44269502162933349609375), floats(12582912.0)
    )  # its low bits: a whole number
    powers = builder.fsub(shifted, floats(12582912.0))
    rest = multiply_add(builder, powers, floats(-0.693359375), x)
    rest = multiply_add(builder, powers, floats(2.12194440e-4), rest)
    value = floats(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = multiply_add(builder, value, rest, floats(factor))
    value = builder.fadd(multiply_add(builder, value, builder.fmul(rest, rest), rest), floats(1.0))
    exponent = builder.shl(builder.bitcast(shifted, whole), ir.Constant(whole, [23] * LANES))
    # a power of two is half of it, twice: that of 128 is no float32
    scale = builder.bitcast(builder.add(exponent, ir.Constant(whole, [126 << 23] * LANES)), wide)
    value = builder.fmul(builder.fmul(value, scale), floats(2.0))
    value = builder.select(builder.fcmp_ordered("<", x, floats(-87.3)), floats(0.0), value)
    value = builder.select(builder.fcmp_ordered(">", x, floats(88.7)), floats(math.inf), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


@intrinsic
def exponentials(context: Any, target: Any, source: Any) -> Any:
    """target[:LANES] = exp(source[:LANES]), float32 at two addresses."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target, source = (pointer(builder, value, ir.VectorType(_F32, LANES)) for value in values)
        builder.store(_exponential(builder, builder.load(source, align=4)), target, align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def sigmoids(context: Any, target: Any, source: Any) -> Any:
    """target[:LANES] = 1 / (1 + exp(-source[:LANES])), float32 at two addresses."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        wide = ir.VectorType(_F32, LANES)
        target, source = (pointer(builder, value, wide) for value in values)
        ones = ir.Constant(wide, [1.0] * LANES)
        below = builder.fadd(_exponential(builder, builder.fneg(builder.load(source, align=4))), ones)
        builder.store(builder.fdiv(ones, below), target, align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


_KINDS = ((load_floats, 4), (_load_bfloats, 2), (_load_halves, 2))
float_dots_3x3, bfloat_dots_3x3, half_dots_3x3 = (_dots(*kind, 3, 3) for kind in _KINDS)
float_dots_2x4, bfloat_dots_2x4, half_dots_2x4 = (_dots(*kind, 2, 4) for kind in _KINDS)
float_dots_1x4, bfloat_dots_1x4, half_dots_1x4 = (_dots(*kind, 1, 4) for kind in _KINDS)
float_dots_1x1, bfloat_dots_1x1, half_dots_1x1 = (_dots(*kind, 1, 1) for kind in _KINDS)
widen_bfloats, widen_halves = (_widener(load) for load in (_load_bfloats, _load_halves))
