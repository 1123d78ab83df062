"""What backward passes are made of beyond the operators: sums of outer products, the derivative of activations."""

import math

import torch
from torch import Tensor

from moeyard.values import Activation, Segments, WeightedGradients
from moeyard.vectorised.experts import activate_launch


def activate_backward_launch(rows: Tensor, grad: Tensor, activation: Activation, *, gated: bool, out: Tensor) -> None:
    """In float32 (float64 rows: in float64), rounded once. Clamped values have a derivative of 0, a limit itself 1."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    given, grad = rows.to(wide), grad.to(wide)
    gate, up = given.chunk(2, dim=1) if gated else (given, None)
    bound = math.inf if activation.limit is None else activation.limit
    x = gate.clamp(max=bound)
    if activation.name == "silu":
        share = torch.sigmoid(activation.alpha * x)
        level, slope = x * share, share * (1 + activation.alpha * x * (1 - share))
    elif activation.name == "relu2":
        level, slope = torch.relu(x).square(), 2 * torch.relu(x)
    elif activation.name == "gelu":
        share = torch.erfc(-x * 2**-0.5) / 2
        level, slope = x * share, share + x * torch.exp(x * x / -2) * (2 * math.pi) ** -0.5
    else:
        first = (2 / math.pi) ** 0.5
        share = torch.sigmoid(2 * first * x * (1 + 0.044715 * x * x))
        steep = 2 * first * (1 + 3 * 0.044715 * x * x)
        level, slope = x * share, share + x * share * (1 - share) * steep
    slope = slope * (gate <= bound)
    if up is None:
        out.copy_(grad * slope)
        return
    first_half, second_half = out.chunk(2, dim=1)
    first_half.copy_(grad * slope * (up.clamp(-bound, bound) + activation.beta))
    second_half.copy_(grad * level * (up.abs() <= bound))


def weighted_activate_backward_launch(
    rows: Tensor, grad: Tensor, factors: Tensor | None, activation: Activation, *, gated: bool, out: WeightedGradients
) -> None:
    """In float32 (float64 rows: in float64), each result rounded once."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    level, given = rows.new_empty(grad.shape, dtype=wide), grad.to(wide)
    activate_launch(rows.to(wide), activation, gated=gated, out=level)
    column = None if factors is None else factors.reshape(-1, 1)
    torch.sum(level * given, 1, out=out.dots)
    out.weighted.copy_(level if column is None else level * column)
    activate_backward_launch(rows, given if column is None else given * column, activation, gated=gated, out=out.rows)


def grouped_outer_launch(grads: Tensor, rows: Tensor, segments: Segments, row_divisor: int, *, out: Tensor) -> None:
    """Per expert one product whose sums go over its rows, in float32 (float64 rows: in float64).

    A GPU has torch's grouped product for bfloat16 results of bfloat16 rows. Of other dtypes it multiplies every row
    once per expert, times zero where the row is of another: nothing is read back. That is right, and slow.
    """
    first_rows, row_counts, slots, divisor, *_ = segments
    num_entries = divisor * grads.shape[0]
    if not num_entries or not out.numel():
        out.zero_()
        return
    ends = torch.cumsum(row_counts.long(), 0)
    packed = torch.arange(num_entries, device=out.device)
    expert = torch.searchsorted(ends, packed, right=True).clamp(max=out.shape[0] - 1)
    held = packed < ends[-1]
    slot = torch.where(held, first_rows[expert] + packed - (ends - row_counts)[expert], 0)
    entry = slot if slots is None else slots[slot].long()
    entry = torch.where(held, entry, 0)
    wide = torch.promote_types(grads.dtype, torch.float32)
    left, right = grads[entry // divisor], rows[entry // row_divisor]
    kind = "cpu" if out.device.type == "meta" else out.device.type
    with torch.autocast(kind, enabled=False):
        if out.is_cpu:
            starts = ends - row_counts
            for one, start, end in zip(out, starts, ends, strict=True):
                mine, theirs = left[start:end].to(wide), right[start:end].to(wide)
                one.copy_(mine.t() @ theirs if theirs.shape[1] > 1 else (mine * theirs).sum(0).unsqueeze(1))
        elif _has_grouped_product(left, right, out):
            held = held.unsqueeze(1)
            left, right = left.masked_fill(~held, 0), right.masked_fill(~held, 0)
            out.copy_(torch.nn.functional.grouped_mm(left.t(), right, offs=ends.int()))
        else:
            for i, one in enumerate(out):
                mine = (held & (expert == i)).unsqueeze(1)
                one.copy_(torch.where(mine, left, 0).to(wide).t() @ torch.where(mine, right, 0).to(wide))


def _has_grouped_product(left: Tensor, right: Tensor, out: Tensor) -> bool:
    aligned = left.shape[1] % 8 == 0 and right.shape[1] % 8 == 0
    return left.is_cuda and left.dtype == out.dtype == torch.bfloat16 and aligned
