"""How far from float64 a layer of quantised experts may be: per row, from what its scheme and its sums round.

The answer by the rule of `QuantScheme` is computed in float64. Beside it goes what an honest implementation may miss it
by. Its sums round. So it knows what the activation leaves within bounds, and where a bound crosses the border between
two codes, it may take either. One more code of each route's row is granted on top. All norms are over a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moeyard.quant import QuantScheme
from moeyard.reference.experts import activate
from moeyard.reference.layout import local_experts
from moeyard.reference.quant import QuantisedRows, dequantised_expert, quantise_rows
from moeyard.values import Activation, ExpertWeights, Routing

FLOAT32_UNIT = 2.0**-24
"""What one float32 operation rounds, as a share of its result."""
_WALK = 4.0
"""Roundings of a sum of K terms are a random walk: at most this many times sqrt(K) units of the sum of magnitudes."""


class Judged(NamedTuple):
    """An answer in float64, and how far from it others may be."""

    wide: Tensor
    """[T, H] float64, not rounded."""
    budget: Tensor
    """[T] float64: the largest norm of a row's error."""

    def error(self, got: Tensor) -> str | None:
        """What is wrong with an answer [T, H] of a float dtype, in words; None if every row is within its budget.

        Elements that are NaN or infinite by the rule have to be it in the answer, too, and no others.
        """
        if got.shape != self.wide.shape:
            return f"shape {tuple(got.shape)}, not {tuple(self.wide.shape)}"
        found = got.detach().cpu().double()
        wide = self.wide.to(got.dtype).double()  # a result may be too large for its dtype
        strange = ~wide.isfinite()
        if not torch.equal(strange, ~found.isfinite()) or not torch.equal(wide.isnan(), found.isnan()):
            row = int((strange ^ ~found.isfinite()).any(1).int().argmax())
            return f"row {row}: NaN or infinity in other places than by the rule"
        error = (found - self.wide).masked_fill(strange, 0).norm(dim=1)
        budget = self.budget.nan_to_num(torch.inf, torch.inf)
        worst = (error / budget.clamp(min=1e-300)).argmax() if len(error) else 0
        if bool((error > budget).any()):
            return (
                f"row {int(worst)}: an error of {float(error[worst]):.3e} where {float(budget[worst]):.3e} is allowed"
            )
        return None


def judged_experts(
    hidden_states: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    *,
    activation: Activation | None = None,
    num_experts: int | None = None,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    unit: float = FLOAT32_UNIT,
    middle: float = 0.0,
) -> Judged:
    """The answer of `fused_experts` with its budget; CPU tensors, arguments as there.

    Args:
        unit: what an operation in a sum rounds, as a share of the sum of magnitudes: 2^-24 of float32; tensor cores
            align products of 8 bits to about 14 bits.
        middle: how far, as a share of it, what the activation leaves may be from what it is by the rule before it is
            rounded: 2^-8 for implementations that round gate and up to bfloat16.
    """
    curve, dtype = activation or Activation(), hidden_states.dtype
    count = num_experts or (weights.num_local_experts if expert_map is None else len(expert_map))
    local = torch.tensor(local_experts(routing.topk_ids, count, expert_map, weights.num_local_experts))
    local = local.view(routing.topk_ids.shape).long()
    wide = torch.zeros(hidden_states.shape, dtype=torch.float64)
    rounded, squares = torch.zeros_like(wide), torch.zeros(len(wide), dtype=torch.float64)
    for expert in torch.unique(local[local >= 0]).tolist():
        token, k = torch.where(local == expert)
        w13, w2 = dequantised_expert(weights, expert)
        factor = routing.topk_weights[token, k]
        rows = hidden_states[token]
        if apply_router_weight_on_input:
            rows, factor = (rows.float() * factor.unsqueeze(1)).to(dtype), torch.ones_like(factor)
        given = _operand(rows, weights, expert, second=False)
        before = given.values @ w13.T + _bias(weights.w13_bias, expert)
        unsure = unit * (_WALK * w13.shape[1] ** 0.5 * (given.values.abs() @ w13.abs().T) + before.abs())
        kept, bound = _activated(before, unsure, curve, weights.gated)
        bound = bound + middle * kept.abs()
        low, taken, high = (
            _operand((kept + sign * bound).to(dtype), weights, expert, second=True) for sign in (-1, 0, 1)
        )
        either = torch.maximum((high.values - taken.values).abs(), (taken.values - low.values).abs())
        column = w2.norm(dim=0)
        one_code = (_step(taken, weights.scheme, dtype) * column).amax(1) if len(column) else torch.zeros(len(token))
        sums = unit * _WALK * w2.shape[1] ** 0.5 * (taken.values.abs() @ w2.abs().T)
        square = (either * column).square().sum(1) + one_code.square() + sums.square().sum(1)
        result = taken.values @ w2.T + _bias(weights.w2_bias, expert)
        wide.index_add_(0, token, result * factor.double().unsqueeze(1))
        rounded.index_add_(0, token, (result * factor.double().unsqueeze(1)).abs())
        squares.index_add_(0, token, square * factor.double().square())
    rounding = 0.51 * _spacing(wide, dtype) + unit * routing.topk_ids.shape[1] * rounded
    return Judged(wide, (squares + rounding.square().sum(1)).sqrt())


