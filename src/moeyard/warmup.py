"""Compiles or loads ahead of time what first calls would otherwise wait for."""

import time
from collections.abc import Callable, Iterator

import torch

from moeyard.activation import activate
from moeyard.combine import combine, moe_sum
from moeyard.dispatch.table import companion, explain
from moeyard.experts import fused_experts
from moeyard.grouped_gemm import grouped_gemm
from moeyard.layout import batched_moe_align_block_size, moe_align_block_size, moe_lora_align_block_size
from moeyard.permute import permute, shuffle_rows
from moeyard.router import route
from moeyard.values import ExpertWeights, Routing


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
            seconds[f"{op} {explain(op, place).chosen} {place}"] = time.perf_counter() - start
    return seconds


def _calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    ids = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32, device=device)
    wide_map = torch.arange(64, dtype=torch.int32, device=device)
    counts = torch.tensor([1, 0, 2], dtype=torch.int32, device=device)
    layout = moe_align_block_size(ids, num_experts=3, block_size=2)
    rows = torch.ones(layout.capacity, 8, dtype=torch.bfloat16, device=device)

    def align() -> None:
        # The kernels of plan.py for 33 to 256 experts, with and without the last outputs; one thread and several of the
        # cpu kernels. Maps are compiled for small batches only: kernels are many, and each takes a compiler a while.
        for num_tokens in (1, 64, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288):
            for dtype in (torch.int32, torch.int64):
                some = torch.zeros(num_tokens, 1, dtype=dtype, device=device)
                for mapping in (None, wide_map) if num_tokens <= 64 else (None,):
                    whole = moe_align_block_size(some, num_experts=64, block_size=16, expert_map=mapping)
                    triple = companion("moe_align_block_size", "first outputs", "auto", device, dtype)
                    if triple is not None:
                        triple(some, mapping, 64, 64, 16, *whole.tensors[:3])

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
    wide = torch.ones(2, 16, dtype=torch.bfloat16, device=device)  # what every implementation of experts takes
    weights = ExpertWeights(wide.new_ones(3, 32, 16), wide.new_ones(3, 16, 16))
    routing = Routing(torch.ones(2, 2, device=device), ids)
    yield "route", lambda: route(rows[:2, :3], top_k=2)
    yield "grouped_gemm", lambda: grouped_gemm(wide, weights.w13, layout=layout)
    yield "activate", lambda: activate(rows)
    yield "fused_experts", lambda: fused_experts(wide, routing, weights)
