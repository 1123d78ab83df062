"""Triton's experts of 8-bit codes on the GPU at hand: against float64 by the rule, repeatable, under a graph."""

import pytest
import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, Activation, Routing
from moeyard.dispatch import table
from moeyard.dispatch.schemes import TAKES
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, INT8_CHANNEL, QuantScheme
from moeyard.testing import draw_quantised, draw_routing, guard_broken, judged_experts, poisoned, same_bits
from moeyard.testing.quantised import SCHEMES, moved_to

REFUSAL = table.explain("activate", "cuda").reasons["triton"]
pytestmark = pytest.mark.skipif(not REFUSAL.startswith(("chosen", "comes")), reason=f"triton: {REFUSAL}")
CUDA = torch.device("cuda")
TENSOR_CORE_UNIT = 2.0**-13
"""What tensor cores round of a sum of 8-bit floats, which they align to about 14 bits."""
OURS = [scheme for scheme in SCHEMES if TAKES["triton"](scheme)]
SIZES = {  # tokens, experts, top_k, hidden size, intermediate size
    "one token": (1, 16, 4, 512, 256),
    "few rows": (24, 8, 2, 400, 272),
    "tall tiles": (900, 4, 2, 1040, 912),
    "many routes": (1500, 24, 4, 384, 528),
}


@pytest.mark.parametrize("scheme", OURS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_layers(size: str, scheme: QuantScheme) -> None:
    tokens, experts, top_k, hidden_size, middle = SIZES[size]
    i = (list(SIZES).index(size) + OURS.index(scheme)) % 3
    dtype = (torch.bfloat16, torch.float16, torch.float32)[i]
    activation = (Activation(), GPT_OSS_ACTIVATION, Activation("relu2"))[i]
    start = 34 % scheme.period if i else 0
    host = draw_quantised(experts, hidden_size, middle, scheme, dtype, gated=i != 2, bias=i > 0, block_start=start)
    rows, routing = torch.randn(tokens, hidden_size).to(dtype), draw_routing(tokens, experts, top_k)
    judged = judged_experts(rows, routing, host, activation=activation, unit=TENSOR_CORE_UNIT)
    there, weights = Routing(routing.topk_weights.to(CUDA), routing.topk_ids.to(CUDA)), moved_to(host, CUDA)

    def answer() -> torch.Tensor:
        torch.full((1 << 22,), torch.nan, device=CUDA)
        out = poisoned((tokens, hidden_size), dtype, CUDA)
        moeyard.fused_experts(rows.to(CUDA), there, weights, activation=activation, out=out, impl="triton")
        assert not guard_broken(out)
        return out

    got = answer()
    assert judged.error(got) is None
    assert all(same_bits(answer(), got) for _ in range(3))


@pytest.mark.parametrize("scheme", [FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL], ids=str)
def test_a_graph_is_replayed_with_other_routes(scheme: QuantScheme) -> None:
    tokens, experts = 64, 16
    weights = moved_to(draw_quantised(experts, 512, 256, scheme), CUDA)
    rows = torch.randn(tokens, 512, device=CUDA).bfloat16()
    ids, factors = torch.zeros(tokens, 2, dtype=torch.int32, device=CUDA), torch.rand(tokens, 2, device=CUDA)
    out = torch.empty_like(rows)
    moeyard.fused_experts(rows, Routing(factors, ids), weights, out=out, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moeyard.fused_experts(rows, Routing(factors, ids), weights, out=out, impl="triton")
    for _ in range(3):
        ids.copy_(torch.randint(0, experts, (tokens, 2)))
        graph.replay()
        assert same_bits(moeyard.fused_experts(rows, Routing(factors, ids), weights, impl="triton"), out)
