"""Random layers of experts, and what one writes for them in plain torch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moeyard.testing.routings import ROUTINGS
from moeyard.values import Activation, ExpertWeights, Routing


def draw_weights(
    experts: int,
    hidden: int,
    size: int,
    dtype: torch.dtype,
    *,
    gated: bool = True,
    bias: bool = False,
    device: torch.device | str = "cpu",
) -> ExpertWeights:
    """Normal weights that keep rows near 1: w13 [experts, size * (1 + gated), hidden], w2 [experts, hidden, size]."""
    wide = size * (1 + gated)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    return ExpertWeights(
        (draw(experts, wide, hidden) / max(hidden, 1) ** 0.5).to(dtype),
        (draw(experts, hidden, size) / max(size, 1) ** 0.5).to(dtype),
        draw(experts, wide).to(dtype) if bias else None,
        draw(experts, hidden).to(dtype) if bias else None,
        gated,
    )


def draw_routing(
    tokens: int, experts: int, top_k: int, name: str = "dropped", *, device: torch.device | str = "cpu"
) -> Routing:
    """Ids of one of `ROUTINGS`, a function of torch's initial seed, with weights between 0 and 1."""
    ids = torch.empty(0, top_k, dtype=torch.int32)
    if tokens:
        ids = ROUTINGS[name](tokens, experts, top_k, torch.Generator().manual_seed(torch.initial_seed() % 2**31))
    return Routing(torch.rand(tokens, top_k, device=device), ids.to(device))


def wide_weights(weights: ExpertWeights) -> ExpertWeights:
    """The same weights in float64."""

    def wide(tensor: Any) -> Any:
        return None if tensor is None else tensor.double()

    return ExpertWeights(
        wide(weights.w13), wide(weights.w2), wide(weights.w13_bias), wide(weights.w2_bias), weights.gated
    )


def plain_activation(rows: Tensor, activation: Activation, gated: bool) -> Tensor:
    """An activation at the dtype of its rows: [rows, 2 * size] if gated, gate half first, else [rows, size]."""
    gate, up = rows.chunk(2, 1) if gated else (rows, None)
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = None if up is None else up.clamp(-activation.limit, activation.limit)
    if activation.name == "silu":
        gate = gate * torch.sigmoid(gate * activation.alpha)
    elif activation.name == "relu2":
        gate = functional.relu(gate).square()
    else:
        gate = functional.gelu(gate, approximate="tanh" if activation.name == "gelu_tanh" else "none")
    return gate if up is None else gate * (up + activation.beta)


def plain_experts(
    hidden: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    activation: Activation | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What one writes without a library, [tokens, hidden_size]: a loop over experts; ids out of range are dropped.

    It computes at `dtype`, that of the rows unless given: in float64 it is the answer that others are held against.
    """
    kind = dtype or hidden.dtype
    result = torch.zeros(hidden.shape, dtype=kind, device=hidden.device)
    for expert in range(weights.num_local_experts):
        token, k = torch.where(routing.topk_ids == expert)
        if not len(token):
            continue
        w13, b13, w2, b2 = (
            None if tensor is None else tensor[expert].to(kind)
            for tensor in (weights.w13, weights.w13_bias, weights.w2, weights.w2_bias)
        )
        assert w13 is not None and w2 is not None
        rows = functional.linear(hidden[token].to(kind), w13, b13)
        rows = plain_activation(rows, activation or Activation(), weights.gated)
        rows = functional.linear(rows, w2, b2)
        result.index_add_(0, token, (rows * routing.topk_weights[token, k, None]).to(kind))
    return result
