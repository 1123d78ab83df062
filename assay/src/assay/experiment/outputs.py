"""Whether two encoded outputs say the same, as the judge sees them: bytes, decoded without running anybody's code."""

from typing import Any

import numpy as np

from assay.arms.inside import wire

UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, MemoryError)
"""What decoding may raise for bytes that an untrusted process sent."""


def same(one: bytes, two: bytes, rtol: float, atol: float) -> bool:
    """Whether structure, shapes and dtypes agree and numbers differ by at most atol + rtol * |one|; NaN equals NaN.

    What cannot be decoded differs.
    """
    if one == two:
        return True
    try:
        return wire.dtypes(one) == wire.dtypes(two) and _same(wire.decode(one), wire.decode(two), rtol, atol)
    except UNREADABLE:
        return False


def _same(one: Any, two: Any, rtol: float, atol: float) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(_same(one[key], two[key], rtol, atol) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(_same(a, b, rtol, atol) for a, b in zip(one, two, strict=True))
    if isinstance(one, np.ndarray):
        if one.shape != two.shape or one.dtype != two.dtype:
            return False
        exact = one.dtype.kind not in "fc"
        return bool(np.array_equal(one, two) if exact else np.allclose(two, one, rtol, atol, equal_nan=True))
    if isinstance(one, float):
        return bool(np.isclose(two, one, rtol, atol, equal_nan=True))
    return bool(one == two)
