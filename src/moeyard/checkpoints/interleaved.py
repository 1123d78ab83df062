"""Weights as checkpoints hold them -> ExpertWeights, converted once, when a model is loaded."""

import torch
from torch import Tensor

from moeyard.dispatch.checks import FLOATS, check_shape, check_tensor
from moeyard.values import ExpertWeights


def experts_from_interleaved(
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_proj_bias: Tensor | None = None,
    down_proj_bias: Tensor | None = None,
    transposed: bool = True,
) -> ExpertWeights:
    """Weights whose gate and up rows take turns (gate 0, up 0, gate 1, ...), as gpt-oss stores them.

    Args:
        gate_up_proj: [experts, hidden_size, 2 * intermediate_size] if `transposed`, as transformers' gpt-oss has it,
            else [experts, 2 * intermediate_size, hidden_size], as vLLM has it once loaded.
        down_proj: [experts, intermediate_size, hidden_size] if `transposed`, else [experts, hidden_size,
            intermediate_size]; dtype of gate_up_proj.
        gate_up_proj_bias: [experts, 2 * intermediate_size] of that dtype, gate and up in turn.
        down_proj_bias: [experts, hidden_size] of that dtype.
        transposed: whether the products' columns are the last axis, not their rows.

    Returns new contiguous weights, gate half first; a bias of down_proj is passed on as it is. Raises TypeError or
    ValueError naming the argument. The activation that goes with them is `GPT_OSS_ACTIVATION`.
    """
    check_tensor("gate_up_proj", gate_up_proj, dtypes=FLOATS, ndim=(3,))
    dtypes, device = (gate_up_proj.dtype,), gate_up_proj.device
    check_tensor("down_proj", down_proj, dtypes=dtypes, ndim=(3,), device=device)
    rows = gate_up_proj.transpose(1, 2) if transposed else gate_up_proj
    second = down_proj.transpose(1, 2) if transposed else down_proj
    experts, both, hidden_size = rows.shape
    if both % 2:
        raise ValueError(f"gate_up_proj: expected an even number of gate and up rows, got {both}")
    if tuple(second.shape) != (experts, hidden_size, both // 2):
        wanted = (experts, both // 2, hidden_size) if transposed else (experts, hidden_size, both // 2)
        raise ValueError(f"down_proj: expected shape {wanted} (that of gate_up_proj), got {tuple(down_proj.shape)}")
    if gate_up_proj_bias is not None:
        check_tensor("gate_up_proj_bias", gate_up_proj_bias, dtypes=dtypes, ndim=(2,), device=device)
        check_shape("gate_up_proj_bias", gate_up_proj_bias, (experts, both), "one row per expert")
    if down_proj_bias is not None:
        check_tensor("down_proj_bias", down_proj_bias, dtypes=dtypes, ndim=(2,), device=device)
        check_shape("down_proj_bias", down_proj_bias, (experts, hidden_size), "one row per expert")
    first = torch.cat((rows[:, 0::2], rows[:, 1::2]), 1)
    bias = None if gate_up_proj_bias is None else torch.cat((gate_up_proj_bias[:, 0::2], gate_up_proj_bias[:, 1::2]), 1)
    return ExpertWeights(first.contiguous(), second.contiguous(), bias, down_proj_bias)