def _bias(bias: Tensor | None, expert: int) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if bias is None else bias[expert].double()


def _operand(rows: Tensor, weights: ExpertWeights, expert: int, *, second: bool) -> QuantisedRows:
    """Rows of the dtype of the hidden states as they meet a matrix of an expert."""
    scheme, scales = weights.scheme, weights.scales
    if scheme is None or scales is None or scheme.activations == "none":
        return QuantisedRows(rows.double(), rows, torch.ones(len(rows), 1))
    static = scales.w2_input if second else scales.w13_input
    start = scales.block_start if second else 0
    return quantise_rows(rows, scheme, None if static is None else static[expert], start)


def _activated(before: Tensor, unsure: Tensor, activation: Activation, gated: bool) -> tuple[Tensor, Tensor]:
    """What the activation makes of [R, 2I] in float64, and how far that may be off where its input may be by `unsure`.

    Gate and up move together or apart; an exponential rounds, too. In gelu 1 + erf cancels and leaves the error of 1.
    """
    kept = activate(before, activation, gated=gated)
    gate, up = unsure.chunk(2, 1) if gated else (unsure, unsure[:, :0])
    off = torch.zeros_like(kept)
    for sign in (-1, 1):
        for other in (-1, 1):
            moved = activate(before + torch.cat((sign * gate, other * up), 1), activation, gated=gated)
            off = torch.maximum(off, (moved - kept).abs())
    cancelled = torch.zeros_like(kept)
    if activation.name in ("gelu", "gelu_tanh"):
        size = kept.shape[1]
        cancelled = before[:, :size].abs() * (before[:, size:].abs() + activation.beta if gated else 1)
    return kept, off + FLOAT32_UNIT * (16 * kept.abs() + 4 * cancelled)


def _spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far from a value the next one of a dtype is at most; that of subnormal numbers is fixed."""
    info = torch.finfo(dtype)
    return values.abs().clamp(min=info.smallest_normal) * info.eps


def _step(rows: QuantisedRows, scheme: QuantScheme | None, dtype: torch.dtype) -> Tensor:
    """[R, C]: how far the next code is from each element's."""
    kind = "none" if scheme is None else scheme.activations
    if kind == "none":
        return _spacing(rows.values, dtype)
    shares = (rows.values / rows.codes.double()).abs()  # the scale of each element, where its code is not 0
    scale = torch.where(rows.codes.double() == 0, rows.scales.double().amax(1, keepdim=True), shares)
    if kind == "int8":
        return scale
    return scale * torch.exp2(rows.codes.double().abs().clamp(min=2.0**-6).log2().floor() - 3)
