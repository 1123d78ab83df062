"""Training steps on a GPU: `python benchmarks/training.py --out FILE [--time-limit S] [--models A,B] [--tokens N,M]`.

One process. Every cell is a layer of a model at a number of tokens, bfloat16, uniform routing. Rows of the file:

- "training step": forward and backward, with gradients of hidden states, router weights, w13 and w2;
- "training step, fp8 blocks": the same at a scheme, by `straight_through_experts`, rounding of the weights included;
- "forward": moeyard's own, without gradients;
- "part: ...": one operator of moeyard's backward, as each implementation computes it.

Before it is timed, a provider's gradients are held against float64: w13, w2 and router weights of some experts, hidden
states of some tokens. Bounds are multiples of what an honest bfloat16 computation of these experts errs. A provider
that errs more, raises or lacks memory is a row that says so. Samples are taken in turn, in random order, by rounds.

Peers take part where they can be imported: ScatterMoE (`scattermoe`), Liger (`liger_kernel`). `training_peers.py` has
them, and says how packages in other folders are found. `training_goals.py` says which goals a file meets.
"""

import argparse
import contextlib
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import moeyard
import training_peers
from moeyard import ExpertWeights, Routing
from moeyard.bench import peers, results, timing
from moeyard.bench.training import TrainingStep, kept_bytes, peak_bytes
from moeyard.dispatch.table import launcher
from moeyard.quant import FP8_BLOCK
from moeyard.values import Activation, Segments, WeightedGradients
from moeyard.vectorised.quant import quantise_rows
from training_peers import Inputs, Provider

MODELS = {  # experts, top_k, hidden_size, intermediate_size
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "granite-3.1-3b-a800m": (40, 8, 1536, 512),
    "olmoe-1b-7b": (64, 8, 2048, 1024),
}
TOKENS = (32768, 8192)
_OURS, _OTHERS = 1.1, training_peers.BOUND  # times the error of an honest computation
_ROUNDED = 1.5  # the same at a scheme, where what rounding leaves open may become another code
_FP8 = "training step, fp8 blocks"
_CHECKED_EXPERTS, _CHECKED_TOKENS = 3, 16
_ROUNDS = 15
_LEAST_S = 15.0  # with less time left no cell begins


