"""The specification of quantised experts: what weights mean, and how the rows that they meet are quantised."""

from typing import NamedTuple

import torch
from torch import Tensor

from moeyard.quant import LARGEST, LEAST_MAGNITUDE, QuantScheme, blocks_of
from moeyard.values import ExpertWeights

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of e2m1 by the lower three bits; bit 3 is the sign."""


def code_values(stored: Tensor, scheme: QuantScheme) -> Tensor:
    """What stored codes mean before any scale and zero point: [..., C / per_byte] -> [..., C] float64."""
    if scheme.weights == "e4m3":
        return stored.double()
    if scheme.weights == "int8":
        return stored.double()
    codes = torch.stack((stored & 15, stored >> 4), -1).flatten(-2).long()
    if scheme.weights == "int4":
        return codes.double()
    if scheme.weights == "e2m1":
        magnitudes = torch.tensor(E2M1, dtype=torch.float64)
        return torch.cat((magnitudes, -magnitudes))[codes]
    raise ValueError(f"scheme: expected codes that this specification knows, got {scheme.weights!r}")


def block_numbers(size: int, block: int, start: int = 0) -> Tensor:
    """[size] int64: the block of each row or column, the first of which is number `start` of a larger matrix."""
    return torch.zeros(size, dtype=torch.int64) if not block else (torch.arange(size) + start % block) // block


def dequantised(weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """w13 and w2 in float64: (code - zero point) * scale of its block * global scale, exactly."""
    both = [dequantised_expert(weights, expert) for expert in range(weights.num_local_experts)]
    w13, w2 = zip(*both, strict=True)
    return torch.stack(w13), torch.stack(w2)


def dequantised_expert(weights: ExpertWeights, expert: int) -> tuple[Tensor, Tensor]:
    """The two matrices of one expert in float64."""
    scheme, scales = weights.scheme, weights.scales
    if scheme is None or scales is None:
        return weights.w13[expert].double(), weights.w2[expert].double()
    rows, columns = scheme.block
    size, start = weights.intermediate_size, scales.block_start
    half = block_numbers(size, rows, start)
    both = (half, half + blocks_of(size, rows, start)) if weights.gated else (half,)
    first = torch.cat(both), block_numbers(weights.hidden_size, columns)
    second = block_numbers(weights.hidden_size, rows), block_numbers(size, columns, start)
    zero_points = [None if t is None else t[expert] for t in (scales.w13_zero_points, scales.w2_zero_points)]
    w13 = _scaled(weights.w13[expert], scheme, scales.w13[expert], zero_points[0], first)
    w2 = _scaled(weights.w2[expert], scheme, scales.w2[expert], zero_points[1], second)
    if scales.w13_global is not None and scales.w2_global is not None:
        w13 = w13 * scales.w13_global[expert].double().repeat_interleave(size).unsqueeze(1)
        w2 = w2 * scales.w2_global[expert].double()
    return w13, w2


def _scaled(
    stored: Tensor, scheme: QuantScheme, scales: Tensor, zero_points: Tensor | None, blocks: tuple[Tensor, Tensor]
) -> Tensor:
    row, column = blocks[0].unsqueeze(1), blocks[1]
    values = code_values(stored, scheme)
    if scheme.weights == "int4":
        values = values - (8 if zero_points is None else zero_points.double()[row, column])
    return values * scales.double()[row, column]


class QuantisedRows(NamedTuple):
    """Rows as a scheme quantises them."""

    values: Tensor
    """[R, C] float64: code times scale."""
    codes: Tensor
    """[R, C], float8_e4m3fn or int8."""
    scales: Tensor
    """[R, groups] float32."""


def quantise_rows(
    rows: Tensor, scheme: QuantScheme, static_scale: Tensor | None = None, start: int = 0
) -> QuantisedRows:
    """Quantises rows [R, C] of a float dtype, in float32, as a scheme quantises activations.

    A scale is max(largest magnitude, 1e-10) / largest code over a row or group, or `static_scale`, a float32 number for
    all rows. Column 0 is number `start` of a larger matrix, in which groups begin at multiples of their size. value /
    scale is rounded to the nearest code, ties to even, and saturated. What an infinity or NaN makes of its group: with
    a dynamic scale, NaN. With a static one infinities saturate; a NaN stays one in e4m3 and makes its row NaN in int8.
    """
    largest = LARGEST[scheme.activations]
    num_rows, columns = rows.shape
    wide, group = rows.float(), block_numbers(columns, scheme.activation_group, start)
    num_groups = int(group[-1]) + 1 if columns else 1
    scales = torch.empty(num_rows, num_groups, dtype=torch.float32)
    for i in range(num_groups):
        part = wide[:, group == i]
        if static_scale is not None:
            scales[:, i] = static_scale.float()
        else:
            amax = part.abs().amax(1) if part.numel() else part.new_zeros(num_rows)
            scales[:, i] = amax.clamp(min=LEAST_MAGNITUDE) / torch.tensor(largest)
    quotients = (wide / scales[:, group]).clamp(-largest, largest)
    if scheme.activations == "e4m3":
        codes = quotients.to(torch.float8_e4m3fn)
    else:
        scales = (
            scales.masked_fill(wide.isnan().any(1, keepdim=True), torch.nan) if static_scale is not None else scales
        )
        codes = quotients.nan_to_num(0.0).round().to(torch.int8)
    return QuantisedRows(codes.double() * scales.double()[:, group], codes, scales)


def _has_nan(rows: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """[R, groups] bool."""
    return torch.stack([rows[:, group == i].isnan().any(1) for i in range(num_groups)], 1)
