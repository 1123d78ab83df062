"""The operator that the wrapper calls, from the library that build_ops.py made of this tree's CUDA source."""

from pathlib import Path

import torch

torch.ops.load_library(str(Path(__file__).resolve().parents[1] / "build" / "seed_ops.so"))


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> None:
    """Writes the layout into the last three arguments."""
    torch.ops._moe_C.moe_align_block_size(
        topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad
    )
