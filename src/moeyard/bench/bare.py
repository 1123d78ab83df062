"""A counting sort with nothing around it: what a call from Python is measured against."""

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, error_model="numpy")
def counting_sort(ids: Any, block_size: int, sorted_token_ids: Any, expert_ids: Any, num_tokens_post_padded: Any,
                  expert_offsets: Any, expert_counts: Any, route_rows: Any) -> None:  # fmt: skip
    """Fills a layout's arrays from flat ids; ids outside [0, num_experts) are dropped."""
    n, num_experts = ids.size, expert_counts.size
    cursor = np.zeros(num_experts, np.int32)
    for i in range(n):
        expert = ids[i]
        if 0 <= expert < num_experts:
            cursor[expert] += 1
    slot = 0
    for expert in range(num_experts):
        count = cursor[expert]
        expert_counts[expert] = count
        expert_offsets[expert] = slot
        cursor[expert] = slot
        end = slot + (count + block_size - 1) // block_size * block_size
        sorted_token_ids[slot + count : end] = n
        expert_ids[slot // block_size : end // block_size] = expert
        slot = end
    expert_offsets[num_experts] = slot
    num_tokens_post_padded[0] = slot
    sorted_token_ids[slot:] = n
    expert_ids[slot // block_size :] = -1
    for i in range(n):
        expert = ids[i]
        if 0 <= expert < num_experts:
            slot = cursor[expert]
            cursor[expert] = slot + 1
            sorted_token_ids[slot] = i
            route_rows[i] = slot
        else:
            route_rows[i] = -1
