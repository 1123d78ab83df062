"""Experts with weights of 4 bits on the GPU: few tokens and Triton, against float64, repeatable, in graphs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moeyard import (
    GPT_OSS_ACTIVATION,
    Activation,
    ExpertWeights,
    Routing,
    explain,
    fused_experts,
    pack_experts,
    unpack_experts,
)
from moeyard.cuda.experts import four_bits
from moeyard.dispatch import table
from moeyard.quant import MXFP4, NVFP4, QuantScheme, int4_scheme
from moeyard.testing import draw_routing, guard_broken, poisoned, same_bits
from moeyard.testing.budgets import judged_experts
from moeyard.testing.quantised import draw_quantised, moved_to

REFUSAL = table.explain("route", "cuda").reasons["cuda"]
pytestmark = pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}")
CUDA = torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
IMPLS = ("cuda", "triton") if HOPPER else ("triton",)
SCHEMES = (
    MXFP4, NVFP4, int4_scheme(), int4_scheme(32), int4_scheme(64), int4_scheme(0), int4_scheme(128, zero_points=True),
    int4_scheme(32, zero_points=True), int4_scheme(0, zero_points=True),
)  # fmt: skip
MODELS = {  # top_k, hidden size, intermediate size, experts (fewer than the models have), tokens
    "gpt-oss-120b": (4, 2880, 2880, 16, (1, 8, 64)),
    "Qwen3-30B": (8, 2048, 768, 32, (1, 5, 64)),
    "Mixtral": (2, 4096, 1792, 8, (1, 7, 64)),
    "Qwen3-Next": (10, 2048, 512, 64, (1, 3, 33)),
    "small": (3, 64, 64, 5, (1, 2, 17, 40)),
}


def drawn(model: str, scheme: QuantScheme, dtype: torch.dtype, **options: Any) -> tuple[ExpertWeights, ExpertWeights]:
    """A layer on the host in rows, and on the GPU in tiles."""
    _, hidden, size, experts, _ = MODELS[model]
    host = draw_quantised(experts, hidden, size, scheme, dtype, **options)
    return host, pack_experts(moved_to(host, CUDA), in_place=True)


def rows_of(tokens: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of several magnitudes, between NaN."""
    room = torch.full((tokens, hidden + 128), torch.nan, dtype=dtype, device=CUDA)
    room[:, 64:-64] = torch.randn(tokens, hidden).to(dtype) * torch.exp2(torch.randint(-3, 4, (tokens, 1))).to(dtype)
    return room[:, 64:-64]


def wrong(got: torch.Tensor, rows: torch.Tensor, routing: Routing, host: ExpertWeights, **options: Any) -> str | None:
    """Every row against float64, on the GPU."""
    on_gpu = moved_to(host, CUDA)
    with torch.device(CUDA):
        judged = judged_experts(rows, routing, on_gpu, **options)
    return type(judged)(judged.wide.cpu(), judged.budget.cpu()).error(got)


def asked(impl: str, tokens: int, top_k: int, weights: ExpertWeights) -> bool:
    return impl in explain("fused_experts", "cuda", num_tokens=tokens, top_k=top_k, weights=weights).able


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_models(model: str, scheme: QuantScheme) -> None:
    top_k, hidden, _, experts, counts = MODELS[model]
    oss = model == "gpt-oss-120b"
    host, weights = drawn(model, scheme, torch.bfloat16, bias=oss)
    options = {"activation": GPT_OSS_ACTIVATION if oss else Activation()}
    for tokens in counts:
        rows, routing = rows_of(tokens, hidden, torch.bfloat16), draw_routing(tokens, experts, top_k, device=CUDA)
        for impl in IMPLS:
            if not asked(impl, tokens, top_k, weights):
                continue
            out = poisoned(tuple(rows.shape), rows.dtype, CUDA)
            got = fused_experts(rows, routing, weights, impl=impl, out=out, **options)
            assert not guard_broken(out)
            assert wrong(got, rows, routing, host, **options) is None, f"{impl}, {tokens} tokens"
            mistaken = Routing(routing.topk_weights.roll(1, 1), routing.topk_ids)
            assert wrong(got, rows, mistaken, host, **options) is not None
            again = (fused_experts(rows, routing, weights, impl=impl, **options) for _ in range(10))
            assert all(same_bits(one, got) for one in again)
    assert impl == "triton"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["float16", "on input", "not gated", "mapped", "one expert"])
