"""A pytest plugin (`-p moeyard.testing.interpreted`, TRITON_INTERPRET=1): tests of `impls_on`, for `triton` on a CPU.

It adds what Triton's interpreter lacks for that: bfloat16, and NumPy 2.4. It needs triton and numpy.

Of bfloat16 the interpreter holds the bits as integers. It multiplies the bits in products, and cuts off instead of
rounding to it. NumPy 2.4 no longer takes an array of one element, the interpreter's scalar, for an integer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from moeyard.testing.implementations import restrict_to

_patch, _builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
_dot, _cast = _builder.create_dot, _builder.cast_impl


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), *rest)


def _rounding_cast(self: Any, src: Any, kind: Any) -> Any:
    if (src.dtype.scalar, kind.scalar) == (tl.bfloat16, tl.float32):
        return _widened(src)
    if (src.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, src, kind)
    bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    result = np.where(np.isnan(src.data), 0x7FC0, nearest).astype(np.uint16)
    return interpreter.TensorHandle(result, tl.bfloat16)


@contextmanager
def products_in_order() -> Iterator[None]:
    """Products whose sums have one order. Those of NumPy depend on where in a matrix a row lies."""
    before = _builder.create_dot

    def multiply(_: Any, a: Any, b: Any, total: Any, *_rest: Any) -> Any:
        left, right = (_widened(one).data.astype(total.data.dtype) for one in (a, b))
        result = total.data.copy()
        for k in range(left.shape[1]):
            result += left[:, k : k + 1] * right[k : k + 1]
        return interpreter.TensorHandle(result, total.dtype.scalar)

    _builder.create_dot = multiply
    try:
        yield
    finally:
        _builder.create_dot = before


def install() -> None:
    """Replaces the interpreter's conversions of scalars to integers and of bfloat16, and its product."""
    interpreter._patch_lang_tensor = _patch_tensor
    _builder.create_dot, _builder.cast_impl = _wide_dot, _rounding_cast


install()
restrict_to("triton")
