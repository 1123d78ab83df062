"""Inputs of the alignment workloads, in a file of their own: no process that is judged may read it."""

import torch


def _ids(seed: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(tokens, 256, generator=generator)
    return logits.topk(8, dim=1).indices.to(torch.int32)


def cpu(seed: int) -> tuple[torch.Tensor]:
    """2048 tokens of 8 experts each: what a core's own caches hold, so that processes differ little."""
    return (_ids(seed, 2048),)


def cuda(seed: int) -> tuple[torch.Tensor]:
    """4096 tokens of 8 experts each, on the GPU."""
    return (_ids(seed, 4096).cuda(),)
