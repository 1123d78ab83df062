"""vLLM's routers with groups of experts."""

from torch import Tensor

import moeyard
from moeyard.integrations.vllm.router.fused_topk_router import check_tokens


def grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """vLLM's `grouped_topk`: (topk_weights [T, topk] float32, topk_ids [T, topk] int32); no groups for 0."""
    check_tokens(hidden_states, gating_output)
    bias = None if e_score_correction_bias is None else e_score_correction_bias.float()
    routing = moeyard.route(
        gating_output,
        top_k=topk,
        scoring=scoring_func,
        renormalize=renormalize,
        selection_bias=bias,
        num_groups=num_expert_group or 1,
        top_k_groups=topk_group or 1,
        routed_scaling_factor=routed_scaling_factor,
    )
    return routing.topk_weights, routing.topk_ids


def fused_grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    e_score_correction_bias: Tensor,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """vLLM's `fused_grouped_topk`: `grouped_topk` with a bias, in its order of arguments."""
    return grouped_topk(
        hidden_states, gating_output, topk, renormalize, num_expert_group, topk_group, scoring_func,
        routed_scaling_factor, e_score_correction_bias,
    )  # fmt: skip
