"""vLLM's router with a selection bias, and DeepSeek-V4's choice by a table of token ids."""

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import SCORINGS, check_shape, check_tensor
from moeyard.integrations.vllm.router.fused_topk_router import as_indices, check_tokens


def fused_topk_bias(
    hidden_states: Tensor,
    gating_output: Tensor,
    scoring_func: str,
    e_score_correction_bias: Tensor | None,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
    input_tokens: Tensor | None = None,
    hash_indices_table: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """vLLM's `fused_topk_bias`: (topk_weights [T, topk] float32, topk_ids [T, topk]).

    Args:
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus" (DeepSeek-V4).
        e_score_correction_bias: [num_experts], added to the scores for the choice alone; None for none.
        indices_type: int32 (also for None), int64 or uint32.
        hash_indices_table: [vocabulary, topk] int32 or int64. Beside `input_tokens` [T] its rows are the choice, in
            their order; the bias is not read then. Ids must be those of experts.
    """
    check_tokens(hidden_states, gating_output)
    if hash_indices_table is None:
        bias = None if e_score_correction_bias is None else e_score_correction_bias.float()
        routing = moeyard.route(
            gating_output,
            top_k=topk,
            scoring=scoring_func,
            renormalize=renormalize,
            selection_bias=bias,
            routed_scaling_factor=routed_scaling_factor,
        )
        return routing.topk_weights, as_indices(routing.topk_ids, indices_type)
    integers = (torch.int32, torch.int64)
    check_tensor("hash_indices_table", hash_indices_table, dtypes=integers, ndim=(2,), device=gating_output.device)
    check_shape("hash_indices_table", hash_indices_table, (hash_indices_table.shape[0], topk), "topk")
    check_tensor("input_tokens", input_tokens, dtypes=integers, ndim=(1,), device=gating_output.device)
    assert input_tokens is not None
    check_shape("input_tokens", input_tokens, (gating_output.shape[0],), "one per token")
    ids = hash_indices_table[input_tokens.long()].long()
    weights = scores_of(gating_output, scoring_func).gather(1, ids)
    if renormalize:
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    return weights * routed_scaling_factor, as_indices(ids.int(), indices_type)


def scores_of(gating_output: Tensor, scoring_func: str) -> Tensor:
    """Float32 scores of logits [T, num_experts] as `moeyard.route` has them: what is not finite counts as 0."""
    logits = gating_output.float()
    if scoring_func not in SCORINGS:
        raise ValueError(f"scoring_func: expected one of {SCORINGS}, got {scoring_func!r}")
    if scoring_func == "softmax":
        scores = torch.softmax(logits, 1)
    elif scoring_func == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()
    return torch.where(scores.isfinite(), scores, 0)
