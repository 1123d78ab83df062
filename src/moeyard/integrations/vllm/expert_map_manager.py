"""vLLM's share of the experts of a rank."""

import torch
from torch import Tensor

from moeyard.dispatch.checks import check_int

_STRATEGIES = ("linear", "round_robin")


def determine_expert_map(
    ep_size: int,
    ep_rank: int,
    global_num_experts: int,
    expert_placement_strategy: str = "linear",
    num_fused_shared_experts: int = 0,
    return_expert_mask: bool = False,
) -> tuple[int, Tensor | None, Tensor | None]:
    """vLLM's `determine_expert_map`: which experts rank `ep_rank` of `ep_size` has.

    Args:
        expert_placement_strategy: "linear" (consecutive experts) or "round_robin" (every `ep_size`-th one). Either way
            the first `global_num_experts % ep_size` ranks have one expert more.
        num_fused_shared_experts, return_expert_mask: for AITER's kernels on AMD GPUs; 0 and False here.

    Returns (num_local_experts, expert_map, None). The map is [global_num_experts] int32, -1 for experts of other ranks,
    on the CPU; None for one rank. Raises ValueError naming the argument.
    """
    check_int("ep_size", ep_size, low=1)
    check_int("ep_rank", ep_rank, low=0, high=ep_size - 1)
    check_int("global_num_experts", global_num_experts, low=1)
    if expert_placement_strategy not in _STRATEGIES:
        raise ValueError(f"expert_placement_strategy: expected one of {_STRATEGIES}, got {expert_placement_strategy!r}")
    if num_fused_shared_experts or return_expert_mask:
        name = "return_expert_mask" if return_expert_mask else "num_fused_shared_experts"
        value = return_expert_mask or num_fused_shared_experts
        raise ValueError(f"{name}: expected {type(value)()} (AITER's masks are not made), got {value}")
    if ep_size == 1:
        return global_num_experts, None, None
    fewest, more = divmod(global_num_experts, ep_size)
    count = fewest + (ep_rank < more)
    start, step = (ep_rank * fewest + min(ep_rank, more), 1), (ep_rank, ep_size)
    first, stride = start if expert_placement_strategy == "linear" else step
    expert_map = torch.full((global_num_experts,), -1, dtype=torch.int32)
    expert_map[first : first + count * stride : stride] = torch.arange(count, dtype=torch.int32)
    return count, expert_map, None
