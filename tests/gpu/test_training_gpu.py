"""Gradients of experts on a GPU: errors of an honest computation, the same bits every time, what is kept."""

import sys

import pytest
import torch

import moeyard
from moeyard import ExpertWeights, Routing
from moeyard.dispatch.table import launcher
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, INT8_CHANNEL, QuantScheme
from moeyard.reference.gradients import weighted_activate_backward
from moeyard.testing import guard_broken, impls_on, poisoned, same_bits
from moeyard.testing.layers import draw_routing, draw_weights, plain_experts
from moeyard.testing.straight_through import gradients_of, rounded_experts
from moeyard.values import Activation, WeightedGradients

CUDA = torch.device("cuda")
IMPLS = [name for name in impls_on("fused_experts", CUDA) if name != "reference"]
OUTERS = ["cuda", "triton", "torch"]
SHAPES = {"several rows": (256, 8, 2, 256, 128), "odd": (130, 5, 3, 100, 36), "decode": (3, 16, 4, 512, 256)}
"""Tokens, experts, top_k, hidden_size, intermediate_size."""
FEW = 100
"""Values whose errors' mean square says little: two honest computations differ twofold."""


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
    times = 2.0 if dtype.itemsize == 4 else 1.5 if name == "decode" else 1.1
    for ours, theirs, exact in zip(found, honest, wide, strict=True):
        times = max(times, 3.0) if exact.numel() < FEW else times
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


ROWS = {  # of each expert
    "even": [512] * 8,
    "ragged": [1, 0, 2047, 64, 65, 3, 700, 0],
    "one expert": [0, 0, 4096, 0],
    "no rows": [0, 0],
}
SIDES = {"wide": (1536, 2048), "odd": (100, 36), "narrow": (24, 200), "biases": (768, 1)}
"""Columns and size."""


