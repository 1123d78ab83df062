"""Serving: `python benchmarks/serving.py --out FILE [--models A,B] [--calls N] [--others MODULE:FUNCTION]`.

Writes a result file, and writes it again after each part:

- rows of mode "host": how long an eager call takes to return, on a drained stream, for all operators and the peers of
  the experts. All take turns with a product of two 64 x 64 matrices. "moe_block" is a layer behind a normalisation,
  added to its input as models do it: as it is, and compiled by torch.compile in two modes.
- `warm_up`: seconds from empty caches, and what they went to.
- `stalls`: calls of all operators at random numbers of tokens after it: how many waited for a compiler, how many took
  the host over 5 ms, and the longest.
- `few`, on a GPU: time of operators with MOEYARD_KERNELS=few over that with all kernels. Graphs of processes of both
  kinds take turns.

`--others` gives more peers of the experts as (name, version, run) for a case, as `moeyard bench experts` takes them.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import moeyard
from moeyard.bench import layers, peers, results, timing, workloads
from moeyard.bench.operators import Case, Provider, operators
from moeyard.bench.routers import router_options
from moeyard.bench.run import row_of

TOKENS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HOST_TOKENS = (1, 64, 1024)
BLOCK_SIZE = 16
MOST = 16384
NO_LIMITS: dict[str, float | None] = {"copy_time_us": None, "read_time_us": None, "product_time_us": None}
Call = Callable[[], Any]


class Layer:
    """A model's layer with random weights, and its operators."""

    def __init__(self, model: str, device: torch.device, scale: int = 1, most: int = MOST) -> None:
        found = [
            case for case in workloads.load(model, scale) if case.op == "moe_layer" and case["dtype"] == "bfloat16"
        ]
        self.model, self.device, self.most, self.case = model, device, most, found[0]
        self.inputs = self.drawn(most)
        self.router, self.activation = router_options(self.case, device), layers.activation(self.case)
        self.logits = self.inputs.hidden_states @ self.inputs.router_weight.T

    def sized(self, op: str, tokens: int) -> Case:
        """The case of an operator."""
        return replace(self.case, op=op, sizes=tuple((dict(self.case.sizes) | {"num_tokens": tokens}).items()))

    def drawn(self, tokens: int) -> layers.LayerInputs:
        return layers.draw_layer(self.sized("moe_layer", tokens), self.device, torch.Generator().manual_seed(tokens))

    def warm(self, impl: str) -> dict[str, float]:
        """Seconds by what they went to."""
        x = self.inputs
        return moeyard.warmup(
            x.weights, shared=x.shared, activation=self.activation, impl=impl, max_tokens=self.most, **self.router
        )

    def calls(self, tokens: int, impl: str) -> dict[str, Call]:
        """Calls by operator; `impl` is that of the experts."""
        x, logits, experts = self.inputs, self.logits[:tokens], self.case["num_experts"]
        hidden = x.hidden_states[:tokens]
        routing = moeyard.route(logits, **self.router)
        layout = moeyard.moe_align_block_size(routing.topk_ids, num_experts=experts, block_size=1)
        rows = moeyard.permute(hidden, layout).rows
        act = self.activation

        def layer() -> torch.Tensor:
            return moeyard.moe_layer(
                hidden, x.router_weight, x.weights, activation=act, shared=x.shared, shared_gate=x.shared_gate,
                impl=impl, **self.router,
            )  # fmt: skip

        def block() -> torch.Tensor:
            wide = hidden.float()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
            return hidden + moeyard.moe_layer(
                normed.to(hidden.dtype), x.router_weight, x.weights, activation=act, shared=x.shared,
                shared_gate=x.shared_gate, impl=impl, **self.router,
            )  # fmt: skip

        def align() -> Any:
            return moeyard.moe_align_block_size(routing.topk_ids, num_experts=experts, block_size=BLOCK_SIZE)

        return {
            "route": lambda: moeyard.route(logits, **self.router),
            "route_and_align": lambda: moeyard.route_and_align(logits, block_size=BLOCK_SIZE, **self.router),
            "moe_align_block_size": align,
            "permute": lambda: moeyard.permute(hidden, layout),
            "combine": lambda: moeyard.combine(rows, layout, routing.topk_weights),
            "fused_experts": lambda: moeyard.fused_experts(hidden, routing, x.weights, activation=act, impl=impl),
            "moe_layer": layer,
            "moe_block": block,
        }

    def drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What either compiler was asked for meanwhile."""
    from moeyard.cuda.runtime import compile as building
    from moeyard.triton.launch import Step

    asked: list[str] = []
    kept = (building, "compile_source"), (Step, "compile")
    plain = [getattr(module, name) for module, name in kept]

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            asked.append(name)
            return call(*arguments, **options)

        return noted

    for (module, name), call in zip(kept, plain, strict=True):
        setattr(module, name, watched(name, call))
    try:
        yield asked
    finally:
        for (module, name), call in zip(kept, plain, strict=True):
            setattr(module, name, call)


def stalls(layer: Layer, impl: str, calls: int) -> dict[str, Any]:
    """Random numbers of tokens, each operator on a drained stream; longest_ms is [ms, tokens] by operator."""
    rng, over, done = random.Random(1), 0, 0
    longest: dict[str, tuple[float, int]] = {}
    gc.collect()
    with compilations() as asked:
        while done < calls:
            tokens = rng.randint(1, layer.most)
            for name, call in layer.calls(tokens, impl).items():
                layer.drain()
                start = time.perf_counter()
                call()
                spent = 1e3 * (time.perf_counter() - start)
                longest[name] = max(longest.get(name, (0.0, 0)), (round(spent, 3), tokens))
                over += spent > 5
                done += 1
        layer.drain()
    return {
        "impl": impl, "workload": layer.model, "calls": done, "compilations": len(asked), "over_5_ms": over,
        "longest_ms": {name: list(found) for name, found in longest.items()},
    }  # fmt: skip


def in_turn(named: list[Call], drain: Call, rounds: int) -> list[timing.Times]:
    """Microseconds until each call returns. Orders of the calls are drawn anew."""
    samples: list[list[float]] = [[] for _ in named]
    order, rng = list(range(len(named))), random.Random(0)
    for i in range(rounds + 20):
        rng.shuffle(order)
        for which in order:
            drain()
            start = time.perf_counter()
            named[which]()
            spent = 1e6 * (time.perf_counter() - start)
            if i >= 20:  # the first calls allocate and load
                samples[which].append(spent)
    return [timing.summarise(found) for found in samples]


def hosts(layer: Layer, tokens: int, others: Callable[[Case], Any], rounds: int) -> list[dict[str, Any]]:
    """Rows of mode "host"; a peer with a wrong answer has no time."""
    operator, case = operators()["fused_experts"], layer.sized("fused_experts", tokens)
    x = layers.draw_layer(case, layer.device, torch.Generator().manual_seed(1))
    a = torch.randn(64, 64, device=layer.device)
    found: list[tuple[Case, Provider, Call]]
    found = [(layer.sized("mm", tokens), Provider("torch", "64 x 64", len), lambda: a @ a)]
    calls = layer.calls(tokens, "auto")
    found += [(layer.sized(op, tokens), Provider("moeyard", "auto", len), call) for op, call in calls.items()]
    block = calls["moe_block"]
    for label, options in (("default", {}), ("reduce-overhead", {"mode": "reduce-overhead"})):
        compiled = torch.compile(block, fullgraph=True, **options)
        found.append((layer.sized("moe_block", tokens), Provider("moeyard", f"torch.compile, {label}", len), compiled))
    wrong = []
    named = [p for p in operator.providers(case, layer.device) if p.name != "moeyard"]
    for peer in [*named, *(Provider(*one) for one in others(case))]:
        failure = operator.failure(case, peer, x, layer.device)
        if failure is None:
            found.append((case, peer, lambda run=peer.run: run(x)))
        else:
            wrong.append(row_of(case, peer, "host", None, NO_LIMITS) | {"wrong": failure})
    times = in_turn([call for _, _, call in found], layer.drain, rounds)
    taken = [row_of(one, p, "host", spent, NO_LIMITS) for (one, p, _), spent in zip(found, times, strict=True)]
    return [*taken, *wrong]


def captured(call: Call) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    return graph


def graph_times(layer: Layer) -> dict[str, float]:
    """Microseconds of each operator by tokens, for the kernels of this process."""
    found = {}
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


def few_over_all(model: str, kernels: str) -> dict[str, Any]:
    """Processes of both choices in turn, twice: all kernels, and MOEYARD_KERNELS as it is judged."""
    taken: dict[str, list[dict[str, float]]] = {"all": [], "few": []}
    for which in ("all", "few", "few", "all"):
        done = subprocess.run(
            [sys.executable, __file__, "--models", model, "--graph-times"], capture_output=True, text=True, check=True,
            env={**os.environ, "MOEYARD_KERNELS": "all" if which == "all" else f"all,{kernels}"},
        )  # fmt: skip
        taken[which].append(json.loads(done.stdout))
    best = {which: {key: min(run[key] for run in runs) for key in runs[0]} for which, runs in taken.items()}
    return {
        "workload": model,
        "kernels": kernels,
        "ratios": {key: round(best["few"][key] / best["all"][key], 3) for key in best["all"]},
        "all_us": {key: round(spent, 3) for key, spent in best["all"].items()},
    }


def others_of(where: str) -> Callable[[Case], Any]:
    """The function of `--others`; without one, nobody."""
    if not where:
        return lambda _: []
    module, _, function = where.partition(":")
    found: Callable[[Case], Any] = getattr(importlib.import_module(module), function)
    return found


def measure(given: argparse.Namespace, device: torch.device, others: Callable[[Case], Any]) -> None:
    """All parts of all models."""
    rates = timing.rates(device)
    content = results.document([], results.machine(device, rates), peers.versions(device))
    content |= {"warm_up": [], "stalls": [], "few": []}

    def note(part: str, *found: dict[str, Any]) -> None:
        content[part] += found
        for one in found:
            shown = {key: one[key] for key in ("op", "provider", "impl", "time_us", "wrong") if key in one}
            print(json.dumps(shown if part == "rows" else {"what": part, **one}), flush=True)
        results.write(given.out, content)

    for model in given.models.split(","):
        layer = Layer(model, device, given.scale, given.most)
        for impl in given.impls.split(","):
            if device.type == "cuda":
                note("warm_up", {"impl": impl, "workload": model, "seconds": layer.warm(impl)})
            note("stalls", stalls(layer, impl, given.calls))
        for tokens in (tokens for tokens in HOST_TOKENS if tokens <= given.most):
            note("rows", *hosts(layer, tokens, others, given.rounds))
        del layer
        if device.type == "cuda" and given.few:
            torch.cuda.empty_cache()
            note("few", few_over_all(model, given.kernels))


def main() -> None:
    """Everything, in caches of its own, or what the other processes are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("--models", default="qwen3-30b-a3b", help="workloads, comma-separated (qwen3-30b-a3b)")
    parser.add_argument("--calls", type=int, default=10_000, help="calls of random sizes per implementation (10000)")
    parser.add_argument("--rounds", type=int, default=200, help="samples of host time (200)")
    parser.add_argument("--impls", default="cuda,triton", help="implementations to look for stalls in (cuda,triton)")
    parser.add_argument("--others", default="", help="MODULE:FUNCTION, more peers of the experts")
    parser.add_argument("--few", action=argparse.BooleanOptionalAction, default=True, help="judge few kernels (yes)")
    parser.add_argument("--kernels", default="few", help="MOEYARD_KERNELS that is judged, such as experts=few (few)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (cuda)")
    parser.add_argument("--scale", type=int, default=1, help="divide hidden and intermediate sizes by this (1)")
    parser.add_argument("--most", type=int, default=MOST, help=f"most tokens ({MOST})")
    parser.add_argument("--graph-times", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = torch.device(given.device)
    if given.graph_times:
        print(json.dumps(graph_times(Layer(given.models, device))))
        return
    if given.out is None:
        parser.error("--out: expected a file")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOEYARD_CACHE"] = os.environ["TRITON_CACHE_DIR"] = folder
        measure(given, device, others_of(given.others))


if __name__ == "__main__":
    main()
