"""vLLM's CUTLASS layer, taken by moeyard's: the arguments of #20762, fp8 codes per output channel and per token."""

import torch

from moeyard import ExpertScales, ExpertWeights, Routing, fused_experts
from moeyard.quant import FP8_CHANNEL


def cutlass_moe_fp8(
    a: torch.Tensor,
    w1_q: torch.Tensor,
    w2_q: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    per_act_token: bool | None = None,
) -> torch.Tensor:
    """The layer's output [T, hidden], of the dtype of `a`. ValueError if rows are not quantised per token."""
    if not per_act_token:
        raise ValueError(f"per_act_token: expected True, got {per_act_token}")
    weights = ExpertWeights(w1_q, w2_q, scheme=FP8_CHANNEL, scales=ExpertScales(w1_scale, w2_scale))
    return fused_experts(a, Routing(topk_weights, topk_ids), weights)