@pytest.mark.parametrize("impl", OUTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", ROWS)
def test_sums_of_outer_products(name: str, sides: str, dtype: torch.dtype, impl: str) -> None:
    """Rows of tokens and of routes, through slots in any order; honest at the dtype, and equal bits each time."""
    counts, (columns, size), top_k = ROWS[name], SIDES[sides], 4
    routes = max(sum(counts), top_k)
    slots = torch.randperm(routes, device=CUDA).int()
    firsts = torch.tensor([sum(counts[:i]) for i in range(len(counts))], device=CUDA)
    of_experts = torch.tensor(counts, dtype=torch.int32, device=CUDA)
    call = sys.modules["moeyard.grouped_gemm"].GROUPED_OUTER
    grads = torch.randn(routes, columns, device=CUDA).to(dtype)
    rows = torch.randn(-(-routes // top_k), size, device=CUDA).to(dtype)
    for kind in dict.fromkeys((dtype, torch.float32)):
        exact = torch.zeros(len(counts), columns, size, dtype=torch.float64, device=CUDA)
        honest = torch.zeros(len(counts), columns, size, dtype=kind, device=CUDA)
        for expert, (first, count) in enumerate(zip(firsts.tolist(), counts, strict=True)):
            mine = slots[first : first + count].long()
            left, right = grads[mine], rows[mine // top_k]
            exact[expert] = left.double().t() @ right.double()
            honest[expert] = left.to(kind).t() @ right.to(kind)
        arguments = (grads, rows, slots, 1, top_k, firsts, of_experts, kind != dtype)
        torch.full_like(exact, torch.nan)  # memory that was written is what results are allocated in
        try:
            out, again = call(arguments, impl), call(arguments, impl)
        except ValueError as refusal:
            if "refuses" not in str(refusal):
                raise
            pytest.skip(str(refusal))
        assert same_bits(out, again) and out.dtype == kind
        of_ours, of_honest = ((t.double() - exact).square().mean().sqrt() for t in (out, honest))
        times = 1.1 if kind.itemsize == 2 else 6  # float32 sums in the order of slots, beside sums of parts
        aligned = 2.0**-17 if dtype.itemsize == 2 else 2.0**-22  # what tensor cores cut off of a sum, as a share
        assert float(of_ours) <= times * float(of_honest) + aligned * float(exact.square().mean().sqrt())
        for expert, count in enumerate(counts):
            assert count or not bool(out[expert].any()), "experts without rows have zeros"


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", Activation.NAMES)
def test_derivatives_of_activations(name: str, dtype: torch.dtype, impl: str) -> None:
    for gated, limit, columns in ((True, None, 768), (False, 0.7, 1000), (True, 0.7, 36)):
        curve = Activation(name, beta=0.5 if gated else 0.0, limit=limit)
        rows = (torch.randn(300, columns * (1 + gated), device=CUDA) * 2).to(dtype)
        grad, factors = torch.randn(300, columns, device=CUDA).to(dtype), torch.rand(300, device=CUDA)
        shapes = ((tuple(rows.shape), dtype), (tuple(grad.shape), dtype), ((300,), torch.float32))
        out = WeightedGradients(*(poisoned(shape, kind, CUDA) for shape, kind in shapes))
        launcher("weighted_activate_backward", impl, CUDA, dtype)(rows, grad, factors, curve, gated=gated, out=out)
        given = (rows.cpu().double(), grad.cpu().double(), factors.cpu())
        wanted = weighted_activate_backward(*given, curve, gated=gated)
        for mine, exact in zip(out, wanted, strict=True):
            assert not guard_broken(mine)
            rounding = 4 * torch.finfo(mine.dtype).eps
            assert torch.allclose(mine.cpu().double(), exact, rtol=rounding, atol=1e-4)
        single = poisoned(tuple(rows.shape), dtype, CUDA)
        launcher("activate_backward", impl, CUDA, dtype)(rows, grad, curve, gated=gated, out=single)
        plain = weighted_activate_backward(given[0], given[1], None, curve, gated=gated).rows
        assert torch.allclose(single.cpu().double(), plain, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("name", ["one expert", "no routes"])
def test_gradients_of_uneven_routings(name: str) -> None:
    tokens, experts, hidden, size = 600, 8, 512, 256
    weights = draw_weights(experts, hidden, size, torch.bfloat16, device=CUDA)
    ids = torch.full((tokens, 1), 5 if name == "one expert" else -1, dtype=torch.int32, device=CUDA)
    factors, upstream = torch.rand(tokens, 1, device=CUDA), torch.randn(tokens, hidden, device=CUDA)
    rows = torch.randn(tokens, hidden, device=CUDA)

    def gradients(kind: torch.dtype, ours: bool) -> list[torch.Tensor]:
        mine = [t.to(torch.bfloat16).to(kind).requires_grad_() for t in (rows, weights.w13, weights.w2)]
        call = mine[0], Routing(factors, ids), ExpertWeights(*mine[1:])
        answer = moeyard.fused_experts(*call) if ours else plain_experts(*call)
        answer = answer + 0 * mine[0]  # plain experts without routes have no gradient at all
        return [*torch.autograd.grad(answer, mine, upstream.to(kind), materialize_grads=True)]

    found, honest = gradients(torch.bfloat16, True), gradients(torch.bfloat16, False)
    for ours, theirs, exact in zip(found, honest, gradients(torch.float64, False), strict=True):
        of_ours, of_theirs = ((t.double() - exact).square().mean().sqrt() for t in (ours, theirs))
        assert float(of_ours) <= 1.1 * float(of_theirs)


def test_parts_of_columns_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    _, routing, _ = drawn("several rows", torch.bfloat16)
    rows = torch.randn(256, 512, device=CUDA).bfloat16().requires_grad_()
    weights = draw_weights(8, 512, 128, torch.bfloat16, device=CUDA)
    found = []
    for most in (1 << 28, 1):
        monkeypatch.setattr(sys.modules["moeyard.grouped_gemm"], "_MOST_SPREAD_BYTES", most)
        answer = moeyard.fused_experts(rows, routing, weights)
        found.append(torch.autograd.grad(answer.square().sum(), rows)[0])
    assert same_bits(*found)


@pytest.mark.parametrize("impl", [name for name in impls_on("grouped_gemm", CUDA) if name in ("cuda", "triton")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [3, 100, 2000])
def test_products_of_transposed_weights(tokens: int, dtype: torch.dtype, impl: str) -> None:
    """Parts of larger matrices, read as they lie, are as good as copies of them, and give equal bits each time."""
    experts, size, columns, top_k = 8, 336, 320, 2
    larger = (torch.randn(experts, size, 64 + columns + 64, device=CUDA) / size**0.5).to(dtype)
    weight = larger[:, :, 64 : 64 + columns].transpose(1, 2)
    ids = draw_routing(tokens, experts, top_k, device=CUDA).topk_ids
    layout = moeyard.moe_align_block_size(ids, num_experts=experts, block_size=1)
    held = layout.route_rows >= 0
    for count in (tokens, tokens * top_k):  # by token and by route
        rows = torch.randn(count, size, device=CUDA).to(dtype)
        try:
            found, again = (moeyard.grouped_gemm(rows, weight, layout=layout, impl=impl)[held] for _ in range(2))
        except ValueError as refusal:
            if "refuses" not in str(refusal):
                raise
            pytest.skip(str(refusal))
        plain = moeyard.grouped_gemm(rows, weight.contiguous(), layout=layout, impl=impl)[held]
        exact = moeyard.grouped_gemm(rows.double(), weight.double(), layout=layout, impl="torch")[held]
        of_ours, of_plain = ((t.double() - exact).square().mean().sqrt() for t in (found, plain))
        assert same_bits(found, again) and float(of_ours) <= 1.02 * float(of_plain)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="for Hopper")
def test_hopper_computes_a_backward_by_its_own_kernels() -> None:
    weights, routing = draw_weights(8, 256, 128, torch.bfloat16, device=CUDA), draw_routing(64, 8, 2, device=CUDA)
    given = [t.requires_grad_() for t in (torch.randn(64, 256, device=CUDA).bfloat16(), weights.w13, weights.w2)]
    answer = moeyard.fused_experts(given[0], routing, ExpertWeights(*given[1:]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
        torch.autograd.grad(answer, given, torch.ones_like(answer))
        torch.cuda.synchronize()
    started = {event.key: event.count for event in seen.key_averages()}
    assert started.get("experts_kernel") == 2 and started.get("outer_kernel") == 2
    assert started.get("activate_backward_kernel") == 1


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", [FP8_BLOCK, FP8_CHANNEL, INT8_CHANNEL], ids=str)
def test_straight_through_gradients(scheme: QuantScheme, dtype: torch.dtype, impl: str) -> None:
    """The forward has the bits of quantised weights; gradients err as an honest computation does, every time alike."""
    tokens, experts, top_k, hidden, size = 256, 8, 2, 512, 384
    masters, routing = (
        draw_weights(experts, hidden, size, torch.float32, bias=True),
        draw_routing(tokens, experts, top_k),
    )
    of_masters = [t for t in (masters.w13, masters.w2, masters.w13_bias, masters.w2_bias) if t is not None]
    given = (torch.randn(tokens, hidden).to(dtype), routing.topk_weights, *of_masters)
    upstream = torch.randn(tokens, hidden).to(dtype)
    codes = moeyard.quantize_experts(masters, scheme)

    def plain(rows: torch.Tensor, where: Routing, of: ExpertWeights) -> torch.Tensor:
        return rounded_experts(rows, where, of, codes, dtype=dtype)

    def ours(rows: torch.Tensor, where: Routing, of: ExpertWeights) -> torch.Tensor:
        return moeyard.straight_through_experts(rows, where, of, scheme, impl=impl)

    exact = gradients_of(plain, (given[0].double(), *given[1:]), routing.topk_ids, upstream)
    honest = gradients_of(plain, given, routing.topk_ids, upstream)
    here = tuple(t.to(CUDA) for t in given), routing.topk_ids.to(CUDA), upstream.to(CUDA)
    try:
        found, again = (gradients_of(ours, *here) for _ in range(2))
    except ValueError as refusal:
        if "refuses" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    assert all(same_bits(a, b) for a, b in zip(found, again, strict=True))
    for mine, theirs, wanted in zip(found, honest, exact, strict=True):
        off, bound = ((one.cpu().double() - wanted).square().mean().sqrt() for one in (mine, theirs))
        assert float(off) <= 1.3 * float(bound) + 1e-6 * float(wanted.abs().max())
    on_card = moeyard.quantize_experts(ExpertWeights(*(t.to(CUDA) for t in of_masters)), scheme)
    assert torch.equal(on_card.w13.view(torch.uint8).cpu(), codes.w13.view(torch.uint8)), "codes are those of a CPU"


def test_a_straight_through_backward_waits_for_no_device_value() -> None:
    rows, routing, weights = drawn("several rows", torch.bfloat16)
    masters = ExpertWeights(*(t.float().requires_grad_() for t in weights))
    rows.requires_grad_()
    moeyard.straight_through_experts(rows, routing, masters, FP8_BLOCK).sum().backward()  # kernels are there
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moeyard.straight_through_experts(rows, routing, masters, FP8_BLOCK).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
