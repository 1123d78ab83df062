"""Activations in plain PyTorch: what `torch` computes, and what gradients of gradients go through."""

import torch
from torch import Tensor

from moeyard.values import Activation


def activated(rows: Tensor, gated: bool, activation: Activation) -> Tensor:
    """[num_rows, size] in float32 (float64 rows: in float64); gated rows are [num_rows, 2 * size], gate half first."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    gate, up = wide.chunk(2, dim=1) if gated else (wide, None)
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = None if up is None else up.clamp(-activation.limit, activation.limit)
    if activation.name == "silu":
        level = gate * torch.sigmoid(activation.alpha * gate)
    elif activation.name == "relu2":
        level = torch.relu(gate).square()
    else:
        level = torch.nn.functional.gelu(gate, approximate="tanh" if activation.name == "gelu_tanh" else "none")
    return level if up is None else level * (up + activation.beta)
