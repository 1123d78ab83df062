"""The specification of what backward passes are made of: in float64, row by row."""

import torch
from torch import Tensor

from moeyard.reference.experts import activate
from moeyard.reference.layout import host
from moeyard.values import Activation, Segments, WeightedGradients


def activate_backward(rows: Tensor, grad: Tensor, activation: Activation, *, gated: bool = True) -> Tensor:
    """[R, 2I] and [R, I] -> [R, 2I] (without a gate [R, I] -> [R, I]), in float64, rounded once."""
    wide, grad = rows.double(), grad.double()
    gate, up = wide.chunk(2, dim=1) if gated else (wide, torch.ones_like(wide))
    passes, through = torch.ones_like(gate), torch.ones_like(up)
    if activation.limit is not None:
        passes, through = (gate <= activation.limit).double(), (up.abs() <= activation.limit).double()
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit) if gated else up
    if activation.name == "silu":
        share = 1 / (1 + (-activation.alpha * gate).exp())
        level, slope = gate * share, share + activation.alpha * gate * share * (1 - share)
    elif activation.name == "gelu":
        share = (1 + torch.erf(gate / 2**0.5)) / 2
        level, slope = gate * share, share + gate * (-(gate**2) / 2).exp() / (2 * torch.pi) ** 0.5
    elif activation.name == "gelu_tanh":
        curve = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
        steep = (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * gate**2)
        level, slope = gate * (1 + curve) / 2, (1 + curve) / 2 + gate * (1 - curve**2) * steep / 2
    else:
        level, slope = gate.clamp(min=0) ** 2, 2 * gate.clamp(min=0)
    if not gated:
        return (grad * slope * passes).to(rows.dtype)
    halves = grad * slope * passes * (up + activation.beta), grad * level * through
    return torch.cat(halves, 1).to(rows.dtype)


def activate_backward_launch(rows: Tensor, grad: Tensor, activation: Activation, *, gated: bool, out: Tensor) -> None:
    out.copy_(activate_backward(rows.detach().cpu(), grad.detach().cpu(), activation, gated=gated))


def weighted_activate_backward(
    rows: Tensor, grad: Tensor, factors: Tensor | None, activation: Activation, *, gated: bool = True
) -> WeightedGradients:
    """Gradients and value of `factors * activate(rows)`, in float64, each rounded once."""
    wide, grad = rows.double(), grad.double()
    column = torch.ones(rows.shape[0], 1, dtype=torch.float64) if factors is None else factors.double().reshape(-1, 1)
    level = activate(wide, activation, gated=gated)
    of_rows = activate_backward(wide, grad * column, activation, gated=gated)
    dots = (level * grad).sum(1).to(torch.promote_types(rows.dtype, torch.float32))
    return WeightedGradients(of_rows.to(rows.dtype), (level * column).to(rows.dtype), dots)


def weighted_activate_backward_launch(
    rows: Tensor, grad: Tensor, factors: Tensor | None, activation: Activation, *, gated: bool, out: WeightedGradients
) -> None:
    given = (rows.detach().cpu(), grad.detach().cpu(), None if factors is None else factors.detach().cpu())
    for mine, found in zip(out, weighted_activate_backward(*given, activation, gated=gated), strict=True):
        mine.copy_(found)


def grouped_outer_launch(grads: Tensor, rows: Tensor, segments: Segments, row_divisor: int, *, out: Tensor) -> None:
    """Per expert the sum of outer products over its rows, one by one."""
    grads, rows, slots = grads.detach().cpu().double(), rows.detach().cpu().double(), host(segments.slots)
    total = torch.zeros(out.shape, dtype=torch.float64)
    firsts, counts = segments.first_rows.tolist(), segments.row_counts.tolist()
    for expert, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        for slot in range(first, first + count):
            entry = slot if slots is None else int(slots[slot])
            total[expert] += torch.outer(grads[entry // segments.divisor], rows[entry // row_divisor])
    out.copy_(total)
