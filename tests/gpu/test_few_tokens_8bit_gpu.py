"""The experts of a few tokens with weights of 8 bits on the GPU: against float64 by the rule, repeatable, in graphs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing, fused_experts
from moeyard.cuda.experts.few_tokens import fused_experts_launch
from moeyard.cuda.experts.few_tokens_plan import ExpertSizes, few_tokens_plan
from moeyard.cuda.runtime.cards import card_of
from moeyard.dispatch import table
from moeyard.quant import (
    FP8_BLOCK,
    FP8_BLOCK_WEIGHTS,
    FP8_CHANNEL,
    FP8_TENSOR,
    FP8_TENSOR_STATIC,
    FP8_WEIGHTS,
    INT8_CHANNEL,
    INT8_WEIGHTS,
    QuantScheme,
)
from moeyard.testing import guard_broken, poisoned, same_bits
from moeyard.testing.budgets import judged_experts
from moeyard.testing.quantised import draw_quantised
from moeyard.values import ExpertCall

REFUSAL = table.explain("route", "cuda").reasons["cuda"]
pytestmark = [
    pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="bulk copies came with compute capability 9.0",
    ),
]
CUDA = torch.device("cuda")
SCHEMES = (
    FP8_TENSOR, FP8_TENSOR_STATIC, FP8_CHANNEL, FP8_BLOCK, FP8_WEIGHTS, FP8_BLOCK_WEIGHTS, INT8_CHANNEL, INT8_WEIGHTS,
    QuantScheme("int8", activations="int8", static=True),
    QuantScheme("int8", (128, 128), activations="int8"),
    QuantScheme("e4m3", (1, 0), activations="e4m3", activation_group=128),
    QuantScheme("e4m3", (128, 128), activations="e4m3", static=True),
)  # fmt: skip
MODELS = {  # top_k, hidden size, intermediate size (cut down, as are experts), where in a block, tokens
    "Qwen3-30B": (8, 2048, 768, 0, (1, 2, 4)),
    "Mixtral": (2, 4096, 1792, 0, (1, 3, 8)),
    "DeepSeek-V3": (8, 7168, 512, 0, (1, 3)),
    "Qwen3-30B / 4": (8, 2048, 192, 64, (1, 4)),
    "Qwen3-Next / 4": (10, 2048, 128, 0, (1, 2)),
    "odd": (3, 16 * 37, 16 * 29, 120, (1, 5, 7, 8)),
    "one word": (1, 16, 16, 112, (1, 6)),
}


def on_gpu(weights: ExpertWeights) -> ExpertWeights:
    """The same layer on the GPU, between bytes that are NaN as codes."""

    def between(codes: torch.Tensor) -> torch.Tensor:
        room = torch.full((codes.numel() + 8192,), 0x7F, dtype=torch.uint8, device=CUDA)
        room[4096:-4096] = codes.reshape(-1).view(torch.uint8).to(CUDA)
        return room[4096:-4096].view(codes.dtype).view(codes.shape)

    biases = (None if bias is None else bias.to(CUDA) for bias in (weights.w13_bias, weights.w2_bias))
    assert weights.scales is not None
    return ExpertWeights(
        between(weights.w13), between(weights.w2), *biases, weights.gated, weights.scheme,
        weights.scales.moved(lambda tensor: tensor.to(CUDA)),
    )  # fmt: skip


def draw(tokens: int, top_k: int, experts: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, Routing]:
    """Rows of several magnitudes, between NaN, and distinct experts of each token."""
    room = torch.full((tokens, hidden + 128), torch.nan, dtype=dtype, device=CUDA)
    room[:, 64:-64] = torch.randn(tokens, hidden).to(dtype) * torch.exp2(torch.randint(-3, 4, (tokens, 1))).to(dtype)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
    return room[:, 64:-64], Routing(torch.rand(tokens, top_k).to(CUDA), ids.to(CUDA))


def launch(rows: torch.Tensor, routing: Routing, weights: ExpertWeights, **options: Any) -> torch.Tensor:
    given = {"activation": Activation(), "num_experts": weights.num_local_experts, **options}
    out = poisoned(tuple(rows.shape), rows.dtype, CUDA)
    fused_experts_launch(rows, routing.topk_weights, routing.topk_ids, ExpertCall(weights, **given), out=out)
    assert not guard_broken(out)
    return out


def wrong(got: torch.Tensor, rows: torch.Tensor, routing: Routing, host: ExpertWeights, **options: Any) -> str | None:
    routing = Routing(routing.topk_weights.cpu(), routing.topk_ids.cpu())
    return judged_experts(rows.cpu(), routing, host, **options).error(got)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_models(model: str, scheme: QuantScheme) -> None:
    top_k, hidden, size, start, counts = MODELS[model]
    experts = top_k + 2
    host = draw_quantised(experts, hidden, size, scheme, block_start=start % scheme.period)
    weights = on_gpu(host)
    for tokens in counts:
        sizes = ExpertSizes(tokens, top_k, hidden, size, True, scheme, start % scheme.period)
        if few_tokens_plan(sizes, card_of(0)) is None:
            continue
        rows, routing = draw(tokens, top_k, experts, hidden, torch.bfloat16)
        got = launch(rows, routing, weights)
        assert wrong(got, rows, routing, host) is None
        mistaken = Routing(routing.topk_weights.roll(1, 1) if top_k > 1 else routing.topk_weights + 1, routing.topk_ids)
        assert wrong(got, rows, mistaken, host) is not None
        assert all(same_bits(launch(rows, routing, weights), got) for _ in range(20))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["gpt-oss", "on input", "not gated", "float16 scales"])
def test_every_kind_of_call(kind: str, scheme: QuantScheme) -> None:
    gated, start = kind != "not gated", 72 % scheme.period
    dtype = torch.float16 if kind in ("gpt-oss", "not gated") else torch.bfloat16
    host = draw_quantised(6, 784, 272, scheme, dtype, gated=gated, bias=kind == "gpt-oss", block_start=start)
    assert host.scales is not None
    if kind == "float16 scales":
        scales = host.scales
        host = replace(host, scales=replace(scales, w13=scales.w13.half(), w2=scales.w2.half()))
    weights = on_gpu(host)
    options: dict[str, Any] = {}
    if kind == "gpt-oss":
        options["activation"] = GPT_OSS_ACTIVATION
    if not gated:
        options["activation"] = Activation("relu2")
    rows, routing = draw(4, 5, 6, 784, dtype)
    got = launch(rows, routing, weights, weight_on_input=kind == "on input", **options)
    assert wrong(got, rows, routing, host, apply_router_weight_on_input=kind == "on input", **options) is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bad_values_stay_in_their_row(scheme: QuantScheme) -> None:
    host = draw_quantised(6, 512, 256, scheme)
    weights = on_gpu(host)
    rows, routing = draw(5, 3, 6, 512, torch.bfloat16)
    rows[0, 3], rows[1, -1], rows[3] = torch.nan, torch.inf, 0
    assert wrong(launch(rows, routing, weights), rows, routing, host) is None


def test_dropped_routes_and_maps() -> None:
    host = draw_quantised(5, 512, 192, FP8_BLOCK, bias=True, block_start=64)
    weights, experts = on_gpu(host), 11
    mapping = torch.tensor([-1, 3, 5, 0, 2**31 - 1, -7, 1, 2, 4, 9, -1], dtype=torch.int32)
    for tokens, top_k in ((1, 8), (4, 8), (32, 1)):
        rows = torch.randn(tokens, 512, device=CUDA).bfloat16()
        ids = torch.randint(-2, experts + 2, (tokens, top_k), device=CUDA)
        routing = Routing(torch.rand(tokens, top_k, device=CUDA), ids)
        got = launch(rows, routing, weights, expert_map=mapping.to(CUDA), num_experts=experts)
        assert wrong(got, rows, routing, host, expert_map=mapping, num_experts=experts) is None
        nobody = Routing(routing.topk_weights, torch.full_like(ids, -1))
        assert same_bits(launch(rows, nobody, weights), torch.zeros_like(rows))


@pytest.mark.parametrize("scheme", [FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL], ids=str)
def test_layers_that_overlap_in_a_graph(scheme: QuantScheme) -> None:
    """Each layer's tokens come from the one before it, whose end they overlap."""
    layers = [on_gpu(draw_quantised(16, 2048, 768, scheme)) for _ in range(4)]
    state = torch.randn(2, 2048, device=CUDA).bfloat16()
    ids = torch.stack([torch.randperm(16)[:8] for _ in range(2)]).int().to(CUDA)
    routing = Routing(torch.rand(2, 8, device=CUDA), ids)

    def whole(wait: bool) -> torch.Tensor:
        rows = state
        for weights in layers:
            out = torch.empty_like(rows)
            call = ExpertCall(weights, Activation(), 16)
            fused_experts_launch(rows, routing.topk_weights, routing.topk_ids, call, out=out)
            rows = out
            if wait:
                torch.cuda.synchronize()
        return rows

    whole(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = whole(False)
    for _ in range(20):
        state.copy_(torch.randn_like(state))
        alone = whole(True)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(result, alone) and bool(alone.isfinite().all())


def test_it_is_chosen() -> None:
    weights = on_gpu(draw_quantised(128, 256, 128, FP8_BLOCK))
    rows, routing = draw(1, 8, 128, 256, torch.bfloat16)
    seen = table.explain("fused_experts", "cuda", torch.bfloat16, num_tokens=1, top_k=8, weights=weights)
    assert seen.reasons["cuda (few tokens)"] == "chosen"
    assert same_bits(fused_experts(rows, routing, weights), launch(rows, routing, weights))
