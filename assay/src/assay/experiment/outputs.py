"""Whether two outputs say the same: one rule for properties and for timed calls, on values that were only decoded.

Containers, types, dtypes, shapes and the order of a dict must agree. Without tolerances numbers must be equal, and so
must the signs of zeros; with them they may differ by atol + rtol * |base|. NaN equals NaN, whatever its payload.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from assay.arms.inside import wire

Leaf = tuple[str, Any]
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, MemoryError)
"""What decoding may raise for bytes that an untrusted process sent."""
_BRIEF = 120
"""Letters of a value on one line."""


def same(one: bytes, two: bytes, rtol: float, atol: float) -> bool:
    """Whether two bodies hold outputs that say the same; `one` is base's. What cannot be decoded differs."""
    if one == two:
        return True
    try:
        return wire.dtypes(one) == wire.dtypes(two) and not difference(wire.decode(one), wire.decode(two), rtol, atol)
    except UNREADABLE:
        return False


def digest(body: bytes) -> bytes:
    """Equal for bodies that are the same without tolerances, so that long outputs need not be kept."""
    try:
        arrays = [leaf for _, leaf in leaves(wire.decode(body)) if isinstance(leaf, np.ndarray)]
    except UNREADABLE:
        arrays = []
    odd = [array for array in arrays if array.dtype.kind in "fc" and np.isnan(array).any()]
    if not odd:
        return hashlib.sha256(body).digest()
    size, _, rest = body[:24].partition(b"\n")
    found = hashlib.sha256(rest and body[len(size) + 1 : len(size) + 1 + int(size)])
    for _, leaf in leaves(wire.decode(body)):
        if isinstance(leaf, np.ndarray):
            found.update(np.where(leaf != leaf, np.nan, leaf).tobytes() if leaf.dtype.kind in "fc" else leaf.tobytes())  # noqa: PLR0124
        elif isinstance(leaf, bytes):
            found.update(leaf)
    return found.digest()


def leaves(value: Any, path: str = "output") -> Iterator[Leaf]:
    """Numbers, text, bytes and arrays of a decoded value, each with its path; containers count by their sizes."""
    if isinstance(value, dict):
        yield path, ("dict", *value)
        for key, one in value.items():
            yield from leaves(one, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield path, (type(value).__name__, len(value))
        for i, one in enumerate(value):
            yield from leaves(one, f"{path}[{i}]")
    else:
        yield path, value


def difference(base: Any, candidate: Any, rtol: float, atol: float) -> str:
    """What is wrong with the candidate's output beside base's, in words; "" if nothing."""
    words = unlike(base, candidate)
    if words:
        return words
    for (path, one), (_, two) in zip(leaves(base), leaves(candidate), strict=True):
        if inexact(one) and (rtol or atol):
            good = bool(np.allclose(np.asarray(two), np.asarray(one), rtol, atol, equal_nan=True))
        else:
            good = equal(one, two)
        if not good:
            return f"{path}: {_where(one, two, rtol, atol)}"
    return ""


def _where(base: Any, candidate: Any, rtol: float, atol: float) -> str:
    """Where two leaves of one kind differ: the first element of arrays, the first place of long texts."""
    if isinstance(base, np.ndarray) and base.ndim:
        wrong = np.argwhere(~_alike(base, candidate, rtol, atol))
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            words = f"{len(wrong)} of {base.size} elements differ, first at {list(at)}"
            one, two = (brief(np.asarray(array[at])) for array in (base, candidate))
            return f"{words}: expected {one}, got {two}"
    if isinstance(base, (str, bytes)) and max(len(base), len(candidate)) > _BRIEF // 2:
        pairs = zip(base, candidate, strict=False)
        at_ = next((i for i, (one, two) in enumerate(pairs) if one != two), min(len(base), len(candidate)))
        parts = [repr(one[max(0, at_ - 10) : at_ + 30]) for one in (base, candidate)]
        lengths = f"lengths {len(base)} and {len(candidate)}"
        return f"differs from place {at_} on ({lengths}): expected ...{parts[0]}..., got ...{parts[1]}..."
    return f"expected {brief(base)}, got {brief(candidate)}"


def _alike(base: Any, candidate: Any, rtol: float, atol: float) -> Any:
    """Element by element, by the rule of `difference`."""
    if not inexact(base):
        return np.asarray(base == candidate)
    if rtol or atol:
        return np.isclose(candidate, base, rtol, atol, equal_nan=True)
    parts = (
        [(base.real, candidate.real), (base.imag, candidate.imag)] if base.dtype.kind == "c" else [(base, candidate)]
    )
    found = np.ones(base.shape, bool)
    for one, two in parts:
        found &= (np.isnan(one) & np.isnan(two)) | ((one == two) & (np.signbit(one) == np.signbit(two)))
    return found


def unlike(base: Any, candidate: Any) -> str:
    """Other containers, types, dtypes or shapes, in words."""
    wanted, found = list(leaves(base)), list(leaves(candidate))
    for (path, one), (other, two) in zip(wanted, found, strict=False):
        containers = isinstance(one, tuple), isinstance(two, tuple)
        if path != other or containers[0] != containers[1] or (containers[0] and one != two):
            return f"{path}: expected {brief(one)}, got {brief(two)}"
        kinds = [(type(x), getattr(x, "dtype", None), getattr(x, "shape", None)) for x in (one, two)]
        if kinds[0] != kinds[1]:
            return f"{path}: expected {_kind(one)}, got {_kind(two)}"
    return "" if len(wanted) == len(found) else f"output: expected {len(wanted)} parts, got {len(found)}"


def inexact(value: Any) -> bool:
    """Whether a leaf holds numbers that are rounded."""
    return isinstance(value, float) or (isinstance(value, np.ndarray) and value.dtype.kind in "fc")


def equal(one: Any, two: Any) -> bool:
    """Whether two leaves of one type, dtype and shape are equal."""
    if isinstance(one, tuple):
        return bool(one == two)
    if not inexact(one):
        return bool(np.array_equal(one, two) if isinstance(one, np.ndarray) else one == two)
    first, second = np.asarray(one), np.asarray(two)
    if not np.array_equal(first, second, equal_nan=True):
        return False
    parts = [(first.real, second.real), (first.imag, second.imag)] if first.dtype.kind == "c" else [(first, second)]
    return all(bool((np.signbit(a) == np.signbit(b))[~np.isnan(a)].all()) for a, b in parts)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {list(value.shape)}"
    return type(value).__name__


def brief(value: Any) -> str:
    """A value on one line."""
    text = np.array2string(value, threshold=6, edgeitems=2) if isinstance(value, np.ndarray) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 3]}..."


def brief_arguments(value: Any) -> str:
    """Arguments on one line, arrays with dtype and shape."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key}={described(one)}" for key, one in value.items()) + ")"
    return "(" + ", ".join(described(one) for one in (value if isinstance(value, tuple) else (value,))) + ")"


def described(value: Any) -> str:
    """A value on one line, arrays with dtype and shape."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"{brief(value)} {value.dtype} {list(value.shape)}"
    return brief(value)
