"""vLLM's alignment over the sizes of its own benchmark, through its wrapper, fills included."""

import torch
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

Layout = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def align(ids: dict[str, list[torch.Tensor]]) -> list[Layout]:
    """A layout in blocks of 256 for each tensor of ids; the keys are numbers of experts."""
    return [moe_align_block_size(one, 256, int(experts)) for experts, several in ids.items() for one in several]
