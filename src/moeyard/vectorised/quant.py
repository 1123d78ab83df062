"""Quantised experts in whole tensors: parts of weights as float32, and rows as a scheme quantises them.

No step reads a device's value on the host or copies a constant to a device, so all of it can be captured in a graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moeyard.quant import LARGEST, LEAST_MAGNITUDE, QuantScheme, blocks_of
from moeyard.values import ExpertWeights

CHUNK_BYTES = 1 << 26
"""Of float32 values that are made at a time."""


class Matrices(NamedTuple):
    """One matrix of every expert, quantised or not."""

    stored: Tensor
    """[E, R, C / per_byte]."""
    scheme: QuantScheme | None = None
    scales: Tensor | None = None
    """[E, blocks of rows, blocks of columns]; of `halves` matrices one below the other."""
    zero_points: Tensor | None = None
    global_scales: Tensor | None = None
    """[E, halves]."""
    halves: int = 1
    row_start: int = 0
    """Where in its block the first row of each half lies."""
    column_start: int = 0

    @property
    def rows(self) -> int:
        """R: results per row of a product."""
        return self.stored.shape[1]

    @property
    def columns(self) -> int:
        """C: what a product sums over."""
        return self.stored.shape[2] * (1 if self.scheme is None else self.scheme.per_byte)

    def part(self, experts: Tensor | slice, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """[chosen experts, last - first, C]: rows of some experts as values of a wide dtype."""
        scheme = self.scheme
        stored = _chosen(self.stored, experts)[:, first:last]
        if scheme is None or self.scales is None:
            return stored.to(dtype)
        row = torch.arange(first, last, device=stored.device)
        size = self.rows // self.halves
        half, inside = row // max(size, 1), row % max(size, 1)
        block = _block(inside, scheme.block[0], self.row_start)
        block = block + half * blocks_of(size, scheme.block[0], self.row_start)
        column = _block(torch.arange(self.columns, device=stored.device), scheme.block[1], self.column_start)
        values = code_values(stored, scheme, dtype)
        if scheme.weights == "int4":
            zero = 8 if self.zero_points is None else _spread(_chosen(self.zero_points, experts), block, column, dtype)
            values = values - zero
        factor = _spread(_chosen(self.scales, experts), block, column, dtype)
        if self.global_scales is not None:
            factor = factor * _chosen(self.global_scales, experts)[:, half].to(dtype).unsqueeze(2)
        return values * factor

    def values(self, dtype: torch.dtype) -> Tensor:
        """[E, R, C]: all experts, computed in float32 (float64: in that) some at a time, and rounded once."""
        out = self.stored.new_empty((self.stored.shape[0], self.rows, self.columns), dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        step = max(1, CHUNK_BYTES // max(1, 4 * self.rows * self.columns))
        for e in range(0, out.shape[0], step):
            out[e : e + step] = self.part(slice(e, e + step), 0, self.rows, wide)
        return out


def matrices_of(weights: ExpertWeights) -> tuple[Matrices, Matrices]:
    """Both matrices of experts."""
    scheme, scales = weights.scheme, weights.scales
    if scheme is None or scales is None:
        return Matrices(weights.w13), Matrices(weights.w2)
    start, halves = scales.block_start, 2 if weights.gated else 1
    return (
        Matrices(weights.w13, scheme, scales.w13, scales.w13_zero_points, scales.w13_global, halves, start, 0),
        Matrices(weights.w2, scheme, scales.w2, scales.w2_zero_points, scales.w2_global, 1, 0, start),
    )


def code_values(stored: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> Tensor:
    """[..., C / per_byte] -> [..., C]: what codes mean before scales and zero points."""
    if scheme.per_byte == 1:
        return stored.to(dtype)
    codes = torch.stack((stored & 15, stored >> 4), -1).flatten(-2)
    if scheme.weights == "int4":
        return codes.to(dtype)
    small = codes & 7  # twice the magnitude: 0 1 2 3 4 6 8 12
    twice = torch.where(small < 4, small, ((small & 1) + 2) << ((small >> 1) - 1).clamp(min=0))
    values = twice.to(dtype) * 0.5
    return torch.where(codes > 7, -values, values)


def quantise_rows(rows: Tensor, scheme: QuantScheme, static_scales: Tensor | None, start: int) -> Tensor:
    """[R, C] -> [R, C] float32: code times scale, as `QuantScheme` says; `rows` as they are without activations.

    `static_scales` are [R] float32. Column 0 is number `start` of a larger matrix, in which groups begin.
    """
    if scheme.activations == "none" or not rows.numel():
        return rows
    largest = LARGEST[scheme.activations]
    num_rows, columns = rows.shape
    wide = rows.float()
    if static_scales is not None:
        scales = static_scales.unsqueeze(1)
        if scheme.activations == "int8":
            scales = scales.masked_fill(wide.isnan().any(1, keepdim=True), torch.nan)
        return _rounded(wide / scales, scheme) * scales
    group = scheme.activation_group or columns
    lead = start % group if scheme.activation_group else 0
    padded = functional.pad(wide, (lead, -(lead + columns) % group)).view(num_rows, -1, group)  # zeros raise no maximum
    amax = padded.abs().amax(2, keepdim=True).clamp(min=LEAST_MAGNITUDE)
    scales = amax / amax.new_full((), largest)  # by a number, CUDA would multiply by its rounded reciprocal
    return (_rounded(padded / scales, scheme) * scales).view(num_rows, -1)[:, lead : lead + columns]


def _rounded(quotients: Tensor, scheme: QuantScheme) -> Tensor:
    """The nearest codes, as float32; NaN stays NaN."""
    largest = LARGEST[scheme.activations]
    quotients = quotients.clamp(-largest, largest)
    return quotients.to(torch.float8_e4m3fn).float() if scheme.activations == "e4m3" else quotients.round()


def _block(index: Tensor, block: int, start: int) -> Tensor:
    return torch.div(index + start % block, block, rounding_mode="floor") if block else torch.zeros_like(index)


def _chosen(tensor: Tensor, experts: Tensor | slice) -> Tensor:
    """The experts' parts of a tensor, of dtypes that indexing lacks, too."""
    if isinstance(experts, slice) or tensor.dtype.itemsize > 1:
        return tensor[experts]
    return tensor.view(torch.uint8)[experts].view(tensor.dtype)


def _spread(scales: Tensor, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, blocks of rows, blocks of columns] -> [E, len(row), len(column)]: of every element the scale of its block."""
    return scales.to(dtype)[:, row][:, :, column]
