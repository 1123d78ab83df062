"""How weights of experts may be quantised. What takes no entry of this table refuses a scheme in words."""

from typing import NamedTuple

import torch


class Scheme(NamedTuple):
    """What callers and the table of implementations have to know of a scheme."""

    dtype: torch.dtype | None
    """Of w13 and w2; None where it is that of the rows."""
    rows: tuple[str, ...]
    """The rows of the table that take it, by their labels: "cpu", "cuda (products)"."""


SCHEMES: dict[str, Scheme] = {}
"""By the name that `ExpertWeights.scheme` has; "none", which every implementation takes, has no entry."""


def known_schemes() -> list[str]:
    """What `ExpertWeights.scheme` may be."""
    return ["none", *sorted(SCHEMES)]


def weight_dtype(scheme: str, rows: torch.dtype) -> torch.dtype:
    """The dtype of weights of a scheme that rows of a dtype are multiplied by; ValueError for an unknown scheme."""
    if scheme == "none":
        return rows
    if scheme not in SCHEMES:
        raise ValueError(f"weights.scheme: expected one of {known_schemes()}, got {scheme!r}")
    return SCHEMES[scheme].dtype or rows


def refusal_of(label: str, scheme: str) -> str | None:
    """Why a row of the table takes no weights of a scheme, in words; None if it does."""
    if scheme == "none" or (scheme in SCHEMES and label in SCHEMES[scheme].rows):
        return None
    return f"takes no weights of scheme {scheme!r}"
