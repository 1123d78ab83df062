"""vLLM's experts behind its modular kernel: a call of `TritonExperts.apply`, computed by moeyard."""

from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import check_out, check_tensor
from moeyard.integrations.vllm.activation import activation_of, parametrised
from moeyard.integrations.vllm.batched_experts import rows_of
from moeyard.integrations.vllm.fused_moe import experts_in_all
from moeyard.integrations.vllm.weights import expert_weights

_KEYS = ("clamp_limit", "alpha", "beta")


def activation_of_layer(activation: object, quant_config: object, config: object) -> tuple[moeyard.Activation, bool]:
    """(activation, whether there is a gate) of a layer, whose `activation_config` counts where it has one."""
    if config is None:
        return activation_of(activation, quant_config)
    limit, alpha, beta = (getattr(config, key, None) for key in _KEYS)
    name = str(getattr(activation, "value", activation))
    if name != "swigluoai_uninterleave":
        alpha = beta = None  # vLLM's other activations do not read them
        limit = limit if name == "silu" else None
    activation_of(activation)  # refuses what is no activation of ours
    return parametrised(name, limit, alpha, beta, tuple(f"activation_config.{key}" for key in _KEYS))


def apply_experts(
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: object,
    global_num_experts: int,
    expert_map: Tensor | None,
    a1q_scale: Tensor | None,
    apply_router_weight_on_input: bool,
    quant_config: object,
    activation_config: object = None,
) -> None:
    """Computes a layer of experts into `output` [T, H].

    Args:
        hidden_states: [T, H], of the dtype of `output`; or codes of the dtype of `w1` with their `a1q_scale`, which
            meet the weights as in `run_cutlass_moe_fp8`.
        apply_router_weight_on_input: True says that the caller has multiplied the rows already.
        quant_config, activation_config: of the layer.
        The others: as in `fused_experts`.
    """
    act, gated = activation_of_layer(activation, quant_config, activation_config)
    check_out("output", output, tuple(hidden_states.shape), output.dtype, hidden_states.device)
    rows, row_scale = hidden_states, None
    if hidden_states.dtype.itemsize == 1:
        check_tensor("hidden_states", hidden_states, dtypes=(w1.dtype,))
        rows, row_scale = rows_of(hidden_states, a1q_scale, output.dtype, quant_config, w1.shape[0])
    weights = expert_weights(w1, w2, quant_config, rows.dtype, gated=gated, row_scale=row_scale)
    factors = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
    moeyard.fused_experts(
        rows,
        moeyard.Routing(factors.float(), topk_ids),
        weights,
        activation=act,
        num_experts=experts_in_all(global_num_experts, weights.num_local_experts, expert_map),
        expert_map=expert_map,
        out=output,
    )


class TritonExperts:
    """vLLM's `TritonExperts`, as far as a caller of `apply` needs it: standard format, no LoRA."""

    def __init__(self, moe_config: object = None, quant_config: object = None) -> None:
        self.moe_config, self.quant_config = moe_config, quant_config

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: object,
        activation: object,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of (workspace13, workspace2, output): moeyard takes its own memory, so the first two are empty."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: object,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Any,
        workspace2: Any,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """vLLM's `apply`: the layer's output [T, H], weighted and summed. See `apply_experts`.

        `a2_scale` is that of the `quant_config` in any case. Workspaces and `expert_tokens_meta` are not read.
        """
        apply_experts(
            output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
            a1q_scale, apply_router_weight_on_input, self.quant_config,
        )  # fmt: skip
