"""What Triton's interpreter lacks to run the kernels on a CPU: products of bfloat16, and NumPy 2.4.

Of bfloat16 the interpreter holds the bits as integers and multiplies these; NumPy 2.4 no longer takes an array of one
element, the interpreter's scalar, for an integer.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch, _dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), *rest)


def install() -> None:
    """Replaces the interpreter's conversion of scalars to integers and its product."""
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.InterpreterBuilder.create_dot = _wide_dot
