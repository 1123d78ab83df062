"""The triton implementation's gradients; test_triton.py runs this under the interpreter."""

import sys
from typing import Any

import pytest
import torch

import moeyard
from moeyard import ExpertWeights, Routing, reference
from moeyard.testing import guard_broken, poisoned, same_bits
from moeyard.testing.layers import draw_routing, draw_weights, plain_experts
from moeyard.triton import gradients
from moeyard.values import Activation, Segments, WeightedGradients

OUTER = moeyard.dispatch.table.launcher("grouped_outer", "reference", torch.device("cpu"), torch.float32)
ROUTINGS = {  # rows of each expert
    "even": [9, 9, 9],
    "ragged": [1, 0, 70, 5],
    "one": [0, 40, 0],
    "none": [0, 0],
}


def sums(counts: list[int], dtype: torch.dtype, columns: int, size: int, divisor: int, wide: bool) -> tuple[Any, Any]:
    """Ours and the reference's, of entries in a random order; rows have strides."""
    entries = sum(counts)
    slots = torch.randperm(entries, dtype=torch.int32)
    firsts = torch.tensor([sum(counts[:i]) for i in range(len(counts))])
    segments = Segments(firsts, torch.tensor(counts, dtype=torch.int32), slots, 1)
    grads = torch.randn(max(entries, 1), columns + 3)[:, 1 : columns + 1].to(dtype)
    rows = torch.randn(-(-max(entries, 1) // divisor), size).to(dtype)
    out = poisoned((len(counts), columns, size), torch.float32 if wide else dtype)
    gradients.grouped_outer_launch(grads, rows, segments, divisor, out=out)
    assert not guard_broken(out)
    exact = torch.empty(out.shape, dtype=torch.float64)
    OUTER(grads, rows, segments, divisor, out=exact)
    return out, exact


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full), torch.float32], ids=str
)
@pytest.mark.parametrize("name", ROUTINGS)
def test_sums_of_outer_products(name: str, dtype: torch.dtype) -> None:
    for columns, size, divisor, wide in ((40, 24, 1, False), (16, 1, 3, True), (7, 130, 2, dtype != torch.float32)):
        out, exact = sums(ROUTINGS[name], dtype, columns, size, divisor, wide)
        rounding = torch.finfo(out.dtype).eps
        assert torch.allclose(out.double(), exact, rtol=rounding, atol=1e-5)
        for expert, count in enumerate(ROUTINGS[name]):
            assert count or not bool(out[expert].any()), "experts without rows have zeros"


