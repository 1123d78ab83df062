"""What trainers add to keep experts in even use: two auxiliary losses, and DeepSeek's update of the selection bias."""

import torch
from torch import Tensor

from moeyard.dispatch.checks import FLOATS, ID_DTYPES, check_int, check_number, check_shape, check_tensor
from moeyard.dispatch.ids import local_expert_ids, narrow_ids
from moeyard.values import MAX_EXPERTS


def load_balancing_loss(router_logits: Tensor, topk_ids: Tensor, *, scoring: str = "softmax") -> Tensor:
    """The loss that is least where every expert gets as many routes: num_experts * sum over experts of f * p.

    Args:
        router_logits: [num_tokens, num_experts] float32, bfloat16, float16 or float64.
        topk_ids: [num_tokens, top_k] int32, int64 or uint32, as in `Routing`. A token all of whose ids are outside
            [0, num_experts), as padding has, counts for nothing.
        scoring: "softmax" or "sigmoid", whose scores are divided by their sum over experts.

    f is an expert's share of the routes, p its mean score over tokens. Even use gives 1, whatever top_k is.
    Returns a scalar, float32 (of float64 logits: float64); 0 without tokens. Gradients flow to the logits through p; f
    is constant. Raises TypeError or ValueError naming the argument. Source: Fedus, Zoph and Shazeer, Switch
    Transformers, arXiv:2101.03961, equation 4; sigmoid scores as in DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """
    check_tensor("router_logits", router_logits, dtypes=FLOATS, ndim=(2,))
    check_tensor("topk_ids", topk_ids, dtypes=ID_DTYPES, ndim=(2,), device=router_logits.device)
    num_tokens, num_experts = router_logits.shape
    check_int("router_logits.shape[1]", num_experts, low=1, high=MAX_EXPERTS)
    check_shape("topk_ids", topk_ids, (num_tokens, topk_ids.shape[1]), "the tokens of router_logits")
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring: expected 'softmax' or 'sigmoid', got {scoring!r}")
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    ids = local_expert_ids(narrow_ids(topk_ids), None, num_experts)
    shares = _counts(ids, num_experts).to(logits.dtype)
    shares = shares / shares.sum().clamp(min=1)
    if scoring == "softmax":
        scores = torch.softmax(logits, 1)
    else:
        scores = torch.sigmoid(logits)
        scores = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
    routed = (ids >= 0).any(1, keepdim=True)
    means = torch.where(routed, scores, 0).sum(0) / routed.sum().clamp(min=1)
    return num_experts * (shares * means).sum()


def router_z_loss(router_logits: Tensor, *, is_padding: Tensor | None = None) -> Tensor:
    """The mean over tokens of the squared logsumexp of their logits, which keeps logits small.

    Args:
        router_logits: [num_tokens, num_experts] float32, bfloat16, float16 or float64.
        is_padding: [num_tokens] bool: tokens that do not count.

    Returns a scalar, float32 (of float64 logits: float64); 0 without tokens. Gradients flow to the logits. Raises
    TypeError or ValueError naming the argument. Source: Zoph et al., ST-MoE, arXiv:2202.08906, equation 5.
    """
    check_tensor("router_logits", router_logits, dtypes=FLOATS, ndim=(2,))
    check_int("router_logits.shape[1]", router_logits.shape[1], low=1, high=MAX_EXPERTS)
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    squares = torch.logsumexp(logits, 1).square()
    if is_padding is None:
        return squares.sum() / max(1, squares.shape[0])
    check_tensor("is_padding", is_padding, dtypes=(torch.bool,), ndim=(1,), device=router_logits.device)
    check_shape("is_padding", is_padding, tuple(squares.shape), "one per token")
    return torch.where(is_padding, 0, squares).sum() / (~is_padding).sum().clamp(min=1)


@torch.no_grad()
def update_selection_bias(selection_bias: Tensor, topk_ids: Tensor, *, rate: float = 1e-3) -> Tensor:
    """Raises the bias of experts with fewer routes than the mean by `rate`, and lowers it of those with more, in place.

    Args:
        selection_bias: [num_experts] float32, the `selection_bias` of `route`; overwritten.
        topk_ids: [num_tokens, top_k] int32, int64 or uint32: all routes of the step that has ended. Ids outside
            [0, num_experts) do not count.
        rate: the size of a step.

    Returns `selection_bias`. Routes of several ranks have to be counted together: gather their ids first. Raises
    TypeError or ValueError naming the argument. Source: Wang et al., Auxiliary-Loss-Free Load Balancing,
    arXiv:2408.15664, algorithm 1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """
    check_tensor("selection_bias", selection_bias, dtypes=(torch.float32,), ndim=(1,))
    check_tensor("topk_ids", topk_ids, dtypes=ID_DTYPES, ndim=(2,), device=selection_bias.device)
    check_number("rate", rate)
    num_experts = selection_bias.shape[0]
    counts = _counts(local_expert_ids(narrow_ids(topk_ids), None, num_experts), num_experts)
    return selection_bias.add_(torch.sign(counts.sum() - num_experts * counts), alpha=rate)


def _counts(ids: Tensor, num_experts: int) -> Tensor:
    """[num_experts] int64: how many of ids have each value. Integers, so that no order matters."""
    ends = torch.arange(num_experts + 1, device=ids.device)
    return torch.searchsorted(ids.flatten().sort().values, ends).diff()
