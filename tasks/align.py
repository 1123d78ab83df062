"""Alignment as a workload for `assay judge`: 256 experts in blocks of 64. See align_cpu.toml and align_h200.toml."""

import numpy as np
import torch

from moeyard import Layout, moe_align_block_size


def align(topk_ids: torch.Tensor) -> Layout:
    """The Layout of 256 experts in blocks of 64."""
    return moe_align_block_size(topk_ids, num_experts=256, block_size=64)


def following(given: tuple[torch.Tensor], layout: Layout) -> tuple[torch.Tensor]:
    """The next call's ids: this call's, changed by what it gave, so that no call can be left out.

    Exclusive or with one number below 256 leaves the experts of a token different from each other.
    """
    return (given[0] ^ (layout.sorted_token_ids[:1] & 255),)


def of_numbers(topk_ids: np.ndarray, num_experts: int, block_size: int) -> Layout:  # type: ignore[type-arg]
    """The Layout of ids that come as numbers, in any range: for the task's property."""
    ids = torch.from_numpy(topk_ids)
    return moe_align_block_size(ids, num_experts=num_experts, block_size=block_size)
