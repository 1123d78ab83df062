"""Compiles or loads ahead of time what first calls would otherwise wait for."""

import time
from collections.abc import Callable, Iterator

import torch

from moeyard import impls
from moeyard.combine import combine, moe_sum
from moeyard.layout import batched_moe_align_block_size, moe_align_block_size, moe_lora_align_block_size
from moeyard.permute import permute, shuffle_rows


def warmup(device: str | torch.device | None = None) -> dict[str, float]:
    """Makes one small call of every operator, so that its kernels are compiled, cached and loaded.

    Args:
        device: the device to warm up; the CPU, and CUDA where there is one, unless given.

    Returns the seconds that each "<op> <impl> <device>" took.
    """
    devices = [torch.device(device)] if device is not None else [torch.device("cpu")]
    if device is None and torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    seconds = {}
    for place in devices:
        for op, call in _calls(place):
            start = time.perf_counter()
            call()
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            seconds[f"{op} {impls.explain(op, place).chosen} {place}"] = time.perf_counter() - start
    return seconds


def _calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    ids = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32, device=device)
    expert_map = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    counts = torch.tensor([1, 0, 2], dtype=torch.int32, device=device)
    layout = moe_align_block_size(ids, num_experts=3, block_size=2)
    rows = torch.ones(layout.capacity, 8, dtype=torch.bfloat16, device=device)

    def align() -> None:
        # Each kernel of plan.py for up to 256 experts, one thread and several of the cpu kernels; maps are compiled for
        # small batches only, since kernels are many and each takes a compiler a good part of a second.
        for num_tokens in (1, 64, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288):
            for dtype in (torch.int32, torch.int64):
                some = torch.zeros(num_tokens, 1, dtype=dtype, device=device)
                for mapping in (None, expert_map) if num_tokens <= 64 else (None,):
                    moe_align_block_size(some, num_experts=3, block_size=2, expert_map=mapping)

    yield "moe_align_block_size", align
    yield (
        "batched_moe_align_block_size",
        lambda: batched_moe_align_block_size(counts, max_num_tokens=2, block_size=2),
    )
    yield (
        "moe_lora_align_block_size",
        lambda: moe_lora_align_block_size(ids, counts[:2], num_experts=3, block_size=2, max_loras=1),
    )
    yield "permute", lambda: permute(rows[:2], layout)
    yield "shuffle_rows", lambda: shuffle_rows(rows, counts)
    yield "combine", lambda: combine(rows, layout)
    yield "moe_sum", lambda: moe_sum(rows[:2].view(1, 2, 8))
