"""Experts in vLLM's batched format."""

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import check_shape, check_tensor
from moeyard.integrations.vllm.activation import activation_of
from moeyard.integrations.vllm.weights import expert_weights

OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of the results of rows that come as codes."""


def batched_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    expert_num_tokens: Tensor,
    activation: object = "silu",
    quant_config: object = None,
    a1q_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Experts in vLLM's batched format, in which its classes for dispatched tokens have them; nothing is weighted.

    Args:
        hidden_states: [E, M, H], of whose rows the first `expert_num_tokens[e]` count. float32, bfloat16 or float16;
            or codes of the dtype of `w1`, beside `a1q_scale`.
        expert_num_tokens: [E] int32; above M as M, below 0 as 0.
        quant_config: as in `fused_experts`.
        a1q_scale: float32 of codes. One or [E, 1, 1]; with `per_act_token_quant` [E, M, 1]; with `block_shape`
            [E, M, ceil(H / columns)]. Codes meet the weights as in `run_cutlass_moe_fp8`.
        out_dtype: of the result of codes.

    Returns [E, M, H], of the dtype of float rows; rows from `expert_num_tokens[e]` on are zero. What lies in such rows
    of `hidden_states` has no effect. Raises TypeError or ValueError naming the argument.
    """
    check_tensor("hidden_states", hidden_states, ndim=(3,))
    check_tensor("w1", w1, ndim=(3,), device=hidden_states.device)
    act, gated = activation_of(activation, quant_config)
    rows, row_scale = hidden_states, None
    if hidden_states.dtype.itemsize == 1:
        check_tensor("hidden_states", hidden_states, dtypes=(w1.dtype,))
        if out_dtype not in OUT_DTYPES:
            raise TypeError(f"out_dtype: expected one of {OUT_DTYPES}, got {out_dtype}")
        rows, row_scale = rows_of(hidden_states, a1q_scale, out_dtype, quant_config, w1.shape[0])
    elif a1q_scale is not None:
        raise ValueError(f"a1q_scale: expected None beside rows of {hidden_states.dtype}, got a tensor")
    weights = expert_weights(w1, w2, quant_config, rows.dtype, gated=gated, row_scale=row_scale)
    output = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    run_batched(rows, expert_num_tokens, weights, act, output)
    return output


def run_batched(
    rows: Tensor,
    expert_num_tokens: Tensor,
    weights: moeyard.ExpertWeights,
    activation: moeyard.Activation,
    output: Tensor,
) -> None:
    """Every row that counts has one route, to the expert whose it is."""
    experts, batch, hidden_size = rows.shape
    check_tensor("expert_num_tokens", expert_num_tokens, dtypes=(torch.int32,), ndim=(1,), device=rows.device)
    check_shape("expert_num_tokens", expert_num_tokens, (experts,), "one per expert of hidden_states")
    check_shape("hidden_states", rows, (weights.num_local_experts, batch, hidden_size), "the experts of w1")
    place = torch.arange(batch, dtype=torch.int32, device=rows.device)
    own = torch.arange(experts, dtype=torch.int32, device=rows.device).unsqueeze(1)
    ids = torch.where(place < expert_num_tokens.unsqueeze(1), own, -1).view(-1, 1)
    routing = moeyard.Routing(torch.ones(ids.shape, device=rows.device), ids)
    flat = rows.reshape(-1, hidden_size)
    moeyard.fused_experts(flat, routing, weights, activation=activation, out=output.view(-1, hidden_size))


def rows_of(
    codes: Tensor, scale: Tensor | None, out_dtype: torch.dtype, quant_config: object, experts: int
) -> tuple[Tensor, Tensor | None]:
    """(rows of `out_dtype`, a scale that is still to multiply them) of rows that come as codes."""
    check_tensor("a1q_scale", scale, dtypes=(torch.float32,), device=codes.device)
    assert scale is not None
    *leading, hidden_size = codes.shape
    block = getattr(quant_config, "block_shape", None)
    if block is None and not getattr(quant_config, "per_act_token_quant", False):
        shapes = {(experts, 1, 1)} if codes.dim() == 3 else set()
        if scale.numel() != 1 and tuple(scale.shape) not in shapes:
            more = "".join(f" or of shape {shape}" for shape in shapes)
            raise ValueError(f"a1q_scale: expected one scale{more}, got shape {tuple(scale.shape)}")
        return codes.to(out_dtype), scale
    columns = hidden_size if block is None else block[1]
    check_shape("a1q_scale", scale, (*leading, -(-hidden_size // columns)), "a scale per row and group of columns")
    factor = scale if block is None else scale.repeat_interleave(columns, -1)[..., :hidden_size]
    return (codes.float() * factor).to(out_dtype), None
