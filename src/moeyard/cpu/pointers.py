"""What numba lacks for kernels over raw addresses: arrays at an address, copies of rows, and 16-bit floats.

Addresses as integers cost a tenth of a microsecond an argument; array arguments cost three times that and need a
NumPy view of every tensor, which bfloat16 does not have.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64
"""Bytes of a cache line."""
IDS = 16
"""Ids that one vector step takes."""
_I16, _I32, _F16, _F32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


def _digest() -> str:
    """Of all sources of this folder: kernels call helpers of other modules, whose changes numba does not see."""
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


_SOURCES = _digest()


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a kernel at its first call, without the GIL, cached on disk where a cache can be written.

    Machine code in the cache counts for the sources that it was made of, those of helpers included.
    """
    try:
        cached: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")(function)
        cached._cache._cache_file._source_stamp = _SOURCES  # type: ignore[attr-defined]
        return cached
    except (RuntimeError, AttributeError):  # numba found no place to cache in, or keeps its cache in another way
        compiled: Callable[..., Any] = njit(nogil=True, error_model="numpy")(function)
        return compiled


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@njit
def int32_at(address: int, length: int) -> Any:
    """The int32 array of `length` at an address."""
    return carray(_pointer(address), (length,), np.int32)


@njit
def int64_at(address: int, length: int) -> Any:
    """The int64 array of `length` at an address."""
    return carray(_pointer(address), (length,), np.int64)


@njit
def uint32_at(address: int, length: int) -> Any:
    """The uint32 array of `length` at an address."""
    return carray(_pointer(address), (length,), np.uint32)


@njit
def uint64_at(address: int, length: int) -> Any:
    """The uint64 array of `length` at an address."""
    return carray(_pointer(address), (length,), np.uint64)


@njit
def uint8_at(address: int, length: int) -> Any:
    """The uint8 array of `length` at an address."""
    return carray(_pointer(address), (length,), np.uint8)


@njit
def float32_at(address: int, length: int) -> Any:
    """The float32 array of `length` at an address."""
    return carray(_pointer(address), (length,), np.float32)


@intrinsic
def _copy_bytes(context: Any, target: Any, source: Any, count: Any) -> Any:
    """memcpy."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        to, come = (builder.inttoptr(v, cgutils.voidptr_t) for v in values[:2])
        cgutils.raw_memcpy(builder, to, come, values[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


def _stream(builder: Any, store: Any) -> None:
    """Marks a store to pass the cache."""
    store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


@intrinsic
def _stream_line(context: Any, target: Any, source: Any) -> Any:
    """Copies one cache line with a store that passes the cache; `target` is aligned to a line."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        line = ir.PointerType(ir.VectorType(ir.IntType(64), LINE // 8))
        to, come = (builder.inttoptr(v, line) for v in values)
        _stream(builder, builder.store(builder.load(come, align=1), to, align=LINE))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def stream_fence(context: Any) -> Any:
    """Makes streamed stores visible to other threads before anything that follows."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def prefetch(builder: Any, address: Any) -> None:
    """Starts to read the cache line at an address, which need not be a valid one."""
    pointer = builder.inttoptr(address, cgutils.voidptr_t)
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _I32, _I32, _I32])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(call, [pointer, _I32(0), _I32(3), _I32(1)])  # read, keep, data


@intrinsic
def prefetch_line(context: Any, address: Any) -> Any:
    """`prefetch` of an address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        prefetch(builder, values[0])
        return context.get_dummy_value()

    return types.void(types.intp), generate


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of `lanes` copies of a value."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


