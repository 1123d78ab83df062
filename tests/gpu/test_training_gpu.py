"""Gradients of experts on a GPU: errors of an honest computation, the same bits every time, what is kept."""

import pytest
import torch

import moeyard
from moeyard import ExpertWeights, Routing
from moeyard.testing import impls_on, same_bits
from moeyard.testing.layers import draw_routing, draw_weights, plain_experts

CUDA = torch.device("cuda")
IMPLS = [name for name in impls_on("fused_experts", CUDA) if name != "reference"]
SHAPES = {"several rows": (256, 8, 2, 256, 128), "odd": (130, 5, 3, 100, 36), "decode": (3, 16, 4, 512, 256)}
"""Tokens, experts, top_k, hidden_size, intermediate_size."""


def drawn(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, Routing, list[torch.Tensor]]:
    tokens, experts, top_k, hidden, size = SHAPES[name]
    weights = draw_weights(experts, hidden, size, dtype, bias=True, device=CUDA)
    rows = torch.randn(tokens, hidden, device=CUDA).to(dtype)
    kept = [t for t in (weights.w13, weights.w2, weights.w13_bias, weights.w2_bias) if t is not None]
    return rows, draw_routing(tokens, experts, top_k, device=CUDA), kept


@pytest.mark.parametrize("save", ["product", "inputs"])
@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_honest_and_repeatable(name: str, dtype: torch.dtype, impl: str, save: str) -> None:
    rows, routing, weights = drawn(name, dtype)
    upstream = torch.randn_like(rows)

    def gradients(plain: torch.dtype | None) -> list[torch.Tensor]:
        given = (rows, routing.topk_weights, *weights)
        mine = [t.detach().to(torch.promote_types(plain or t.dtype, t.dtype)).requires_grad_() for t in given]
        call = mine[0], Routing(mine[1], routing.topk_ids), ExpertWeights(*mine[2:])
        answer = moeyard.fused_experts(*call, impl=impl, save=save) if plain is None else plain_experts(*call)
        return [*torch.autograd.grad(answer, mine, upstream.to(answer.dtype))]

    try:
        found = gradients(None)
    except ValueError as refusal:
        if "refuses" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    assert all(same_bits(a, b) for a, b in zip(found, gradients(None), strict=True))
    wide, honest = gradients(torch.float64), gradients(dtype)
    times = 1.1 if dtype.itemsize == 2 else 2
    for ours, theirs, exact in zip(found, honest, wide, strict=True):
        of_ours, of_theirs = ((t.double() - exact).square().mean().sqrt() for t in (ours, theirs))
        assert float(of_ours) <= times * float(of_theirs) + 1e-6 * float(exact.abs().max())


def test_a_backward_waits_for_no_device_value() -> None:
    rows, routing, weights = drawn("several rows", torch.bfloat16)
    given = [t.requires_grad_() for t in (rows, *weights)]
    moeyard.fused_experts(rows, routing, ExpertWeights(*weights)).sum().backward()  # kernels are there
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moeyard.fused_experts(rows, routing, ExpertWeights(*weights)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.grad is not None for t in given)
