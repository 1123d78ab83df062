"""Outputs as lists of leaves, and how far numbers may be off: as much as base's own rounding, and a little more."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLACK = 4.0
"""A candidate may be so many times as far from the wide result as base was at worst: sums may be ordered anew."""
Array = NDArray[Any]
Leaf = tuple[str, Any]


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


@dataclass
class Rounding:
    """Base's worst distance from the wide result, relative to the largest number of an array: by path."""

    largest: dict[str, float] = field(default_factory=dict)
    rms: dict[str, float] = field(default_factory=dict)

    def learn(self, wide: Any, base: Any) -> str:
        """Takes an example of base; words if base does not even have the shape of the wide result."""
        wanted, found = list(leaves(wide)), list(leaves(base))
        if [path for path, _ in wanted] != [path for path, _ in found]:
            return f"expected base and wide to return the same containers, got {_brief(base)} and {_brief(wide)}"
        for (path, one), (_, two) in zip(wanted, found, strict=True):
            if not _inexact(two):
                continue
            if np.shape(one) != np.shape(two):
                return f"{path}: expected base and wide to have one shape, got {np.shape(two)} and {np.shape(one)}"
            largest, rms = _errors(np.asarray(one), np.asarray(two), 0.0, 0.0)
            floor = float(np.finfo(np.asarray(two).dtype).eps) / 2
            if not np.isfinite(largest):
                return f"{path}: expected base to be finite where wide is, got {_brief(two)} and {_brief(one)}"
            self.largest[path] = max(self.largest.get(path, floor), largest)
            self.rms[path] = max(self.rms.get(path, floor), rms)
        return ""

    def judged(self, wide: Any, base: Any, candidate: Any, rtol: float, atol: float) -> str:
        """What is wrong with the candidate's output, in words; "" if nothing. Numbers that are no floats must agree."""
        words = _unlike(base, candidate)
        if words:
            return words
        triples = zip(leaves(wide), leaves(base), leaves(candidate), strict=True)
        for (path, one), (_, two), (_, three) in triples:
            if not _inexact(two):
                if not _equal(two, three):
                    return f"{path}: expected {_brief(two)}, got {_brief(three)}"
                continue
            largest, rms = _errors(np.asarray(one), np.asarray(three), rtol, atol)
            for name, found, base_found in (("", largest, self.largest), (" (rms)", rms, self.rms)):
                most = SLACK * base_found.get(path, float(np.finfo(np.asarray(two).dtype).eps) / 2)
                if not found <= most:
                    return (
                        f"{path}: expected within {most:.2g} of the wide result{name}, relative to its largest number "
                        f"(base: {most / SLACK:.2g}), got {found:.2g}: {_brief(three)}, wide: {_brief(one)}"
                    )
        return ""

    def summary(self) -> dict[str, Mapping[str, float]]:
        """For a report: SLACK times this is allowed."""
        return {path: {"largest": self.largest[path], "rms": self.rms[path]} for path in self.largest}


def judged(base: Any, candidate: Any, rtol: float, atol: float) -> str:
    """Without a wide result: what is wrong with the candidate's output beside base's, in words."""
    words = _unlike(base, candidate)
    if words:
        return words
    for (path, one), (_, two) in zip(leaves(base), leaves(candidate), strict=True):
        if _inexact(one) and (rtol or atol):
            good = bool(np.allclose(np.asarray(two), np.asarray(one), rtol, atol, equal_nan=True))
        else:
            good = _equal(one, two)
        if not good:
            return f"{path}: expected {_brief(one)}, got {_brief(two)}"
    return ""


def _unlike(base: Any, candidate: Any) -> str:
    """Other containers, types, dtypes or shapes."""
    wanted, found = list(leaves(base)), list(leaves(candidate))
    for (path, one), (other, two) in zip(wanted, found, strict=False):
        if path != other or (isinstance(one, tuple) and one != two):
            return f"{path}: expected {_brief(one)}, got {_brief(two)}"
        kinds = [(type(x), getattr(x, "dtype", None), getattr(x, "shape", None)) for x in (one, two)]
        if kinds[0] != kinds[1]:
            return f"{path}: expected {_kind(one)}, got {_kind(two)}"
    return "" if len(wanted) == len(found) else f"output: expected {len(wanted)} parts, got {len(found)}"


def _errors(wide: Array, found: Array, rtol: float, atol: float) -> tuple[float, float]:
    """Largest and rms error beyond rtol and atol, relative to the largest finite number of `wide`."""
    wide, found = (
        np.atleast_1d(x).astype(np.clongdouble if np.iscomplexobj(x) else np.longdouble) for x in (wide, found)
    )
    if wide.size == 0:
        return 0.0, 0.0
    finite = np.isfinite(wide)
    odd = wide[~finite], found[~finite]
    if not np.array_equal(*odd, equal_nan=True) or not np.isfinite(found[finite]).all():
        return float("inf"), float("inf")
    scale = float(np.abs(wide[finite]).max(initial=0)) or 1.0
    off = np.maximum(np.abs(found[finite] - wide[finite]) - atol - rtol * np.abs(wide[finite]), 0) / scale
    return float(off.max(initial=0)), float(np.sqrt(np.mean(off**2))) if off.size else 0.0


def _inexact(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, np.ndarray) and value.dtype.kind in "fc")


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, two, equal_nan=one.dtype.kind in "fc"))
    return bool(one == two or (one != one and two != two))  # noqa: PLR0124 - NaN is what differs from itself


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {list(value.shape)}"
    return type(value).__name__


def _brief(value: Any) -> str:
    """A value on one line."""
    text = np.array2string(value, threshold=6, edgeitems=2) if isinstance(value, np.ndarray) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."


def brief_arguments(value: Any) -> str:
    """Arguments on one line, arrays with dtype and shape."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key}={_argument(one)}" for key, one in value.items()) + ")"
    return "(" + ", ".join(_argument(one) for one in (value if isinstance(value, tuple) else (value,))) + ")"


def _argument(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim:
        return f"{_brief(value)} {value.dtype} {list(value.shape)}"
    return _brief(value)


def positions(value: Any) -> Sequence[Any]:
    """Names or numbers of the arguments in an input."""
    return list(value) if isinstance(value, dict) else list(range(len(value) if isinstance(value, tuple) else 1))
