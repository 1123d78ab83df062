"""vLLM's plain router."""

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import ID_DTYPES


def fused_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
    scoring_func: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM's `fused_topk`: (topk_weights [T, topk] float32, topk_ids [T, topk], token_expert_indices [T, topk] int32).

    `indices_type` is int32 (also for None), int64 or uint32; token_expert_indices[t, k] is k * T + t. `hidden_states`
    is looked at for its number of tokens alone.
    """
    check_tokens(hidden_states, gating_output)
    routing = moeyard.route(gating_output, top_k=topk, scoring=scoring_func, renormalize=renormalize)
    own = torch.arange(routing.topk_ids.numel(), dtype=torch.int32, device=gating_output.device)
    indices = own.view(topk, -1).t().contiguous()
    return routing.topk_weights, as_indices(routing.topk_ids, indices_type), indices


def check_tokens(hidden_states: Tensor, gating_output: Tensor) -> None:
    """One row of logits per token."""
    if hidden_states.shape[0] != gating_output.shape[0]:
        raise ValueError(
            f"gating_output: expected {hidden_states.shape[0]} rows (as hidden_states has), "
            f"got {gating_output.shape[0]}"
        )


def as_indices(ids: Tensor, kind: torch.dtype | None) -> Tensor:
    """int32 ids in the dtype that a caller asks for; int32 for None."""
    if kind not in (None, *ID_DTYPES):
        raise TypeError(f"indices_type: expected int32, int64 or uint32, got {kind}")
    return ids.view(kind) if kind == torch.uint32 else ids.to(kind or torch.int32)
