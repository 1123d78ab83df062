"""Expert ids as the operators take them: cast first, then mapped to local experts, -1 where dropped."""

import torch
from torch import Tensor

from moeyard.values import INT32_MAX


def narrow_ids(topk_ids: Tensor) -> Tensor:
    """uint32 ids as int32 of the same bits: ids of 2^31 and above turn negative, hence dropped."""
    return topk_ids.view(torch.int32) if topk_ids.dtype == torch.uint32 else topk_ids


def local_expert_ids(
    topk_ids: Tensor, expert_map: Tensor | None, num_experts: int = INT32_MAX, num_local_experts: int = INT32_MAX
) -> Tensor:
    """int64 of the shape of int32 or int64 ids: the local expert of each route, -1 where it is dropped.

    Without `expert_map` an id is its own local expert; with it, ids of its length and above are dropped too.
    """
    if expert_map is not None:
        num_experts = min(num_experts, expert_map.shape[0])
    ids = topk_ids.long()
    valid = (ids >= 0) & (ids < num_experts)
    if expert_map is not None:
        ids = expert_map.long()[torch.where(valid, ids, 0)]
        valid = valid & (ids >= 0)
    return torch.where(valid & (ids < num_local_experts), ids, -1)
