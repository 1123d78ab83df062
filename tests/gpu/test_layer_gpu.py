"""Router, products and experts on a GPU, by the `torch` implementation: right, without host syncs, in graphs."""

import pytest
import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, ExpertWeights, Routing
from moeyard.testing import plain_experts, routing_error

CUDA = torch.device("cuda")


def draw(tokens: int, experts: int, top_k: int, hidden: int, size: int, dtype: torch.dtype, bias: bool):  # type: ignore[no-untyped-def]
    weights = ExpertWeights(
        (torch.randn(experts, 2 * size, hidden, device=CUDA) / hidden**0.5).to(dtype),
        (torch.randn(experts, hidden, size, device=CUDA) / size**0.5).to(dtype),
        torch.randn(experts, 2 * size, device=CUDA).to(dtype) if bias else None,
        torch.randn(experts, hidden, device=CUDA).to(dtype) if bias else None,
    )
    ids = torch.randint(-1, experts + 1, (tokens, top_k), device=CUDA, dtype=torch.int32)
    return (
        torch.randn(tokens, hidden, device=CUDA).to(dtype),
        Routing(torch.rand(tokens, top_k, device=CUDA), ids),
        weights,
    )


def on_host(weights: ExpertWeights) -> ExpertWeights:
    tensors = (weights.w13, weights.w2, weights.w13_bias, weights.w2_bias)
    return ExpertWeights(*(None if t is None else t.cpu() for t in tensors), weights.gated)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "size", [(0, 4, 2, 64, 32), (1, 8, 2, 128, 96), (70, 5, 3, 100, 37), (300, 16, 4, 512, 256)], ids=str
)
def test_fused_experts(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    rows, routing, weights = draw(*size, dtype, bias=True)
    got = moeyard.fused_experts(rows, routing, weights, activation=GPT_OSS_ACTIVATION)
    host = Routing(routing.topk_weights.cpu(), routing.topk_ids.cpu())
    wide = plain_experts(rows.cpu(), host, on_host(weights), GPT_OSS_ACTIVATION, dtype=torch.float64)
    if wide.numel():
        allowed = (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
        error = (got.cpu().double() - wide).square().mean().sqrt() / wide.square().mean().sqrt().clamp(min=1e-9)
        assert float(error) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_router(dtype: torch.dtype) -> None:
    logits, bias = torch.randn(200, 256, device=CUDA).to(dtype), torch.randn(256, device=CUDA) * 0.1
    assert routing_error(logits.float().contiguous(), moeyard.route(logits.float(), top_k=8), renormalize=False) is None
    options = {"scoring": "sigmoid", "selection_bias": bias, "num_groups": 8, "top_k_groups": 4, "renormalize": True}
    got = moeyard.route(logits, top_k=8, **options)  # type: ignore[arg-type]
    assert routing_error(logits, got, **options) is None  # type: ignore[arg-type]


def test_a_layer_in_a_graph_follows_its_inputs() -> None:
    rows, _, weights = draw(48, 8, 2, 128, 64, torch.bfloat16, bias=False)
    router = torch.randn(8, 128, device=CUDA)

    def layer() -> torch.Tensor:
        return moeyard.moe_layer(rows, router, weights, top_k=2, renormalize=True)

    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for _ in range(2):
        rows.copy_(torch.randn_like(rows))
        graph.replay()
        assert torch.equal(out, layer())


def test_layers_captured_from_one_pool_follow_changed_routing() -> None:
    """As engines capture: layers one after the other in a graph per batch size, and all graphs share their memory."""
    layers = [(draw(48, 8, 2, 128, 64, torch.bfloat16, bias=False)[2], torch.randn(8, 128, device=CUDA)) for _ in "abc"]

    def model(rows: torch.Tensor) -> torch.Tensor:
        for weights, router in layers:
            rows = rows + 0.1 * moeyard.moe_layer(rows, router, weights, top_k=2, renormalize=True)
        return rows

    pool, captured = torch.cuda.graph_pool_handle(), []
    for tokens in (64, 17, 1):
        rows = torch.randn(tokens, 128, device=CUDA, dtype=torch.bfloat16)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = model(rows)
        captured.append((graph, rows, out))
    for _ in range(3):
        for graph, rows, out in captured:
            rows.copy_(torch.randn_like(rows))
            graph.replay()
            assert torch.equal(out, model(rows))
