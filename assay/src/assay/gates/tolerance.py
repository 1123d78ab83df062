"""How far a candidate's numbers may be off: as much as base's own rounding, and a little more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.experiment.outputs import brief, equal, inexact, leaves, unlike

SLACK = 4.0
"""A candidate may be so many times as far from the wide result as base was at worst: sums may be ordered anew."""
Array = NDArray[Any]


@dataclass
class Rounding:
    """Base's distances from the wide result, relative to the largest number of an array: by path, one per example.

    A candidate may be SLACK times as far as base was for the same input, or as base mostly was. The worst tenth of the
    examples does not count for the others: one that is ill-conditioned shall not widen the tolerance of all.
    """

    largest: dict[str, list[float]] = field(default_factory=dict)
    rms: dict[str, list[float]] = field(default_factory=dict)

    def learn(self, wide: Any, *base: Any) -> str:
        """Takes an example and what base gave for it; words if base does not even have the shape of the wide result."""
        seen: dict[str, list[tuple[float, float]]] = {}
        for one in base:
            problem, errors = _distances(wide, one)
            if problem:
                return problem
            for path, error in errors.items():
                seen.setdefault(path, []).append(error)
        for path, errors_of in seen.items():
            self.largest.setdefault(path, []).append(max(largest for largest, _ in errors_of))
            self.rms.setdefault(path, []).append(max(rms for _, rms in errors_of))
        return ""

    def judged(self, wide: Any, base: Any, candidate: Any, rtol: float, atol: float) -> str:
        """What is wrong with the candidate's output, in words; "" if nothing. Numbers that are no floats must agree."""
        words = unlike(base, candidate)
        if words:
            return words
        problem, own = _distances(wide, base)
        if problem:
            return problem
        triples = zip(leaves(wide), leaves(base), leaves(candidate), strict=True)
        for (path, one), (_, two), (_, three) in triples:
            if not inexact(two):
                if not equal(two, three):
                    return f"{path}: expected {brief(two)}, got {brief(three)}"
                continue
            errors = _errors(np.asarray(one), np.asarray(three), rtol, atol)
            mostly = (usual(self.largest.get(path, [])), usual(self.rms.get(path, [])))
            for name, found, here, there in zip(("", " (rms)"), errors, own[path], mostly, strict=True):
                most = SLACK * max(here, there)
                if not found <= most:
                    return (
                        f"{path}: expected within {most:.2g} of the wide result{name}, relative to its largest number "
                        f"(base: {here:.2g} here, {there:.2g} mostly), got {found:.2g}: {brief(three)}, "
                        f"wide: {brief(one)}"
                    )
        return ""

    def summary(self) -> dict[str, Mapping[str, float]]:
        """For a report: SLACK times this is allowed, where base is no farther off."""
        return {path: {"largest": usual(self.largest[path]), "rms": usual(self.rms[path])} for path in self.largest}


def usual(errors: Sequence[float]) -> float:
    """The largest of the errors without the worst tenth of them, at least one; 0 for one alone."""
    kept = sorted(errors)[: len(errors) - max(1, len(errors) // 10)]
    return kept[-1] if kept else 0.0


def _distances(wide: Any, base: Any) -> tuple[str, dict[str, tuple[float, float]]]:
    """Largest and rms distance by path, at least half a unit in the last place; or words if they cannot be compared."""
    wanted, found = list(leaves(wide)), list(leaves(base))
    errors: dict[str, tuple[float, float]] = {}
    if [path for path, _ in wanted] != [path for path, _ in found]:
        return f"expected base and wide to return the same containers, got {brief(base)} and {brief(wide)}", errors
    for (path, one), (_, two) in zip(wanted, found, strict=True):
        if not inexact(two):
            continue
        if np.shape(one) != np.shape(two):
            return f"{path}: expected base and wide to have one shape, got {np.shape(two)} and {np.shape(one)}", errors
        largest, rms = _errors(np.asarray(one), np.asarray(two), 0.0, 0.0)
        floor = float(np.finfo(np.asarray(two).dtype).eps) / 2
        if not np.isfinite(largest):
            return f"{path}: expected base to be finite where wide is, got {brief(two)} and {brief(one)}", errors
        errors[path] = (max(floor, largest), max(floor, rms))
    return "", errors


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


def positions(value: Any) -> Sequence[Any]:
    """Names or numbers of the arguments in an input."""
    return list(value) if isinstance(value, dict) else list(range(len(value) if isinstance(value, tuple) else 1))