def test_sums_of_rows_as_they_lie() -> None:
    """Without slots: the rows of batches, of which only the first are valid."""
    grads, rows = torch.randn(12, 20), torch.randn(12, 18)
    grads[3:4] = rows[3:4] = torch.nan
    segments = Segments(torch.tensor([0, 4, 8]), torch.tensor([3, 4, 0], dtype=torch.int32))
    out = poisoned((3, 20, 18), torch.float32)
    gradients.grouped_outer_launch(grads, rows, segments, 1, out=out)
    wanted = torch.stack((grads[:3].t() @ rows[:3], grads[4:8].t() @ rows[4:8], torch.zeros(20, 18)))
    assert torch.allclose(out, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", Activation.NAMES)
def test_derivatives_of_activations(name: str, dtype: torch.dtype) -> None:
    for gated, limit, columns in ((True, None, 40), (False, 0.7, 24), (True, 0.7, 300)):
        curve = Activation(name, alpha=1.3 if name == "silu" else 1.0, beta=0.5 if gated else 0.0, limit=limit)
        rows = (torch.randn(9, columns * (1 + gated) + 2) * 2)[:, 1:-1].to(dtype)
        rows[0, :3] = torch.tensor([0.7, -0.7, torch.nan], dtype=dtype)
        grad, factors = torch.randn(9, columns).to(dtype), torch.rand(9)
        for given in (None, factors):
            out = WeightedGradients(
                poisoned((9, columns * (1 + gated)), dtype),
                poisoned((9, columns), dtype),
                poisoned((9,), torch.float32),
            )
            gradients.weighted_activate_backward_launch(rows, grad, given, curve, gated=gated, out=out)
            wanted = reference.gradients.weighted_activate_backward(
                rows.double(), grad.double(), given, curve, gated=gated
            )
            for mine, exact in zip(out, wanted, strict=True):
                assert not guard_broken(mine)
                close = 2 * torch.finfo(mine.dtype).eps
                assert torch.allclose(mine.double(), exact, rtol=close, atol=2e-5, equal_nan=True)
        single = poisoned(rows.shape, dtype)
        gradients.activate_backward_launch(rows, grad, curve, gated=gated, out=single)
        exact = reference.gradients.activate_backward(rows.double(), grad.double(), curve, gated=gated)
        close = 2 * torch.finfo(dtype).eps
        assert torch.allclose(single.double(), exact, rtol=close, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("shape", [(48, 40), (64, 128), (100, 70)], ids=str)
@pytest.mark.parametrize("rows_of_one", [3, pytest.param(70, marks=pytest.mark.full)])
def test_transposed_weights_are_read_as_they_lie(shape: tuple[int, int], rows_of_one: int) -> None:
    size, columns = shape
    rows = torch.randn(2 * rows_of_one, size).half()
    stored = (torch.randn(2, size + 1, columns + 5) / size**0.5).half()[:, 1:, 2 : columns + 2]
    offsets = torch.tensor([0, rows_of_one, 2 * rows_of_one])
    turned = stored.transpose(1, 2)
    assert moeyard.dispatch.call.lies_turned(turned)
    got = moeyard.grouped_gemm(rows, turned, expert_offsets=offsets, impl="triton")
    plain = moeyard.grouped_gemm(rows, turned.contiguous(), expert_offsets=offsets, impl="triton")
    assert same_bits(got, plain)
    weights = ExpertWeights(turned[:, : columns - columns % 2], torch.randn(2, size, columns // 2).half())
    routing = Routing(torch.rand(len(rows), 2), draw_routing(len(rows), 2, 2).topk_ids)
    got = moeyard.fused_experts(rows, routing, weights, impl="triton")
    dense = ExpertWeights(weights.w13.contiguous(), weights.w2)
    assert same_bits(got, moeyard.fused_experts(rows, routing, dense, impl="triton"))


@pytest.mark.parametrize(
    ("dtype", "save"),
    [
        (torch.float32, "product"),
        pytest.param(torch.bfloat16, "inputs", marks=pytest.mark.full),
        pytest.param(torch.bfloat16, "product", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_gradients_of_a_layer(dtype: torch.dtype, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it by triton, honest, with equal bits, and equal bits where the hidden states' come in parts."""
    tokens, hidden, size = 24, 272, 16
    weights, routing = draw_weights(3, hidden, size, dtype, bias=True), draw_routing(tokens, 3, 2)
    upstream = torch.randn(tokens, hidden).to(dtype)
    given = [torch.randn(tokens, hidden).to(dtype), routing.topk_weights]
    given += [t for t in (weights.w13, weights.w2, weights.w13_bias, weights.w2_bias) if t is not None]

    def found(kind: torch.dtype | None) -> list[torch.Tensor]:
        mine = [t.detach().to(torch.promote_types(kind or t.dtype, t.dtype)).requires_grad_() for t in given]
        call = mine[0], Routing(mine[1], routing.topk_ids), ExpertWeights(*mine[2:])
        answer = moeyard.fused_experts(*call, impl="triton", save=save) if kind is None else plain_experts(*call)
        return [*torch.autograd.grad(answer, mine, upstream.to(answer.dtype))]

    ours, honest, exact = found(None), found(dtype), found(torch.float64)
    times = 1.1 if dtype.itemsize == 2 else 2
    for mine, theirs, wide in zip(ours, honest, exact, strict=True):
        of_mine, of_theirs = ((t.double() - wide).square().mean().sqrt() for t in (mine, theirs))
        assert float(of_mine) <= times * float(of_theirs), (of_mine, of_theirs)
    assert all(same_bits(a, b) for a, b in zip(ours, found(None), strict=True))
    monkeypatch.setattr(sys.modules["moeyard.grouped_gemm"], "_MOST_SPREAD_BYTES", 1)
    in_parts = found(None)
    assert all(same_bits(a, b) for a, b in zip(ours, in_parts, strict=True))
