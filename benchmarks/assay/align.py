"""Alignment as a workload for `assay ab`: random tokens' routes, on the CPU or, with CUDA tensors, on the GPU.

W=benchmarks/assay/align.py
assay ab A B --call $W:align --inputs $W:cpu
assay ab A B --call $W:align --inputs $W:cuda --clock cuda --graph --links 50
"""

import torch

from moeyard import Layout, moe_align_block_size


def align(topk_ids: torch.Tensor) -> Layout:
    """The Layout of 256 experts in blocks of 64."""
    return moe_align_block_size(topk_ids, num_experts=256, block_size=64)


def _ids(seed: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(tokens, 256, generator=generator)
    return logits.topk(8, dim=1).indices.to(torch.int32)


def cpu(seed: int) -> tuple[torch.Tensor]:
    """65536 tokens: some milliseconds."""
    return (_ids(seed, 65536),)


def cuda(seed: int) -> tuple[torch.Tensor]:
    """4096 tokens: some microseconds."""
    return (_ids(seed, 4096).cuda(),)
