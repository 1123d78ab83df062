"""Gradients that do not depend on the batch: of tokens and their routing, bit by bit; and what weights' promise."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

import moeyard
from moeyard import Activation, ExpertWeights, Routing
from moeyard.dispatch import table
from moeyard.reference.gradients import activate_backward, weighted_activate_backward
from moeyard.testing import (
    CPU,
    differing,
    draw_routing,
    draw_weights,
    guard_broken,
    impls_on,
    poisoned,
    same_bits,
    sub_batches,
)
from moeyard.values import WeightedGradients

pytestmark = pytest.mark.skipif("cpu" not in impls_on("fused_experts", CPU), reason="numba is not installed")
TOKENS, BATCHES = 150, 20
Tensors = tuple[torch.Tensor, ...]


def drawn(dtype: torch.dtype, **options: Any) -> tuple[Tensors, ExpertWeights]:
    """Hidden states, router weights, ids and upstream gradients; and experts."""
    routing = draw_routing(TOKENS, 6, 3)
    rows, upstream = torch.randn(TOKENS, 96).to(dtype), torch.randn(TOKENS, 96).to(dtype)
    return (rows, routing.topk_weights, routing.topk_ids, upstream), draw_weights(6, 96, 80, dtype, **options)


def gradients_of_tokens(weights: ExpertWeights, **options: Any) -> Callable[..., torch.Tensor]:
    """(rows, factors, ids, upstream) -> gradients of rows and of factors, side by side."""

    def call(rows: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        given = [t.clone().requires_grad_() for t in (rows, factors)]
        answer = moeyard.fused_experts(given[0], Routing(given[1], ids), weights, save="inputs", **options)
        found = torch.autograd.grad(answer, given, upstream)
        return torch.cat([one.float() for one in found], 1)

    return call


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        pytest.param(torch.float16, {"apply_router_weight_on_input": True}, marks=pytest.mark.full),
        (torch.float32, {"activation": Activation("gelu")}),
    ],
    ids=str,
)
def test_no_gradient_of_a_token_depends_on_its_batch(dtype: torch.dtype, options: dict[str, Any]) -> None:
    tensors, weights = drawn(dtype, bias=dtype != torch.float32)
    call = gradients_of_tokens(weights, batch_invariant=True, **options)
    count, wrong, first = differing(call, tensors, sub_batches(TOKENS, BATCHES, Random(1)))
    assert (count, wrong) == (BATCHES, 0), first


def test_a_derivative_that_depends_on_the_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's exponential has another result in the last elements of a tensor."""
    tensors, weights = drawn(torch.float32)
    right = moeyard.training.weighted_gradients
    monkeypatch.setattr(moeyard.training, "weighted_gradients", lambda *given: right(*given[:5], "torch"))
    _, wrong, _ = differing(
        gradients_of_tokens(weights, batch_invariant=True), tensors, sub_batches(TOKENS, BATCHES, Random(1))
    )
    assert wrong > 0


def test_gradients_of_weights_depend_on_their_own_tokens_alone() -> None:
    """Whatever goes to other experts, before, between or behind."""
    (rows, factors, ids, upstream), weights = drawn(torch.float32, bias=True)
    expert = 2

    def gradients(where: torch.Tensor) -> Tensors:
        given = (weights.w13, weights.w2, weights.w13_bias, weights.w2_bias)
        leaves = [t.detach().clone().requires_grad_() for t in given if t is not None]
        routing = Routing(factors[where], ids[where])
        answer = moeyard.fused_experts(
            rows[where], routing, ExpertWeights(*leaves), batch_invariant=True, save="inputs"
        )
        return tuple(one[expert] for one in torch.autograd.grad(answer, leaves, upstream[where]))

    mine = torch.where((ids == expert).any(1))[0]
    others = torch.where(~(ids == expert).any(1))[0]
    wanted = gradients(mine)
    for some in (others, others[:7]):
        among = torch.cat((mine, some)).sort().values
        assert all(same_bits(a, b) for a, b in zip(gradients(among), wanted, strict=True))
    reversed_ = gradients(mine.flip(0))
    assert not all(same_bits(a, b) for a, b in zip(reversed_, wanted, strict=True)), "their order counts"


