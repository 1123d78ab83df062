"""Host time of eager calls without a GPU: `python benchmarks/host_path.py` prints JSON, one line per number of tokens.

Tensors say that they are on an H200, and the driver answers at once (`moeyard.testing.stand_in`). So times are those of
Python and of torch's allocations on a CPU. Launches cost nothing here, and 3.5 to 4.8 us each on a GPU
(docs/notes/runtime.md). `--profile OP` shows where an operator's time goes.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import moeyard
from moeyard import ExpertWeights
from moeyard.testing.stand_in import calls_of, pretended_gpu

HIDDEN, SIZE, EXPERTS, TOP_K = 64, 64, 128, 8
TOKENS = (1, 64, 1024)


def named_calls(tokens: int) -> dict[str, Callable[[], Any]]:
    """Small matrices, of sizes that the kernels of a Qwen3-30B layer take, too; a router's product is torch's own."""
    weights = ExpertWeights(
        torch.zeros(EXPERTS, 2 * SIZE, HIDDEN, dtype=torch.bfloat16),
        torch.zeros(EXPERTS, HIDDEN, SIZE, dtype=torch.bfloat16),
    )
    hidden, logits = torch.zeros(tokens, HIDDEN).bfloat16(), torch.zeros(tokens, EXPERTS).bfloat16()
    router = torch.zeros(EXPERTS, HIDDEN).bfloat16()
    routing = moeyard.route(logits, top_k=TOP_K)
    align: dict[str, Any] = {"num_experts": EXPERTS, "block_size": 16}
    layout = moeyard.moe_align_block_size(routing.topk_ids, num_experts=EXPERTS, block_size=1)
    out = moeyard.moe_align_block_size(routing.topk_ids, **align)
    rows = moeyard.permute(hidden, layout).rows
    return {
        "linear": lambda: torch.nn.functional.linear(hidden, router),
        "route": lambda: moeyard.route(logits, top_k=TOP_K, renormalize=True),
        "align": lambda: moeyard.moe_align_block_size(routing.topk_ids, **align),
        "align, out=": lambda: moeyard.moe_align_block_size(routing.topk_ids, out=out, **align),
        "route_and_align": lambda: moeyard.route_and_align(logits, block_size=16, top_k=TOP_K, renormalize=True),
        "permute": lambda: moeyard.permute(hidden, layout),
        "combine": lambda: moeyard.combine(rows, layout, routing.topk_weights),
        "fused_experts": lambda: moeyard.fused_experts(hidden, routing, weights),
        "moe_layer": lambda: moeyard.moe_layer(hidden, router, weights, top_k=TOP_K, renormalize=True),
    }


def times_us(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Least and median of many rounds, in which the calls take turns; of 20 calls each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(20):
                call()
            samples[name].append(1e6 * (time.perf_counter() - start) / 20)
    return {name: [round(min(one), 2), round(statistics.median(one), 2)] for name, one in samples.items()}


def profile(call: Callable[[], Any], count: int = 20_000) -> None:
    """The functions of a call by their own time."""
    watched = cProfile.Profile()
    watched.enable()
    for _ in range(count):
        call()
    watched.disable()
    pstats.Stats(watched).sort_stats("tottime").print_stats(45)


def main() -> None:
    """All operators, or one of them under a profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--profile", metavar="OP")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    given = parser.parse_args()
    small = torch.zeros(4, 4)
    with pretended_gpu() as driver:
        for tokens in given.tokens:
            calls = {"torch.mm": lambda: torch.mm(small, small), **named_calls(tokens)}
            for call in 2 * list(calls.values()):  # a call whose sizes came before leaves what repeats it
                call()
            if given.profile:
                profile(calls[given.profile])
                continue
            counts = {}
            for name, call in calls.items():
                before = driver.launches
                own, in_c = calls_of(call)
                counts[name] = {"launches": driver.launches - before, "functions": own, "functions in C": in_c}
            print(json.dumps({"tokens": tokens, "us (least, median)": times_us(calls, given.rounds), "calls": counts}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
