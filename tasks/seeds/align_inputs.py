"""Ids for align.py: those of benchmark_moe_align_block_size.py, different experts for each token, all as likely."""

import torch

EXPERTS, TOP_K = (16, 64, 224, 256, 280, 512), (1, 2, 8)


def _ids(seed: int, tokens: tuple[int, ...]) -> tuple[dict[str, list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[torch.Tensor]] = {}
    for experts in EXPERTS:
        drawn = [
            torch.rand(count, experts, generator=generator).topk(top_k, dim=1).indices.to(torch.int32).cuda()
            for count in tokens
            for top_k in TOP_K
        ]
        found[str(experts)] = drawn
    return (found,)


def few(seed: int) -> tuple[dict[str, list[torch.Tensor]]]:
    """1 and 16 tokens."""
    return _ids(seed, (1, 16))


def many(seed: int) -> tuple[dict[str, list[torch.Tensor]]]:
    """256 and 4096 tokens."""
    return _ids(seed, (256, 4096))
