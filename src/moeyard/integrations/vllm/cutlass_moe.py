"""vLLM's CUTLASS names: experts of fp8."""

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import check_flag, check_out, check_tensor
from moeyard.integrations.vllm.activation import activation_of
from moeyard.integrations.vllm.batched_experts import OUT_DTYPES, rows_of, run_batched
from moeyard.integrations.vllm.config import FusedMoEQuantConfig
from moeyard.integrations.vllm.fused_moe import experts_in_all, fused_experts
from moeyard.integrations.vllm.weights import expert_weights

E4M3 = torch.float8_e4m3fn


def cutlass_moe_fp8(
    a: Tensor,
    w1_q: Tensor,
    w2_q: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    ab_strides1: Tensor | None,
    ab_strides2: Tensor | None,
    c_strides1: Tensor | None,
    c_strides2: Tensor | None,
    quant_config: object,
    activation: object = "silu",
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
) -> Tensor:
    """vLLM's `cutlass_moe_fp8`, in the form of its last releases that had one (0.11): `fused_experts` of fp8.

    `w1_q`, `w2_q` are float8_e4m3fn; `quant_config` quantises rows, too. The four strides are accepted for vLLM's
    callers and not read: tensors have their own. vLLM applies router weights twice with
    `apply_router_weight_on_input`; here they count once. Returns [T, H] of the dtype of `a`; errors as in
    `fused_experts`.
    """
    check_tensor("w1_q", w1_q, dtypes=(E4M3,), ndim=(3,))
    if getattr(quant_config, "quant_dtype", None) != E4M3:
        raise ValueError(f"quant_config.quant_dtype: expected {E4M3}, got {getattr(quant_config, 'quant_dtype', None)}")
    return fused_experts(
        a, w1_q, w2_q, topk_weights, topk_ids, activation, apply_router_weight_on_input, global_num_experts,
        expert_map, quant_config,
    )  # fmt: skip


def run_cutlass_moe_fp8(
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_ids: Tensor,
    activation: object,
    global_num_experts: int,
    expert_map: Tensor | None,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    a1q_scale: Tensor | None,
    a2_scale: Tensor | None,
    ab_strides1: Tensor | None,
    ab_strides2: Tensor | None,
    c_strides1: Tensor | None,
    c_strides2: Tensor | None,
    workspace13: Tensor | None,
    workspace2: Tensor | None,
    expert_num_tokens: Tensor | None,
    out_dtype: torch.dtype,
    per_act_token: bool,
    per_out_ch: bool,
    use_batched_format: bool,
    topk_weights: Tensor | None,
    permute_scratch: object = None,
) -> None:
    """vLLM's `run_cutlass_moe_fp8`: experts of fp8 whose rows are quantised already.

    Args:
        output: [T, H], batched [E, M, H], of `out_dtype`; overwritten.
        hidden_states: [T, H] float8_e4m3fn; batched [E, M, H], whose first `expert_num_tokens[e]` rows count.
        a1q_scale: float32. One, batched also [E, 1, 1]; with `per_act_token` [T, 1], batched [E, M, 1].
        a2_scale: one float32, beside a single `a1q_scale`; else the second product's rows have a scale each.
        topk_ids, topk_weights: [T, top_k], with `use_batched_format` not read. Weights multiply the results, so a
            caller who has multiplied the rows passes ones.
        per_out_ch: whether weights have a scale per row.

    Strides, workspaces and scratch are accepted for vLLM's callers and not read. Other arguments are those of
    `fused_experts`. Batched rows from `expert_num_tokens[e]` on give zeros. Codes under a single scale are multiplied
    as they are. With `per_act_token` rows are code times scale, rounded to `out_dtype`, and quantised again: codes
    stay where the largest of a row is 448, as in rows of `out_dtype` that were quantised per token. vLLM's own kernel
    has no scale below 1 / (448 * 512); rows below 1 / 512 get a finer one here.
    """
    for name, value in (("per_act_token", per_act_token), ("use_batched_format", use_batched_format)):
        check_flag(name, value)
    if use_batched_format != (expert_num_tokens is not None):
        wanted = "a tensor" if use_batched_format else "None"
        got = "None" if expert_num_tokens is None else "a tensor"
        raise ValueError(f"expert_num_tokens: expected {wanted} for use_batched_format={use_batched_format}, got {got}")
    check_tensor("hidden_states", hidden_states, dtypes=(E4M3,), ndim=(3 if use_batched_format else 2,))
    check_tensor("w1", w1, dtypes=(E4M3,), ndim=(3,), device=hidden_states.device)
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype: expected one of {OUT_DTYPES}, got {out_dtype}")
    check_out("output", output, tuple(hidden_states.shape), out_dtype, hidden_states.device)
    act, gated = activation_of(activation)
    config = FusedMoEQuantConfig(E4M3, per_act_token, per_out_ch, None, w1_scale, w2_scale, None, a2_scale)
    rows, row_scale = rows_of(hidden_states, a1q_scale, out_dtype, config, w1.shape[0])
    weights = expert_weights(w1, w2, config, out_dtype, gated=gated, row_scale=row_scale, prefix="")
    if expert_num_tokens is not None:
        run_batched(rows, expert_num_tokens, weights, act, output)
        return
    check_tensor("topk_weights", topk_weights, ndim=(2,), device=hidden_states.device)
    assert topk_weights is not None
    moeyard.fused_experts(
        rows,
        moeyard.Routing(topk_weights.float(), topk_ids),
        weights,
        activation=act,
        num_experts=None if expert_map is not None else experts_in_all(global_num_experts, w1.shape[0], None),
        expert_map=expert_map,
        out=output,
    )
