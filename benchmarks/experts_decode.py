"""Times plans of experts_decode.cu side by side: microseconds a call at one token or a few, weights cold in L2.

    python benchmarks/experts_decode.py [--tokens 1] [--models Qwen3-30B,Mixtral] [--plans default,early]

Each figure is the median of graph replays, of 20 calls whose experts rotate so that together they exceed the L2 cache
many times. `floor` is the bytes of the experts over 4.25 TB/s. Plans take turns, round by round.
"""

import argparse
import statistics
from typing import Any

import torch

from moeyard import Activation, ExpertWeights
from moeyard.cuda.experts_decode import ExpertPlan, ExpertSizes, expert_plan, fused_experts_launch
from moeyard.cuda.layout import card_of

MODELS = {  # top_k, hidden size, intermediate size, experts in memory
    "Mixtral": (2, 4096, 14336, 8),
    "Qwen3-30B": (8, 2048, 768, 128),
    "DeepSeek-V3": (8, 7168, 2048, 64),
    "gpt-oss-120b": (4, 2880, 2880, 64),
    "Qwen3-Next": (10, 2048, 512, 512),
    "Qwen3-Next / 4": (10, 2048, 128, 512),
    "Qwen3-235B / 8": (8, 4096, 192, 128),
}
PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "16 warps": {"warps": 16, "segment": 64},
    "4 warps": {"warps": 4, "segment": 256},
    "short segments": {"segment": 64},
    "48 KB": {"ring_bytes": 48 << 10},
    "64 KB": {"ring_bytes": 64 << 10},
    "early": {"trigger": 1 << 20},
    "earlier": {"trigger": 6},
    "kept in L2": {"evict_first": False},
}
CALLS, ROUNDS = 20, 15


def graph_of(weights: ExpertWeights, sizes: ExpertSizes, plan: ExpertPlan) -> torch.cuda.CUDAGraph:
    """20 calls, each with the next experts."""
    rows = torch.randn(sizes.num_tokens, sizes.hidden_size, device="cuda").bfloat16()
    factors = torch.rand(sizes.num_tokens, sizes.top_k, device="cuda")
    experts = weights.num_local_experts
    order = torch.arange(CALLS * sizes.num_routes, device="cuda", dtype=torch.int32) % experts
    ids = order.view(CALLS, sizes.num_tokens, sizes.top_k)
    out = torch.empty_like(rows)

    def calls() -> None:
        for i in range(CALLS):
            fused_experts_launch(
                rows, factors, ids[i], None, weights, activation=Activation(), num_experts=experts,
                weight_on_input=False, out=out, chosen=plan,
            )  # fmt: skip

    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph


def time_us(graph: torch.cuda.CUDAGraph) -> float:
    """Of one call."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1000 / CALLS


def main() -> None:
    """Prints a line a model and plan."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--plans", default=",".join(PLANS))
    chosen = parser.parse_args()
    for model in chosen.models.split(","):
        top_k, hidden, size, experts = MODELS[model]
        sizes = ExpertSizes(chosen.tokens, top_k, hidden, size, True)
        weights = ExpertWeights(
            torch.randn(experts, 2 * size, hidden, device="cuda", dtype=torch.bfloat16).div_(hidden**0.5),
            torch.randn(experts, hidden, size, device="cuda", dtype=torch.bfloat16).div_(size**0.5),
        )
        floor = min(sizes.num_routes, experts) * 3 * hidden * size * 2 / 4.25e6
        graphs, shown = {}, {}
        for name in chosen.plans.split(","):
            plan = expert_plan(sizes, card_of(0), **PLANS[name])
            if plan is not None and plan not in shown.values():
                graphs[name], shown[name] = graph_of(weights, sizes, plan), plan
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for round_number in range(ROUNDS + 2):
            for name, graph in graphs.items():
                sample = time_us(graph)
                if round_number > 1:
                    samples[name].append(sample)
        for name, values in samples.items():
            middle, plan = statistics.median(values), shown[name]
            print(
                f"{model:15} {chosen.tokens} tokens {name:14} {middle:8.2f} us (least {min(values):.2f}), "
                f"floor {floor:.2f}: x {middle / floor:.3f}; {plan.up_stages} x {plan.up_segment} and "
                f"{plan.down_stages} x {plan.down_rows} x {plan.down_segment} words",
                flush=True,
            )


if __name__ == "__main__":
    main()
