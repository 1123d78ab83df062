"""Comparisons of answers: bit by bit, or by errors against float64."""

import dataclasses

import torch
from torch import Tensor

from moeyard.values import Layout


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and bits agree, NaN payloads and signs of zero included; devices may differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    mine, theirs = (t.to(a.device).contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(mine, theirs)


def layout_difference(got: Layout, wanted: Layout) -> str | None:
    """The first field in which two layouts differ, in words; None if all bits agree."""
    for name in (f.name for f in dataclasses.fields(Layout) if f.init):
        a, b = getattr(got, name), getattr(wanted, name)
        if not (same_bits(a, b) if isinstance(a, Tensor) else a == b):
            return f"{name}: {a} instead of {b}"
    return None


def largest_and_rms(got: Tensor, wide: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square error against a float64 answer of the same shape; zeros for empty tensors."""
    error = got.double() - wide
    return (float(error.abs().max()), float(error.square().mean().sqrt())) if error.numel() else (0.0, 0.0)


def no_worse(got: Tensor, honest: Tensor, wide: Tensor) -> bool:
    """Whether both errors against `wide` are at most 1.1 times those that `honest`, at the same dtype, has."""
    mine, theirs = largest_and_rms(got, wide), largest_and_rms(honest, wide)
    return all(a <= 1.1 * b + 1e-12 for a, b in zip(mine, theirs, strict=True))