@intrinsic
def ranks_to_slots(context: Any, ids: Any, ranks: Any, firsts: Any, bound: Any) -> Any:
    """ranks[i] = firsts[ids[i]] + ranks[i] where ids[i] < bound, else -1, for IDS values: a gather and one store.

    All are addresses, of uint32 ids and int32 values; bound is at least 1.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind, wide = ir.VectorType(_I32, IDS), ir.VectorType(ir.IntType(64), IDS)
        pointers, mask = ir.VectorType(ir.PointerType(_I32), IDS), ir.VectorType(ir.IntType(1), IDS)
        expert = builder.load(builder.inttoptr(values[0], ir.PointerType(kind)), align=4)
        here = builder.inttoptr(values[1], ir.PointerType(kind))
        valid = builder.icmp_unsigned("<", expert, _splat(builder, builder.trunc(values[3], _I32), IDS))
        safe = builder.zext(builder.select(valid, expert, ir.Constant(kind, [0] * IDS)), wide)
        offset = builder.shl(safe, ir.Constant(wide, [2] * IDS))
        address = builder.inttoptr(builder.add(_splat(builder, values[2], IDS), offset), pointers)
        gather = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(kind, [pointers, _I32, mask, kind]),
            f"llvm.masked.gather.v{IDS}i32.v{IDS}p0",
        )
        everywhere, nothing = ir.Constant(mask, [1] * IDS), ir.Constant(kind, ir.Undefined)
        first = builder.call(gather, [address, _I32(4), everywhere, nothing])
        slot = builder.add(first, builder.load(here, align=4))
        builder.store(builder.select(valid, slot, ir.Constant(kind, [-1] * IDS)), here, align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), generate


@njit
def copy_row(target: int, source: int, row_bytes: int, streamed: int) -> None:
    """Copies a row; `streamed` rows are whole aligned lines that are not read soon."""
    if streamed:
        for at in range(0, row_bytes, 64):
            _stream_line(target + at, source + at)
    else:
        _copy_bytes(target, source, row_bytes)


# 16-bit floats, as LLVM instructions for one value or for LANES of them: numba widens integer arithmetic to 64 bits,
# and LLVM then vectorises none of it.

LANES = 32
"""Values that one vector step takes: a line of 16-bit ones."""


def _vector(kind: ir.Type, lanes: int) -> ir.Type:
    return ir.VectorType(kind, lanes) if lanes > 1 else kind


def _constant(kind: ir.Type, value: int, lanes: int) -> ir.Constant:
    return ir.Constant(_vector(kind, lanes), [value] * lanes if lanes > 1 else value)


def _widen_float(builder: Any, value: Any, lanes: int) -> Any:
    return value


def _widen_bfloat(builder: Any, value: Any, lanes: int) -> Any:
    """The upper half of a float32: exact."""
    bits = builder.shl(builder.zext(value, _vector(_I32, lanes)), _constant(_I32, 16, lanes))
    return builder.bitcast(bits, _vector(_F32, lanes))


def _widen_half(builder: Any, value: Any, lanes: int) -> Any:
    return builder.fpext(builder.bitcast(value, _vector(_F16, lanes)), _vector(_F32, lanes))


def _narrow_bfloat(builder: Any, value: Any, lanes: int) -> Any:
    """Rounded to nearest even; NaN stays NaN."""
    bits = builder.bitcast(value, _vector(_I32, lanes))
    sixteen = _constant(_I32, 16, lanes)
    odd = builder.and_(builder.lshr(bits, sixteen), _constant(_I32, 1, lanes))
    rounded = builder.lshr(builder.add(builder.add(bits, _constant(_I32, 0x7FFF, lanes)), odd), sixteen)
    quiet = builder.select(builder.fcmp_unordered("uno", value, value), _constant(_I32, 0x7FC0, lanes), rounded)
    return builder.trunc(quiet, _vector(_I16, lanes))


def _narrow_half(builder: Any, value: Any, lanes: int) -> Any:
    return builder.bitcast(builder.fptrunc(value, _vector(_F16, lanes)), _vector(_I16, lanes))


def _at(builder: Any, address: Any, kind: ir.Type, lanes: int) -> Any:
    return builder.inttoptr(address, ir.PointerType(_vector(kind, lanes)))


def _adder(kind: ir.Type, widen: Callable[..., Any], lanes: int) -> Callable[..., Any]:
    """An intrinsic (total, factor, row): total[:lanes] += factor * row[:lanes], product and sum each rounded."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        total, factor, row = values
        if lanes > 1:
            factor = _splat(builder, factor, lanes)
        read = builder.load(_at(builder, row, kind, lanes), align=kind.width // 8 if kind is _I16 else 4)
        here = _at(builder, total, _F32, lanes)
        product = builder.fmul(factor, widen(builder, read, lanes))
        builder.store(builder.fadd(builder.load(here, align=4), product), here, align=4)
        return context.get_dummy_value()

    declared: Callable[..., Any] = intrinsic(
        lambda context, total, factor, row: (types.void(types.intp, types.float32, types.intp), generate)
    )
    return declared


def _storer(narrow: Callable[..., Any], lanes: int, streamed: bool = False) -> Callable[..., Any]:
    """An intrinsic (out, total): out[:lanes] = total[:lanes] in 16 bits; `streamed` past the cache, a whole line."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        read = builder.load(_at(builder, values[1], _F32, lanes), align=4)
        align = LINE if streamed else 2
        store = builder.store(narrow(builder, read, lanes), _at(builder, values[0], _I16, lanes), align=align)
        if streamed:
            _stream(builder, store)
        return context.get_dummy_value()

    declared: Callable[..., Any] = intrinsic(lambda context, out, total: (types.void(types.intp, types.intp), generate))
    return declared


add_floats, add_float = (_adder(_F32, _widen_float, lanes) for lanes in (LANES, 1))
add_bfloats, add_bfloat = (_adder(_I16, _widen_bfloat, lanes) for lanes in (LANES, 1))
add_halves, add_half = (_adder(_I16, _widen_half, lanes) for lanes in (LANES, 1))
store_bfloats, store_bfloat = (_storer(_narrow_bfloat, lanes) for lanes in (LANES, 1))
store_halves, store_half = (_storer(_narrow_half, lanes) for lanes in (LANES, 1))
stream_bfloats, stream_halves = (_storer(narrow, LANES, streamed=True) for narrow in (_narrow_bfloat, _narrow_half))
