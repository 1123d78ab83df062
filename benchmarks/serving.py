"""Serving on a GPU: `python benchmarks/serving.py [--model NAME] [--calls N]` prints JSON, one line per finding.

- warm-up: seconds from an empty cache, and what they went to;
- stalls: calls of all operators at random numbers of tokens after it, on a drained stream: how many waited for a
  compiler, and the longest of them by host time;
- host: eager host time of a call beside torch.mm;
- few: time of layers with MOEYARD_KERNELS=few over that with all, by tokens, from graphs of both that take turns.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import moeyard
from moeyard import ExpertWeights, Routing
from moeyard.bench.served import options_of, served

CUDA = torch.device("cuda", 0)
TOKENS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
MOST = 16384


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def on_gpu(weights: ExpertWeights) -> ExpertWeights:
    def draw(like: torch.Tensor | None) -> torch.Tensor | None:
        return None if like is None else torch.empty(like.shape, dtype=like.dtype, device=CUDA).uniform_(-0.02, 0.02)

    w13, w2 = draw(weights.w13), draw(weights.w2)
    assert w13 is not None and w2 is not None
    return ExpertWeights(w13, w2, draw(weights.w13_bias), draw(weights.w2_bias), weights.gated)


class Layer:
    """A model's layer with random weights, and its operators."""

    def __init__(self, model: str) -> None:
        layer = served(model)
        self.weights, self.options = on_gpu(layer.weights), options_of(layer)
        if layer.shared is not None:
            self.options["shared"] = on_gpu(layer.shared)
        bias = self.options.get("selection_bias")
        if bias is not None:
            self.options["selection_bias"] = torch.zeros(bias.shape, device=CUDA)
        self.router = {key: self.options[key] for key in layer.router}
        self.experts = self.weights.num_local_experts
        self.hidden = torch.randn(MOST, self.weights.hidden_size, device=CUDA).bfloat16()
        self.logits = torch.randn(MOST, self.experts, device=CUDA).bfloat16()

    def warm(self, impl: str) -> dict[str, float]:
        return moeyard.warmup(self.weights, impl=impl, max_tokens=MOST, **self.options)

    def calls(self, tokens: int, impl: str) -> dict[str, Callable[[], Any]]:
        hidden, logits = self.hidden[:tokens], self.logits[:tokens]
        routing = moeyard.route(logits, **self.router)
        layout = moeyard.moe_align_block_size(routing.topk_ids, num_experts=self.experts, block_size=1)
        rows = moeyard.permute(hidden, layout).rows
        named: dict[str, Callable[[], Any]] = {
            "route": lambda: moeyard.route(logits, **self.router),
            "route_and_align": lambda: moeyard.route_and_align(logits, block_size=16, **self.router),
            "align": lambda: moeyard.moe_align_block_size(routing.topk_ids, num_experts=self.experts, block_size=16),
            "permute": lambda: moeyard.permute(hidden, layout),
            "combine": lambda: moeyard.combine(rows, layout, routing.topk_weights),
            "fused_experts": lambda: moeyard.fused_experts(
                hidden, routing, self.weights, activation=self.options["activation"], impl=impl
            ),
        }
        shared = self.options["shared"]
        if shared is not None:
            factors, ids = torch.ones(tokens, 1, device=CUDA), torch.zeros(tokens, 1, dtype=torch.int32, device=CUDA)
            named["shared"] = lambda: moeyard.fused_experts(
                hidden, Routing(factors, ids), shared, activation=self.options["activation"], impl=impl
            )
        return named


class Compilations:
    """How often either compiler was asked for something."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self, module: Any, name: str) -> None:
        asked = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return asked(*arguments, **options)

        setattr(module, name, counted)


def stalls(layer: Layer, model: str, impl: str, calls: int) -> None:
    """Random numbers of tokens, each operator on a drained stream."""
    from moeyard.cuda.runtime import compile as building
    from moeyard.triton.launch import Step

    compilations, rng = Compilations(), random.Random(1)
    compilations.watch(building, "compile_source")
    compilations.watch(Step, "compile")
    longest: dict[str, tuple[float, int]] = {}
    over = done = 0
    gc.collect()
    while done < calls:
        tokens = rng.randint(1, MOST)
        for name, call in layer.calls(tokens, impl).items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            spent = 1e3 * (time.perf_counter() - start)
            longest[name] = max(longest.get(name, (0.0, 0)), (spent, tokens))
            over += spent > 5
            done += 1
    torch.cuda.synchronize()
    say(what="stalls", model=model, impl=impl, calls=done, compilations=compilations.count, over_5_ms=over,
        longest_ms={name: [round(spent, 3), tokens] for name, (spent, tokens) in longest.items()})  # fmt: skip


def host_us(call: Callable[[], Any]) -> float:
    for _ in range(20):
        call()
    samples = []
    for _ in range(200):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    return round(statistics.median(samples), 1)


def hosts(layer: Layer, model: str) -> None:
    a = torch.randn(64, 64, device=CUDA)
    for tokens in (1, 64, 1024):
        named = {"torch.mm": lambda: a @ a, **layer.calls(tokens, "auto")}
        say(what="host", model=model, tokens=tokens, host_us={name: host_us(call) for name, call in named.items()})


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    return graph


def times(model: str) -> dict[str, float]:
    """Microseconds of each operator by tokens, for the plans of this process."""
    layer, found = Layer(model), {}
    for tokens in TOKENS:
        for name, call in layer.calls(tokens, "auto").items():
            graph, samples = captured(call), []
            for _ in range(7):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                samples.append(100 * begin.elapsed_time(end))
            found[f"{name} {tokens}"] = statistics.median(samples)
    return found


def few_over_all(model: str) -> None:
    """Processes of both choices in turn, twice."""
    taken: dict[str, list[dict[str, float]]] = {"all": [], "few": []}
    for which in ("all", "few", "few", "all"):
        done = subprocess.run(
            [sys.executable, __file__, "--model", model, "--times"], capture_output=True, text=True, check=True,
            env={**os.environ, "MOEYARD_KERNELS": which},
        )  # fmt: skip
        taken[which].append(json.loads(done.stdout))
    best = {which: {key: min(run[key] for run in runs) for key in runs[0]} for which, runs in taken.items()}
    ratios = {key: round(best["few"][key] / best["all"][key], 3) for key in best["all"]}
    say(what="few / all", model=model, ratios=ratios, us=best["all"])


def main() -> None:
    """Everything, or what the other processes are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--impls", default="cuda,triton")
    parser.add_argument("--times", action="store_true")
    given = parser.parse_args()
    if given.times:
        print(json.dumps(times(given.model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOEYARD_CACHE"] = os.environ["TRITON_CACHE_DIR"] = folder
        layer = Layer(given.model)
        for impl in given.impls.split(","):
            say(what="warm-up", model=given.model, impl=impl, seconds=layer.warm(impl))
            stalls(layer, given.model, impl, given.calls)
        hosts(layer, given.model)
        del layer
        torch.cuda.empty_cache()
        few_over_all(given.model)


if __name__ == "__main__":
    main()