def test_every_kind_of_call(kind: str, scheme: QuantScheme) -> None:
    top_k, hidden, _, experts, _ = MODELS["small"]
    dtype = torch.float16 if kind in ("float16", "not gated") else torch.bfloat16
    host, weights = drawn("small", scheme, dtype, gated=kind != "not gated", bias=kind != "mapped")
    tokens = 21
    rows = rows_of(tokens, hidden, dtype)
    options: dict[str, Any] = {
        "activation": Activation("relu2") if kind == "not gated" else GPT_OSS_ACTIVATION,
        "apply_router_weight_on_input": kind == "on input",
    }
    ids = torch.randint(-1, 2 * experts + 1, (tokens, top_k), dtype=torch.int64)
    if kind == "mapped":
        options["expert_map"] = torch.where(
            torch.arange(2 * experts) % 2 == 0, torch.arange(2 * experts) // 2, -1
        ).int()
        options["expert_map"] = options["expert_map"].to(CUDA)
    if kind == "one expert":
        ids = torch.full((tokens, top_k), 2)
    routing = Routing(torch.rand(tokens, top_k, device=CUDA), ids.to(CUDA))
    for impl in IMPLS:
        got = fused_experts(rows, routing, weights, impl=impl, **options)
        assert wrong(got, rows, routing, host, **options) is None, impl
        strange = rows.clone()
        strange[0, 3], strange[1, 5] = torch.nan, -torch.inf
        got = fused_experts(strange, routing, weights, impl=impl, **options)
        assert wrong(got, strange, routing, host, **options) is None, f"{impl}: bad values stay in their rows"


@pytest.mark.parametrize("scheme", [MXFP4, int4_scheme(), NVFP4], ids=str)
@pytest.mark.parametrize("model", ["gpt-oss-120b", "Qwen3-30B"])
def test_the_same_bits_over_100_runs_and_in_graphs(model: str, scheme: QuantScheme) -> None:
    top_k, hidden, _, experts, counts = MODELS[model]
    _, weights = drawn(model, scheme, torch.bfloat16)
    for tokens in (*counts, 300):
        rows, routing = rows_of(tokens, hidden, torch.bfloat16), draw_routing(tokens, experts, top_k, device=CUDA)
        for impl in IMPLS:
            if not asked(impl, tokens, top_k, weights):
                continue
            first = fused_experts(rows, routing, weights, impl=impl)
            assert all(same_bits(fused_experts(rows, routing, weights, impl=impl), first) for _ in range(100))
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                for _ in range(3):
                    out = fused_experts(rows, routing, weights, impl=impl)
            other, scaled = draw_routing(tokens, experts, top_k, device=CUDA), torch.randn_like(rows)
            wanted = fused_experts(scaled, other, weights, impl=impl)
            routing.copy_(other), rows.copy_(scaled)
            captured.replay()
            assert same_bits(out, wanted), f"{impl}, {tokens} tokens"


@pytest.mark.skipif(not HOPPER, reason="bulk copies came with compute capability 9.0")
def test_nobody_and_everybody() -> None:
    """Routes that all are dropped give zeros; as many routes as the launches take stay right."""
    scheme = MXFP4
    top_k, hidden, _, experts, _ = MODELS["Qwen3-Next"]
    host, weights = drawn("Qwen3-Next", scheme, torch.bfloat16)
    rows, routing = rows_of(64, hidden, torch.bfloat16), draw_routing(64, experts, top_k, device=CUDA)
    got = fused_experts(rows, routing, weights, impl="cuda")
    assert wrong(got, rows, routing, host) is None
    routing.topk_ids.fill_(-1)
    assert not fused_experts(rows, routing, weights, impl="cuda").any()
    assert four_bits.unfit is not None


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packing_on_the_gpu_keeps_every_bit(scheme: QuantScheme) -> None:
    host = draw_quantised(3, 192, 128, scheme, torch.bfloat16)
    packed = pack_experts(moved_to(host, CUDA), in_place=True)
    elsewhere = moved_to(pack_experts(host), CUDA)
    assert torch.equal(packed.w13, elsewhere.w13) and torch.equal(packed.w2, elsewhere.w2)
    back = unpack_experts(packed, in_place=True)
    assert torch.equal(back.w13.cpu(), host.w13) and torch.equal(back.w2.cpu(), host.w2)
    assert replace(packed.scheme, tiled=False) == scheme  # type: ignore[type-var]