def test_layers_depend_on_no_batch_as_far_as_experts_and_products_go() -> None:
    weights, shared = draw_weights(8, 64, 48, torch.bfloat16), draw_weights(1, 64, 32, torch.bfloat16)
    router = torch.randn(8, 64).bfloat16().requires_grad_()
    tensors = torch.randn(TOKENS, 64).bfloat16(), torch.randn(TOKENS, 64).bfloat16()

    def call(rows: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        given = rows.clone().requires_grad_()
        answer = moeyard.moe_layer(given, router, weights, shared=shared, top_k=2, batch_invariant=True, save="inputs")
        return torch.autograd.grad(answer, given, upstream)[0]

    count, wrong, first = differing(call, tensors, sub_batches(TOKENS, 20, Random(2)))
    assert (count, wrong) == (20, 0), first


def test_what_cannot_be_promised_is_refused() -> None:
    tensors, weights = drawn(torch.bfloat16)
    rows = tensors[0].clone().requires_grad_()
    answer = moeyard.fused_experts(rows, Routing(tensors[1], tensors[2]), weights, batch_invariant=True, save="inputs")
    with pytest.raises(ValueError, match="batch_invariant: expected False where gradients have gradients"):
        torch.autograd.grad(answer.sum(), rows, create_graph=True)
    said = moeyard.explain("weighted_activate_backward", batch_invariant=True).reasons
    assert said["cpu"] == "chosen" and said["torch"].startswith("promises no batch-invariant result")
    arguments = (torch.randn(3, 8), torch.randn(3, 4), True, Activation(), True)
    with pytest.raises(ValueError, match="'torch' refuses activate_backward: promises no batch-invariant result"):
        moeyard.activation.ACTIVATE_BACKWARD(arguments, "torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", Activation.NAMES)
def test_derivatives_of_activations(name: str, dtype: torch.dtype) -> None:
    single, weighted = (
        table.launcher(op, "cpu", CPU, dtype) for op in ("activate_backward", "weighted_activate_backward")
    )
    for gated, limit, columns in ((True, None, 40), (False, 0.7, 24), (True, 0.7, 301)):
        curve = Activation(name, alpha=1.3 if name == "silu" else 1.0, beta=0.5 if gated else 0.0, limit=limit)
        rows = (torch.randn(9, columns * (1 + gated) + 2) * 2)[:, 1:-1].to(dtype)
        rows[0, :3] = torch.tensor([0.7, -0.7, torch.nan], dtype=dtype)
        grad, factors = torch.randn(9, columns).to(dtype), torch.rand(9)
        for given in (None, factors):
            shapes = (tuple(rows.shape), dtype), ((9, columns), dtype), ((9,), torch.float32)
            out = WeightedGradients(*(poisoned(*shape) for shape in shapes))
            weighted(rows, grad, given, curve, gated=gated, out=out)
            wanted = weighted_activate_backward(rows.double(), grad.double(), given, curve, gated=gated)
            for mine, exact in zip(out, wanted, strict=True):
                assert not guard_broken(mine)
                close = 2 * torch.finfo(mine.dtype).eps
                assert torch.allclose(mine.double(), exact, rtol=close, atol=2e-5, equal_nan=True)
        alone = poisoned(tuple(rows.shape), dtype)
        grad = grad * factors.unsqueeze(1)  # as a backward weighs it: float32 beside rows of 16 bits
        single(rows, grad, curve, gated=gated, out=alone)
        exact = activate_backward(rows.double(), grad.double(), curve, gated=gated)
        assert not guard_broken(alone)
        assert torch.allclose(alone.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-5, equal_nan=True)
