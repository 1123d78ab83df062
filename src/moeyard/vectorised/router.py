"""Routers in whole tensors: scores, then the largest of keys that no two experts share."""

import torch
from torch import Tensor

from moeyard.values import MAX_EXPERTS, Router, Routing


def route_launch(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    is_padding: Tensor | None,
    router: Router,
    *,
    out: Routing,
) -> None:
    """Fills a routing from logits [T, E]."""
    num_tokens, num_experts = router_logits.shape
    if not num_tokens:
        return
    logits = router_logits.float()
    wide = logits.double() if router.renormalize else logits  # tiny scores have ratios, too: exp in float32 loses them
    if router.scoring == "softmax":
        scores = torch.softmax(wide, dim=1)
    elif router.scoring == "sigmoid":
        scores = torch.sigmoid(wide)
    else:
        scores = torch.logaddexp(wide, torch.zeros_like(wide)).sqrt()
    scores = torch.where(scores.isfinite(), scores, 0).float()
    if selection_bias is not None:
        keys = scores + selection_bias
    elif router.scoring == "softmax":  # a row without a value ranks all experts alike
        keys = torch.where(scores.sum(1, keepdim=True) > 0, logits, 0)
    else:
        keys = logits
    order = _distinct(keys)
    if router.num_groups > 1:
        num_groups = router.num_groups
        grouped = keys.view(num_tokens, num_groups, -1)
        if selection_bias is None:
            group_keys = _without_nan(grouped).amax(2)
        else:
            group_keys = torch.topk(_without_nan(grouped), min(2, grouped.shape[2]), dim=2).values.sum(2)
        kept = torch.topk(_distinct(group_keys), router.top_k_groups, dim=1).indices
        keep = torch.zeros_like(group_keys, dtype=torch.bool).scatter_(1, kept, True)
        order = order.masked_fill(~keep.repeat_interleave(num_experts // num_groups, dim=1), _LEAST)
    ids = torch.topk(order, router.top_k, dim=1).indices
    weights = scores.gather(1, ids)
    if router.renormalize:
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    weights = weights * router.routed_scaling_factor
    if is_padding is not None:
        padding = is_padding.unsqueeze(1)
        ids, weights = ids.masked_fill(padding, -1), weights.masked_fill(padding, 0)
    out.topk_weights.copy_(weights)
    out.topk_ids.copy_(ids)


_LEAST = -(2**63)


def _without_nan(keys: Tensor) -> Tensor:
    return torch.where(keys.isnan(), -torch.inf, keys)


def _distinct(keys: Tensor) -> Tensor:
    """int64 in the order of float32 keys [T, N]: of equal ones the first is the largest, NaN counts as -inf."""
    bits = (_without_nan(keys) + 0.0).view(torch.int32)  # adding 0 turns -0 into 0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = MAX_EXPERTS - 1 - torch.arange(keys.shape[1], device=keys.device)
    return ascending.long() * MAX_EXPERTS + last
