"""The triton implementation's gradients; test_triton.py runs this under the interpreter."""

import gc
import sys
from typing import Any

import pytest
import torch

import moeyard
from moeyard import ExpertWeights, Routing, reference
from moeyard.bench.training import TrainingStep, peak_bytes
from moeyard.testing import guard_broken, poisoned, same_bits
from moeyard.testing.layers import draw_routing, draw_weights, plain_experts
from moeyard.triton import gradients
from moeyard.triton.launch import Step
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
    "dtype",
    [torch.bfloat16, *(pytest.param(kind, marks=pytest.mark.full) for kind in (torch.float16, torch.float32))],
    ids=str,
)
@pytest.mark.parametrize("name", ROUTINGS)
def test_sums_of_outer_products(name: str, dtype: torch.dtype) -> None:
    for columns, size, divisor, wide in ((40, 24, 1, False), (16, 1, 3, True), (7, 130, 2, dtype != torch.float32)):
        out, exact = sums(ROUTINGS[name], dtype, columns, size, divisor, wide)
        rounding = torch.finfo(out.dtype).eps
        assert torch.allclose(out.double(), exact, rtol=rounding, atol=1e-5)
        for expert, count in enumerate(ROUTINGS[name]):
            assert count or not bool(out[expert].any()), "experts without rows have zeros"


def test_each_kind_of_tensors_has_a_step_of_its_own() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for wide in (False, True):
            sums([3, 5], dtype, 16, 8, 1, wide)
        rows, grad, factors = torch.randn(6, 32).to(dtype), torch.randn(6, 16).to(dtype), torch.rand(6)
        for given in (factors, None):
            out = WeightedGradients(torch.empty_like(rows), torch.empty_like(grad), torch.empty(6))
            gradients.weighted_activate_backward_launch(rows, grad, given, Activation(), gated=True, out=out)
        gradients.activate_backward_launch(rows, grad, Activation(), gated=True, out=torch.empty_like(rows))


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


@pytest.mark.parametrize(
    "shape",
    [(100, 70), *(pytest.param(shape, marks=pytest.mark.full) for shape in ((48, 40), (64, 128)))],
    ids=str,
)
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


def most_bytes(run: Any) -> int:
    """The most bytes of tensors that a call holds at a time beyond what was there."""
    with torch.profiler.profile(profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.full
@pytest.mark.parametrize(("save", "parts"), [("product", 1), ("product", 2), ("inputs", 2)])
def test_a_step_takes_the_bytes_counted_by_hand(save: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TrainingStep(tokens=128, top_k=4, experts=2, hidden=512, inside=64)
    start = Step.__call__

    def start_and_let_go(step: Step, *tensors: torch.Tensor | None) -> None:
        start(step, *tensors)
        gc.collect()  # the interpreter holds its tensors in cycles

    gc.freeze()
    monkeypatch.setattr(Step, "__call__", start_and_let_go)
    if parts > 1:
        limit = step.routes * step.hidden * step.itemsize // parts
        monkeypatch.setattr(sys.modules["moeyard.grouped_gemm"], "_MOST_SPREAD_BYTES", limit)
    weights = draw_weights(step.experts, step.hidden, step.inside, torch.bfloat16)
    ids = torch.randint(0, step.experts, (step.tokens, step.top_k), dtype=torch.int32)
    rows, w13, w2 = (
        t.requires_grad_() for t in (torch.randn(step.tokens, step.hidden).bfloat16(), weights.w13, weights.w2)
    )
    factors, upstream = torch.rand(ids.shape, requires_grad=True), torch.randn(rows.shape).bfloat16()
    found: dict[str, int] = {}
    by_hand = peak_bytes(step, save)

    def forward() -> torch.Tensor:
        routing = Routing(factors, ids)
        return moeyard.fused_experts(rows, routing, ExpertWeights(w13, w2), save=save, impl="triton")

    def whole() -> None:
        answer = forward()
        torch.autograd.grad(answer, (rows, factors, w13, w2), upstream)

    whole()  # what is made once is there
    found["forward"] = most_bytes(forward)
    found["whole"] = most_bytes(whole)
    of_forward = max(count for name, count in by_hand.items() if name.startswith("forward"))
    assert abs(found["forward"] - of_forward) <= 0.05 * of_forward, (found, by_hand)
    assert abs(found["whole"] - max(by_hand.values())) <= 0.05 * max(by_hand.values()), (found, by_hand)
