"""Compiles or loads ahead of time what first calls would otherwise wait for."""

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Unpack

import torch

from moeyard.activation import activate
from moeyard.combine import combine, moe_sum
from moeyard.dispatch.call import LayerFacts
from moeyard.dispatch.checks import check_int
from moeyard.dispatch.invariance import batch_invariance
from moeyard.dispatch.schemes import TAKES, refusal_of
from moeyard.dispatch.table import companion, explain
from moeyard.experts import fused_experts
from moeyard.grouped_gemm import grouped_gemm
from moeyard.layer import moe_layer
from moeyard.layout import batched_moe_align_block_size, moe_align_block_size, moe_lora_align_block_size
from moeyard.permute import permute, shuffle_rows
from moeyard.router import route, route_and_align
from moeyard.values import Activation, ExpertWeights, Router, RouterOptions, Routing

Progress = Callable[[str, int], Callable[[], object]]
"""(what begins, how many steps it has) -> what is called after each step."""


def warmup(
    weights: ExpertWeights | str | torch.device | None = None,
    *,
    device: str | torch.device | None = None,
    max_tokens: int = 16384,
    activation: Activation | None = None,
    num_experts: int | None = None,
    mapped: bool = False,
    shared: ExpertWeights | None = None,
    block_sizes: tuple[int, ...] = (1, 16),
    arch: str | None = None,
    jobs: int | None = None,
    impl: str = "auto",
    batch_invariant: bool | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    top_k: int | None = None,
    scoring: str = "softmax",
    renormalize: bool = False,
    selection_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    routed_scaling_factor: float = 1.0,
) -> dict[str, float]:
    """Makes kernels ahead of time, so that calls need not wait for a compiler.

    With weights: those of a layer. All numbers of tokens are walked, what the cache lacks is compiled in processes of
    its own, and where the weights are on a GPU everything is loaded there and called once. Calls that are meant have
    int32 ids, and tensors that are dense and begin at multiples of 16 bytes. Without: one small call of every operator.

    Args:
        weights: [num_local_experts, ...] as in `fused_experts`, of 16 bits, codes of 8 bits, or tiles of 4 bits. Only
            their sizes count, and meta tensors will do. Instead of weights a device may be given.
        device: without weights the device to warm up; the CPU, and CUDA where there is one, unless given.
        max_tokens: the most tokens of a call.
        activation, num_experts, shared: as in `fused_experts` and `moe_layer`.
        mapped: whether calls have an expert map.
        block_sizes: of alignments.
        arch: what weights that are not on a GPU are compiled for, such as "sm_90a". It needs no GPU.
        jobs: processes that compile; as many as this process has cores unless given.
        impl: that of the experts: "auto", "cuda" or "triton".
        batch_invariant: whether calls of experts are, as in `fused_experts`. Then products of a router of the dtype of
            the weights are made, too, with a bias if experts have biases.
        dtype: of hidden states, bfloat16 or float16; that of the weights, or beside codes bfloat16, unless given.
        progress: is told what begins, and called after each step of it.
        top_k, scoring, renormalize, selection_bias, num_groups, top_k_groups, routed_scaling_factor: as in `route`;
            with weights `top_k` must be given.

    Returns the seconds that each part took: with weights "cuda: N kernels compiled" and the like, else
    "<op> <impl> <device>". An interrupt ends all processes and keeps what was compiled. Raises TypeError or ValueError
    naming the argument, and RuntimeError with the compiler's words.
    """
    if not isinstance(weights, ExpertWeights):
        return _small_calls(weights if device is None else device)
    if top_k is None:
        raise TypeError("top_k: expected the number of experts of a token, got none")
    if impl not in ("auto", "cuda", "triton"):
        raise ValueError(f"impl: expected 'auto', 'cuda' or 'triton', got {impl!r}")
    dtype = _dtype_of_rows(weights, dtype, impl)
    for name, value in (("max_tokens", max_tokens), ("jobs", jobs)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    place = weights.w13.device
    capability = torch.cuda.get_device_capability(place) if place.type == "cuda" else _capability(arch, place)
    router: RouterOptions = {
        "top_k": top_k, "scoring": scoring, "renormalize": renormalize, "selection_bias": selection_bias,
        "num_groups": num_groups, "top_k_groups": top_k_groups, "routed_scaling_factor": routed_scaling_factor,
    }  # fmt: skip
    check_int("top_k", top_k, low=1, high=num_experts or weights.num_local_experts)
    facts = facts_of(
        weights, activation=activation, num_experts=num_experts, mapped=mapped, shared=shared, block_sizes=block_sizes,
        batch_invariant=batch_invariance(batch_invariant), dtype=dtype, **router,
    )  # fmt: skip
    return _of_layer(facts, weights, shared, router, place, capability, max_tokens, jobs or cores(), impl, progress)


def _dtype_of_rows(weights: ExpertWeights, dtype: torch.dtype | None, impl: str) -> torch.dtype:
    """Of hidden states beside these weights. ValueError for weights or a dtype that no kernel here takes."""
    own, scheme = weights.w13.dtype, weights.scheme
    if scheme is None and own not in _ROWS:
        raise ValueError(f"weights: expected bfloat16 or float16, got {own}")
    found = dtype or (own if scheme is None else torch.bfloat16)
    if found not in _ROWS or (scheme is None and found != own):
        wanted = "bfloat16 or float16" if scheme is not None else str(own)
        raise ValueError(f"dtype: expected {wanted}, got {dtype}")
    labels = [label for label in TAKES if label.startswith(("cuda", "triton") if impl == "auto" else impl)]
    reasons = [refusal_of(label, scheme) for label in labels]
    if all(reasons):
        raise ValueError(f"weights: expected a scheme that one of {tuple(labels)} takes, got {str(scheme)!r}")
    return found


_ROWS = (torch.bfloat16, torch.float16)


def facts_of(
    weights: ExpertWeights,
    *,
    activation: Activation | None = None,
    num_experts: int | None = None,
    mapped: bool = False,
    shared: ExpertWeights | None = None,
    block_sizes: tuple[int, ...] = (1, 16),
    batch_invariant: bool = False,
    dtype: torch.dtype | None = None,
    **router: Unpack[RouterOptions],
) -> LayerFacts:
    """What kernels depend on of a layer that is called as the arguments of `warmup` say."""
    return LayerFacts(
        _on_meta(weights),
        Router(**{key: value for key, value in router.items() if key in Router._fields}),  # type: ignore[arg-type]
        num_experts or weights.num_local_experts,
        activation or Activation(),
        dtype or weights.w13.dtype,
        router.get("selection_bias") is not None,
        mapped,
        None if shared is None else _on_meta(shared),
        block_sizes,
        batch_invariant,
    )


def _of_layer(
    facts: LayerFacts,
    weights: ExpertWeights,
    shared: ExpertWeights | None,
    router: RouterOptions,
    place: torch.device,
    capability: tuple[int, int],
    max_tokens: int,
    jobs: int,
    impl: str,
    progress: Progress | None,
) -> dict[str, float]:
    from moeyard.cuda import ahead
    from moeyard.cuda.walk import products_refuse

    report = progress or (lambda _what, _steps: lambda: None)
    seconds: dict[str, float] = {}
    there = place.type == "cuda"
    index = place.index if there else None
    hopper = capability == (9, 0)
    by_cuda = impl == "cuda" or (impl == "auto" and hopper)
    by_triton = impl == "triton" or (impl == "auto" and (not hopper or products_refuse(facts) is not None))
    start = time.perf_counter()
    made = ahead.compile_layer(
        facts, capability, max_tokens, jobs, lambda n: report("cuda kernels", n),
        experts=by_cuda, device=index,
    )  # fmt: skip
    seconds[f"cuda: {made} kernels compiled"] = time.perf_counter() - start
    if by_triton:
        from moeyard.triton.ahead import compile_layer
        from moeyard.triton.launch import card

        start = time.perf_counter()
        made = compile_layer(
            facts, capability, max_tokens, jobs, lambda n: report("triton kernels", n), card(place) if there else None
        )
        seconds[f"triton: {made} kernels compiled"] = time.perf_counter() - start
    if there:
        start = time.perf_counter()
        counts = ahead.load_layer(facts, place.index, max_tokens, experts=by_cuda)
        if by_triton:
            counts = sorted({*counts, *_few_of(max_tokens)})
        seconds[f"{place}: kernels loaded"] = time.perf_counter() - start
        start, step = time.perf_counter(), report("calls", len(counts))
        for count in counts:
            _call_layer(facts, weights, shared, router, place, count, impl)
            step()
        torch.cuda.synchronize(place)
        seconds[f"{place}: {len(counts)} sizes called"] = time.perf_counter() - start
    return seconds


def _call_layer(
    facts: LayerFacts,
    weights: ExpertWeights,
    shared: ExpertWeights | None,
    router: RouterOptions,
    place: torch.device,
    tokens: int,
    impl: str,
) -> None:
    """Every operator of a layer once, on random tokens."""
    hidden = torch.randn(tokens, weights.hidden_size, device=place).to(facts.dtype)
    logits = torch.randn(tokens, facts.num_experts, device=place).to(facts.dtype)
    mapping = None
    if facts.mapped:
        mapping = torch.arange(facts.num_experts, dtype=torch.int32, device=place)
        mapping[mapping >= weights.num_local_experts] = -1
    routing = route(logits, **router)
    local = {"expert_map": mapping, "num_local_experts": weights.num_local_experts}
    for block_size in facts.block_sizes:
        route_and_align(logits, block_size=block_size, **local, **router)  # type: ignore[arg-type]
        moe_align_block_size(routing.topk_ids, num_experts=facts.num_experts, block_size=block_size, **local)  # type: ignore[arg-type]
    layout = moe_align_block_size(routing.topk_ids, num_experts=facts.num_experts, block_size=1, **local)  # type: ignore[arg-type]
    rows = permute(hidden, layout).rows
    combine(rows, layout, routing.topk_weights)
    moe_sum(rows.new_empty(tokens, router["top_k"], weights.hidden_size))
    fused_experts(
        hidden, routing, weights, activation=facts.activation, num_experts=facts.num_experts, expert_map=mapping,
        batch_invariant=facts.batch_invariant, impl=impl,
    )  # fmt: skip
    if facts.batch_invariant and not facts.mapped:  # the router's product, too
        router_weight = hidden.new_zeros(facts.num_experts, weights.hidden_size)
        router_bias = None if weights.w13_bias is None else hidden.new_zeros(facts.num_experts)
        moe_layer(
            hidden, router_weight, weights, router_bias=router_bias, activation=facts.activation, batch_invariant=True,
            impl=impl, **router,
        )  # fmt: skip
    if shared is not None:
        everyone = torch.zeros(tokens, 1, dtype=torch.int32, device=place)
        alike = Routing(torch.ones(tokens, 1, device=place), everyone)
        fused_experts(
            hidden, alike, shared, activation=facts.activation, batch_invariant=facts.batch_invariant, impl=impl
        )


def _few_of(most: int) -> Iterator[int]:
    """Powers of two and their neighbours, up to the most: Triton's plans change near them."""
    for count in (2**i + off for i in range(most.bit_length()) for off in (0, 1)):
        if count <= most:
            yield count
    yield most


def _on_meta(weights: ExpertWeights) -> ExpertWeights:
    b13, b2 = (None if bias is None else bias.to("meta") for bias in (weights.w13_bias, weights.w2_bias))
    scales = None if weights.scales is None else weights.scales.moved(lambda tensor: tensor.to("meta"))
    return ExpertWeights(weights.w13.to("meta"), weights.w2.to("meta"), b13, b2, weights.gated, weights.scheme, scales)


def _capability(arch: str | None, place: torch.device) -> tuple[int, int]:
    """The compute capability that an architecture's name stands for."""
    found = re.fullmatch(r"sm_(\d+)(\d)a?", arch or "")
    if found is None:
        wanted = "an architecture such as 'sm_90a'"
        raise ValueError(f"arch: expected {wanted} for weights on {place.type}, got {arch!r}")
    return int(found[1]), int(found[2])


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _small_calls(device: str | torch.device | None) -> dict[str, float]:
    """Makes one small call of every operator; the seconds that each "<op> <impl> <device>" took."""
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