def step_of(model: str, tokens: int, scale: int) -> TrainingStep:
    experts, top_k, hidden, inside = MODELS[model]
    return TrainingStep(tokens, top_k, max(experts // scale, top_k), hidden // scale, inside // scale)


def draw(step: TrainingStep, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(7)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return drawn.normal_(0, scale, generator=generator)

    scores = torch.rand(step.tokens, step.experts, generator=generator, device=device)
    chosen = torch.topk(scores, step.top_k)
    w13 = normal(step.experts, 2 * step.inside, step.hidden, scale=step.hidden**-0.5)
    w2 = normal(step.experts, step.hidden, step.inside, scale=step.inside**-0.5)
    rows, factors = normal(step.tokens, step.hidden), torch.softmax(chosen.values, 1)
    leaves = (t.requires_grad_() for t in (rows, factors, w13, w2))
    return Inputs(*leaves, chosen.indices.int(), normal(step.tokens, step.hidden))


# Providers


def ours(impl: str = "auto", save: str = "product") -> Provider:
    def call(given: Inputs) -> Tensor:
        routing, weights = Routing(given.factors, given.ids), ExpertWeights(given.w13, given.w2)
        return moeyard.fused_experts(given.rows, routing, weights, impl=impl, save=save)

    return call


def at_a_scheme(given: Inputs) -> Tensor:
    """moeyard's layer in blocks of e4m3, with codes made in the call."""
    routing, weights = Routing(given.factors, given.ids), ExpertWeights(given.w13, given.w2)
    return moeyard.straight_through_experts(given.rows, routing, weights, FP8_BLOCK)


_AUTO = ", ".join(filter(None, ("auto", os.environ.get("MOEYARD_IMPL"))))
SAVES = {"product": ("moeyard", _AUTO), "inputs": ("moeyard", f"{_AUTO}, save='inputs'")}


def providers() -> dict[tuple[str, str], Provider]:
    """By name and way."""
    found = {SAVES["product"]: ours(), SAVES["inputs"]: ours(save="inputs")}
    if torch.cuda.is_available():
        found["moeyard", "triton"] = ours("triton")
    found["torch", "grouped_mm"] = training_peers.torch_grouped
    return found | {(name, ""): call for name, call in training_peers.found().items()}


# Whether gradients are right


def rounded(given: Inputs) -> Inputs:
    """The values that a layer at a scheme computes with: gradients by these are its straight-through ones."""
    plain = ExpertWeights(given.w13.detach(), given.w2.detach())
    values = moeyard.dequantize_experts(moeyard.quantize_experts(plain, FP8_BLOCK), torch.float32)
    return given._replace(rows=rounded_rows(given.rows.detach()), w13=values.w13, w2=values.w2)


def rounded_rows(rows: Tensor) -> Tensor:
    """Rows as a scheme rounds them, rounded to 16 bits before; the derivative is 1."""
    there = quantise_rows(rows.detach().bfloat16(), FP8_BLOCK, None, 0).to(rows.dtype)
    return rows + (there - rows).detach()


def some_gradients(
    given: Inputs, kind: torch.dtype, inside: Callable[[Tensor], Tensor] = lambda rows: rows
) -> dict[str, list[Tensor]]:
    """Gradients that one has for some experts and tokens by plain torch, at a dtype. `inside` rounds what the
    activation leaves.
    """
    experts = given.w13.shape[0]
    found: dict[str, list[Tensor]] = {"w13": [], "w2": [], "factors": [], "rows": []}
    for expert in sorted({0, experts // 2, experts - 1})[:_CHECKED_EXPERTS]:
        token, k = torch.where(given.ids == expert)
        leaves = [t.detach().to(kind).requires_grad_() for t in (given.w13[expert], given.w2[expert])]
        factor = given.factors.detach()[token, k].to(torch.promote_types(kind, torch.float32)).requires_grad_()
        gate, up = functional.linear(given.rows.detach()[token].to(kind), leaves[0]).chunk(2, 1)
        result = functional.linear(inside(functional.silu(gate) * up), leaves[1]) * factor.unsqueeze(1)
        upstream = given.upstream[token].to(result.dtype)
        for name, one in zip(found, torch.autograd.grad(result, (*leaves, factor), upstream), strict=False):
            found[name].append(one)
    few = given.ids[:_CHECKED_TOKENS]
    rows = given.rows.detach()[:_CHECKED_TOKENS].to(kind).requires_grad_()
    total = torch.zeros_like(rows)
    for expert in few.unique().tolist():
        token, k = torch.where(few == expert)
        w13, w2 = given.w13.detach()[expert].to(kind), given.w2.detach()[expert].to(kind)
        gate, up = functional.linear(rows[token], w13).chunk(2, 1)
        result = functional.linear(inside(functional.silu(gate) * up), w2)
        result = result * given.factors.detach()[token, k].unsqueeze(1)
        total = total.index_add(0, token, result.to(kind))
    found["rows"] += torch.autograd.grad(total, rows, given.upstream[:_CHECKED_TOKENS].to(kind))
    return found


def of_some(given: Inputs, gradients: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The same gradients out of whole ones."""
    rows, factors, w13, w2 = gradients
    experts = given.w13.shape[0]
    some = sorted({0, experts // 2, experts - 1})[:_CHECKED_EXPERTS]
    return {
        "w13": [w13[i] for i in some], "w2": [w2[i] for i in some],
        "factors": [factors[torch.where(given.ids == i)] for i in some], "rows": [rows[:_CHECKED_TOKENS]],
    }  # fmt: skip


def errors(found: dict[str, list[Tensor]], exact: dict[str, list[Tensor]]) -> dict[str, float]:
    """Root mean squared error of each, relative to the values."""

    def of(name: str) -> float:
        pairs = list(zip(found[name], exact[name], strict=True))
        off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        return (off / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-300)) ** 0.5

    return {name: of(name) for name in exact}


# Time and memory


def train(provider: Provider, given: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(provider(given), given.leaves, given.upstream)


class Clock:
    """Microseconds of a call: by events on a GPU, by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)


def in_turn(calls: dict[str, Callable[[], object]], clock: Clock, until: float) -> dict[str, timing.Times]:
    """Times of calls that take turns, at least 3 rounds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rng = random.Random(1)
    for done in range(_ROUNDS):
        if done >= 3 and time.monotonic() > until:
            break
        for name in rng.sample(list(calls), len(calls)):
            samples[name].append(clock(calls[name]))
    return {name: timing.summarise(some) for name, some in samples.items()}


def peak_of(call: Callable[[], object]) -> int | None:
    """Bytes that a call holds at most beyond what was there."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# Parts of the backward


def parts(given: Inputs, step: TrainingStep) -> dict[str, tuple[int, Callable[[], object]]]:
    """By operator and implementation ("operator: implementation"): (operations, call)."""
    device, kind = given.rows.device, given.rows.dtype
    layout = moeyard.moe_align_block_size(given.ids, num_experts=step.experts, block_size=1)
    where = Segments(layout.expert_offsets[:-1], layout.expert_counts, layout.sorted_token_ids, 1)
    routes, wide = step.routes, 2 * step.inside
    of_product, middle = (torch.randn(routes, width, device=device, dtype=kind) for width in (wide, step.inside))
    upstream, w13, w2 = given.upstream, given.w13.detach(), given.w2.detach()
    found: dict[str, tuple[int, Callable[[], object]]] = {}
    impls = ("triton", "torch") if device.type == "cuda" else ("torch",)
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)

    def gemm(name: str, rows: Tensor, weight: Tensor, divisor: int) -> None:
        operations = 2 * routes * weight.shape[1] * weight.shape[2]
        apart, out = where._replace(divisor=divisor), torch.empty(routes, weight.shape[2], device=device, dtype=kind)
        turned = weight.transpose(1, 2)
        if device.type == "cuda":
            by_triton = launcher("grouped_gemm", "triton", device, kind)
            found[f"{name}: triton"] = (operations, lambda: by_triton(rows, turned, None, None, apart, out=out))
            if on_hopper:
                by_cuda = launcher("grouped_gemm", "cuda", device, kind)
                found[f"{name}: cuda"] = (operations, lambda: by_cuda(rows, turned, None, None, apart, out=out))
                found[f"{name}: cuda, weights copied"] = (
                    operations, lambda: by_cuda(rows, turned.contiguous(), None, None, apart, out=out)
                )  # fmt: skip

    def outer(name: str, grads: Tensor, grad_divisor: int, rows: Tensor, row_divisor: int) -> None:
        operations = 2 * routes * grads.shape[1] * rows.shape[1]
        out = torch.empty(step.experts, grads.shape[1], rows.shape[1], device=device, dtype=kind)
        apart = where._replace(divisor=grad_divisor)
        for impl in (*(("cuda",) if on_hopper else ()), *impls):
            launch = launcher("grouped_outer", impl, device, kind)
            found[f"{name}: {impl}"] = operations, partial(launch, grads, rows, apart, row_divisor, out=out)

    gemm("b, second product transposed", upstream, w2, step.top_k)
    gemm("hidden states, first product transposed", of_product, w13, 1)
    outer("w13", of_product, 1, given.rows.detach(), step.top_k)
    outer("w2", upstream, step.top_k, middle, 1)
    results_of = WeightedGradients(
        torch.empty_like(of_product), torch.empty_like(middle), torch.empty(routes, device=device)
    )
    factors = given.factors.detach().flatten()
    for impl in impls:
        launch = launcher("weighted_activate_backward", impl, device, kind)
        found[f"activation: {impl}"] = (
            0,
            partial(launch, of_product, middle, factors, Activation(), gated=True, out=results_of),
        )
    return found


# Cells


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Cell(NamedTuple):
    """A model at a number of tokens, on a machine."""

    model: str
    step: TrainingStep
    rates: timing.Rates

    def row(self, op: str, provider: str, impl: str, operations: int, times: timing.Times | None) -> dict[str, Any]:
        """A row of a result file; without times where an answer is wrong."""
        limits = self.rates.times_us(0, operations, torch.bfloat16)
        found = {
            "op": op, "workload": self.model, "routing": "uniform", "sizes": self.step._asdict(), "provider": provider,
            "impl": impl, "mode": "eager", "time_us": None, "time_us_p10": None, "time_us_p90": None, **limits,
            "correct": times is not None,
        }  # fmt: skip
        if times is not None:
            found |= {"time_us": round(times.median, 3), "time_us_p10": round(times.p10, 3)}
            found |= {"time_us_p90": round(times.p90, 3), "rounds": len(times.samples)}
            found["tflops"] = round(operations / times.median / 1e6, 3)
            say(f"  {op}, {provider} {impl}: {times.median:.0f} us, {found['tflops']:.0f} TFLOP/s")
        return found


def judged(provider: Provider, given: Inputs, bound: float, exact: Any, honest: dict[str, float]) -> dict[str, Any]:
    """Errors and peak memory of a provider's step; `wrong` says why it is not timed."""
    try:
        found: dict[str, Any] = {"errors": errors(of_some(given, train(provider, given)), exact)}
        wrong = [key for key, off in found["errors"].items() if not off <= bound * honest[key] + 1e-6]
        if wrong:
            found["wrong"] = f"gradients of {wrong} err more than {bound} times an honest computation's"
        return found | {"honest_errors": honest, "peak_bytes": peak_of(partial(train, provider, given))}
    except Exception as problem:  # a peer's: whatever it is, it is that row's
        return {"wrong": f"{type(problem).__name__}: {problem}"[:300]}


def measure(cell: Cell, device: torch.device, until: float, *, of_parts: bool) -> list[dict[str, Any]]:
    """The rows of a cell."""
    step, clock, given = cell.step, Clock(device), draw(cell.step, device)
    exact, honest = some_gradients(given, torch.float64), some_gradients(given, given.rows.dtype)
    of_honest, found = errors(honest, exact), {}
    for who, provider in providers().items():
        start = time.monotonic()
        with training_peers.tuning_in_parallel() if clock.on_gpu else contextlib.nullcontext():
            found[who] = judged(provider, given, _OURS if who[0] == "moeyard" else _OTHERS, exact, of_honest)
        say(f"  {' '.join(who)}: {found[who].get('wrong', 'right')}, {time.monotonic() - start:.1f} s")
    values = rounded(given)
    wide = some_gradients(values, torch.float64, rounded_rows)
    of_rounded = errors(some_gradients(values, given.rows.dtype, rounded_rows), wide)
    fp8 = judged(at_a_scheme, given, _ROUNDED, wide, of_rounded)
    del values
    say(f"  {_FP8}: {fp8.get('wrong', 'right')}")
    for save, who in SAVES.items():
        found[who]["kept_bytes_by_hand"] = kept_bytes(step, save)
        copied = {str(copied): peak_bytes(step, save, copied=copied) for copied in (False, True)}
        found[who]["peak_bytes_by_hand"] = copied
    calls: dict[Any, Callable[[], object]] = {
        who: partial(train, provider, given) for who, provider in providers().items() if "wrong" not in found[who]
    }
    detached = given._replace(**{name: getattr(given, name).detach() for name in ("rows", "factors", "w13", "w2")})
    if "wrong" not in fp8:
        calls[_FP8] = partial(train, at_a_scheme, given)
    calls["forward"] = partial(ours(), detached)
    calls["forward"]()  # kernels are there
    times = in_turn(calls, clock, until)
    rows = [cell.row("training step", *who, step.flops, times.get(who)) | more for who, more in found.items()]
    rows.append(cell.row(_FP8, "moeyard", _AUTO, step.flops, times.get(_FP8)) | fp8)
    rows.append(cell.row("forward", "moeyard", _AUTO, step.flops // 3, times["forward"]))
    if of_parts:
        named = parts(given, step)
        for _, call in named.values():
            call()  # kernels are there
        for name, taken in in_turn({key: call for key, (_, call) in named.items()}, clock, until).items():
            part, _, impl = name.partition(": ")
            rows.append(cell.row(f"part: {part}", "moeyard", impl, named[name][0], taken))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures cell by cell and writes the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=int, default=1, help="sizes of matrices are divided by it")
    parser.add_argument("--no-parts", action="store_true", help="only whole steps")
    given = parser.parse_args(arguments)
    device, end = torch.device(given.device), time.monotonic() + given.time_limit
    rates, rows = timing.rates(device), []
    machine = results.machine(device, rates)
    cells = [(model, int(tokens)) for tokens in given.tokens.split(",") for model in given.models.split(",")]
    versions = peers.versions(device) | training_peers.versions()
    for i, (model, tokens) in enumerate(cells):
        left = end - time.monotonic()
        if left < _LEAST_S:
            say(f"{model}, {tokens} tokens: no time is left")
            continue
        say(f"{model}, {tokens} tokens; {left:.0f} s are left")
        until = time.monotonic() + left / (len(cells) - i)
        cell = Cell(model, step_of(model, tokens, given.scale), rates)
        rows += measure(cell, device, until, of_parts=not given.no_parts)
        results.write(given.out, results.document(rows, machine, versions))
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
