"""vLLM's small helpers around experts."""

from torch import Tensor

import moeyard
from moeyard.dispatch.checks import check_int


def count_expert_num_tokens(topk_ids: Tensor, num_local_experts: int, expert_map: Tensor | None) -> Tensor:
    """vLLM's `count_expert_num_tokens`: routes per local expert, [num_local_experts] int32.

    `topk_ids` are int32, int64 or uint32 of any shape; with `expert_map` [num_experts] int32 they are global ids. Ids
    out of range count nowhere.
    """
    check_int("num_local_experts", num_local_experts, low=1)
    experts = num_local_experts if expert_map is None else expert_map.shape[0]
    layout = moeyard.moe_align_block_size(
        topk_ids.reshape(-1),
        num_experts=experts,
        block_size=1,
        expert_map=expert_map,
        num_local_experts=num_local_experts,
    )
    return layout.expert_counts
