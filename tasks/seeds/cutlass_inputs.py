"""Batches for cutlass.py: rows, router weights and ids of 1, 8, 64 and 512 tokens, and a scale for all their rows."""

import torch

TOKENS, EXPERTS, HIDDEN, TOP_K = (1, 8, 64, 512), 40, 1536, 8


def batches(seed: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Half-precision rows as the benchmark draws them; ids and weights are the softmax's largest."""
    generator = torch.Generator().manual_seed(seed)
    found, amax = [], torch.zeros(1)
    for tokens in TOKENS:
        rows = (torch.randn(tokens, HIDDEN, generator=generator) / 10).half()
        weights, ids = torch.randn(tokens, EXPERTS, generator=generator).softmax(1).topk(TOP_K, dim=1)
        found.append((rows.cuda(), weights.cuda(), ids.to(torch.int32).cuda()))
        amax = torch.maximum(amax, rows.abs().amax().float())
    return found, (amax / 448.0).cuda()
