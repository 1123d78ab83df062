"""Quantised experts on every implementation: within the budget of each row, and what is wrong is beyond it."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing
from moeyard.quant import (
    FP8_BLOCK,
    FP8_BLOCK_WEIGHTS,
    FP8_CHANNEL,
    FP8_TENSOR,
    FP8_TENSOR_STATIC,
    INT8_CHANNEL,
    INT8_WEIGHTS,
    MXFP4,
    MXFP4_FP8,
    NVFP4,
    QuantScheme,
    int4_scheme,
)
from moeyard.reference.quant import dequantised
from moeyard.testing import draw_quantised, draw_routing, guard_broken, judged_experts, poisoned, same_bits
from moeyard.testing.quantised import SCHEMES
from moeyard.vectorised import experts as vectorised


def takers(weights: ExpertWeights, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """The implementations that take these weights on a CPU, and the reference."""
    found = moeyard.explain("fused_experts", "cpu", dtype, weights=weights).able
    assert "torch" in found
    return [*found, "reference"]


def moved(weights: ExpertWeights, move: Callable[[Tensor], Tensor]) -> ExpertWeights:
    """Weights and scales of which `move` makes others."""
    bias = [None if t is None else move(t) for t in (weights.w13_bias, weights.w2_bias)]
    scales = None if weights.scales is None else weights.scales.moved(move)
    return dataclasses.replace(
        weights, w13=move(weights.w13), w2=move(weights.w2), w13_bias=bias[0], w2_bias=bias[1], scales=scales
    )


SIZES = {
    # tokens, experts, top_k, hidden_size, intermediate_size
    "nobody": (0, 4, 2, 32, 16),
    "one token": (1, 8, 2, 160, 96),
    "few": (5, 16, 6, 288, 64),
    "most of one expert": (60, 2, 1, 100, 60),
    "long": (2, 2, 1, 1100, 1060),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_implementation_is_within_its_budget(scheme: QuantScheme, size: str) -> None:
    tokens, experts, top_k, hidden_size, middle = SIZES[size]
    for i, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16)):
        on_input, gated = i == 1, i != 2
        activation = GPT_OSS_ACTIVATION if i == 1 else Activation("relu2" if i == 2 else "silu")
        start = 34 % scheme.period if i else 0
        weights = draw_quantised(
            experts, hidden_size, middle, scheme, dtype, gated=gated, bias=i > 0, block_start=start
        )
        hidden, routing = torch.randn(tokens, hidden_size).to(dtype), draw_routing(tokens, experts, top_k)
        options = {"activation": activation, "apply_router_weight_on_input": on_input}
        judged = judged_experts(hidden, routing, weights, **options)
        for impl in takers(weights, dtype):
            if impl == "reference" and size == "long":
                continue
            out = poisoned(tuple(hidden.shape), dtype)
            got = moeyard.fused_experts(hidden, routing, weights, out=out, impl=impl, **options)
            assert got is out and not guard_broken(out)
            assert judged.error(got) is None, (impl, dtype)
            assert same_bits(moeyard.fused_experts(hidden, routing, weights, impl=impl, **options), got)


@pytest.mark.parametrize("scheme", [MXFP4, int4_scheme(32, zero_points=True)], ids=str)
def test_rows_of_8_bits_beside_weights_of_4_are_asked_for_by_name(scheme: QuantScheme) -> None:
    """They change results, so nothing chooses them; `cuda` says in words that it does not take them."""
    weights = draw_quantised(4, 128, 64, scheme)
    asked = dataclasses.replace(weights, scheme=dataclasses.replace(scheme, activations="e4m3"))
    hidden, routing = torch.randn(5, 128).bfloat16(), draw_routing(5, 4, 2)
    judged, own = judged_experts(hidden, routing, weights), judged_experts(hidden, routing, asked)
    for impl in takers(asked):
        got = moeyard.fused_experts(hidden, routing, asked, impl=impl)
        assert own.error(got) is None and judged.error(got) is not None, impl
    for given, words in ((asked, "e4m3 per row"), (moeyard.pack_experts(asked), "tiled, e4m3 per row")):
        told = moeyard.explain("fused_experts", "cuda", torch.bfloat16, weights=given, capability=(9, 0))
        for label in ("cuda (products)", "cuda (few tokens)", "cuda (few tokens of 4 bits)"):
            assert told.reasons[label].startswith("takes no weights of scheme") and words in told.reasons[label]
        assert ("triton" in told.able) == given.scheme.tiled  # type: ignore[union-attr]


# Mutants: what is wrong is outside the budget


def swapped(weights: ExpertWeights) -> ExpertWeights:
    """Up where gate should be."""

    def swap(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat(tensor.view(torch.uint8).chunk(2, 1)[::-1], 1).view(tensor.dtype)

    scales = weights.scales
    assert scales is not None
    scales = dataclasses.replace(
        scales,
        w13=swap(scales.w13),
        w13_zero_points=swap(scales.w13_zero_points),
        w13_global=swap_global(scales.w13_global),
    )
    return dataclasses.replace(weights, w13=swap(weights.w13), scales=scales)


def swap_global(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flip(1)


def with_scales(weights: ExpertWeights, **changes: Callable[[Tensor], Tensor]) -> ExpertWeights:
    """Weights some of whose scales are changed, as bytes."""
    scales = weights.scales
    assert scales is not None
    new = {name: change(getattr(scales, name).clone()) for name, change in changes.items()}
    return dataclasses.replace(weights, scales=dataclasses.replace(scales, **new))


def neighbours(scales: Tensor) -> Tensor:
    """Of every block the scale of the one beside it, or below where none is beside."""
    axis = 2 if scales.shape[2] > 1 else 1
    return scales.view(torch.uint8).view(*scales.shape, -1).roll(1, axis).view(scales.dtype).view(scales.shape)


MUTATED = (FP8_TENSOR, FP8_TENSOR_STATIC, FP8_CHANNEL, FP8_BLOCK, FP8_BLOCK_WEIGHTS, INT8_CHANNEL, INT8_WEIGHTS, MXFP4,
           NVFP4, int4_scheme(128), int4_scheme(32, zero_points=True), MXFP4_FP8,
           int4_scheme(32, zero_points=True, activations="e4m3"))  # fmt: skip
QUICK = {MXFP4_FP8: (False,), MUTATED[-1]: ()}  # 8-bit rows beside 8-bit weights have the same mutants


@pytest.mark.parametrize(
    ("scheme", "loose"),
    [
        pytest.param(
            scheme, loose, id=f"{scheme}-{'gate and up rounded' if loose else 'exact'}",
            marks=() if loose in QUICK.get(scheme, (False, True)) else pytest.mark.full,
        )
        for scheme in MUTATED
        for loose in (False, True)
    ],
)  # fmt: skip
def test_mutants_are_beyond_the_budget(scheme: QuantScheme, loose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound that all are held to, and at the wider one for those that round gate and up to bfloat16."""
    weights = draw_quantised(4, 512, 512, scheme)
    hidden, routing = (
        torch.randn(24, 512).bfloat16(),
        Routing(torch.rand(24, 2) + 0.3, torch.rand(24, 4).argsort(1)[:, :2].int()),
    )
    judged = judged_experts(hidden, routing, weights, middle=2**-8 if loose else 0.0)

    def wrong(given: ExpertWeights = weights, routed: Routing = routing, **options: Any) -> bool:
        got = moeyard.fused_experts(hidden, routed, given, impl="torch", **options)
        error = (got.double() - judged.wide).norm(dim=1)
        assert (judged.error(got) is not None) == bool((error > judged.budget).any())
        return float((error > judged.budget).double().mean()) > 0.9  # nearly every row

    assert not wrong()
    assert wrong(swapped(weights))
    ids, factors = routing.topk_ids.clone(), routing.topk_weights
    ids[:, 1] = -1
    assert wrong(routed=Routing(factors, ids)), "an expert skipped"
    assert wrong(routed=Routing(factors * factors, routing.topk_ids)), "router weight twice"
    if scheme.block != (0, 0):
        assert wrong(with_scales(weights, w13=neighbours)), "neighbouring scales of w13"
        assert wrong(with_scales(weights, w2=neighbours)), "neighbouring scales of w2"
    if scheme.zero_points:
        assert wrong(with_scales(weights, w13_zero_points=neighbours)), "neighbouring zero points"
    if scheme.global_scales:
        assert wrong(with_scales(weights, w13_global=lambda t: t.amax(1, keepdim=True).expand(-1, 2))), "one for both"
    if scheme.block == (0, 0):
        assert wrong(with_scales(weights, w13=lambda t: t.amax(1, keepdim=True).expand(-1, 2, -1))), "one for both"
    if scheme.block[0] == scheme.block[1] != 0:
        assert wrong(with_scales(weights, w2=lambda t: t.transpose(1, 2))), "transposed"
    honest = vectorised.quantise_rows

    def padded(rows: Tensor, scheme: QuantScheme, static: Tensor | None, start: int) -> Tensor:
        """A column of padding is inside each group's largest magnitude."""
        if scheme.activations == "none" or static is not None:
            return honest(rows, scheme, static, start)
        size = scheme.activation_group or rows.shape[1]
        groups = rows.view(rows.shape[0], -1, size)
        groups = torch.cat((groups, torch.full_like(groups[:, :, :1], 37.0)), 2)
        mutant = dataclasses.replace(scheme, block=(0, 0), activation_group=size + 1)
        return honest(groups.flatten(1), mutant, None, 0).view(rows.shape[0], -1, size + 1)[:, :, :-1].flatten(1)

    def twice(rows: Tensor, scheme: QuantScheme, static: Tensor | None, start: int) -> Tensor:
        """Once with one scale for all rows, then as it should be."""
        one = rows.float().abs().amax().expand(len(rows)) / (448 if scheme.activations == "e4m3" else 127)
        before = honest(rows, dataclasses.replace(scheme, activation_group=0), one * 1.37, 0).to(rows.dtype)
        return honest(before, scheme, static, start)

    if scheme.activations != "none":
        monkeypatch.setattr(vectorised, "quantise_rows", twice)
        assert wrong(), "activations quantised twice"
    if scheme.activations != "none" and not scheme.static:
        monkeypatch.setattr(vectorised, "quantise_rows", padded)
        assert wrong(), "padding inside the largest magnitude"


def test_trap_24_the_budget_is_not_that_of_a_fixed_share() -> None:
    """A budget follows its row: half of the input has half of the budget, and one of zeros nothing but zeros."""
    weights = draw_quantised(2, 256, 128, FP8_CHANNEL)
    hidden, routing = torch.randn(4, 256).bfloat16(), Routing(torch.ones(4, 1), torch.zeros(4, 1).int())
    hidden[1], hidden[3] = hidden[0], 0
    routing.topk_weights[1] = 0.5
    judged = judged_experts(hidden, routing, weights)
    assert float(judged.budget[1] / judged.budget[0]) == pytest.approx(0.5, rel=1e-6)
    assert float(judged.budget[3]) < 1e-12 and bool((judged.wide[3] == 0).all())
    assert judged.error(judged.wide.bfloat16()) is None
    more = judged.wide.clone()
    more[2] += judged.budget[2] / 256**0.5 * 1.01
    assert (
        judged.error(more)
        == f"row 2: an error of {float(1.01 * judged.budget[2]):.3e} where {float(judged.budget[2]):.3e} is allowed"
    )
    more[2, 5] = torch.nan
    assert judged.error(more) == "row 2: NaN or infinity in other places than by the rule"


# The traps of formats and arithmetic


def test_trap_01_rows_that_are_not_routed_reach_no_other() -> None:
    """Tokens of NaN whose routes are all dropped, as padding of a batch is, leave bits as they are."""
    for scheme in (FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL, MXFP4):
        weights = draw_quantised(3, 256, 128, scheme)
        hidden, routing = torch.randn(70, 256).bfloat16(), draw_routing(70, 3, 2, "uniform")
        padded = Routing(
            torch.cat((routing.topk_weights, torch.rand(9, 2))),
            torch.cat((routing.topk_ids, torch.full((9, 2), -1).int())),
        )
        rows = torch.cat((hidden, torch.full((9, 256), torch.nan).bfloat16()))
        for impl in takers(weights):
            got = moeyard.fused_experts(rows, padded, weights, impl=impl)
            assert bool((got[70:] == 0).all()) and bool(got[:70].isfinite().all()), impl
            if impl != "torch":  # whose products round by the rows beside
                assert same_bits(got[:70], moeyard.fused_experts(hidden, routing, weights, impl=impl))


@pytest.mark.parametrize(
    "scheme", [FP8_CHANNEL, FP8_BLOCK, FP8_TENSOR_STATIC, INT8_CHANNEL, INT8_WEIGHTS, MXFP4], ids=str
)
def test_trap_02_infinities_and_nan_stay_in_their_row(scheme: QuantScheme) -> None:
    weights = draw_quantised(3, 256, 128, scheme)
    hidden, routing = torch.randn(9, 256).bfloat16(), draw_routing(9, 3, 2, "uniform")
    hidden[1, 5], hidden[4, 200], hidden[7] = torch.nan, torch.inf, 0
    judged = judged_experts(hidden, routing, weights)
    for impl in takers(weights):
        got = moeyard.fused_experts(hidden, routing, weights, impl=impl)
        fine = [0, 2, 3, 5, 6, 7, 8]
        assert bool(got[1].isnan().all()) and bool(got[fine].isfinite().all()) and bool((got[7] == 0).all()), impl
        assert not bool((~got[4].isfinite() & judged.wide[4].isfinite()).any()), impl


def test_trap_03_gate_and_up_have_scales_of_their_own() -> None:
    """Doubling gate's scale, or up's, is doubling gate, or up: no larger one stands for both."""
    for scheme, name in ((FP8_TENSOR, "w13"), (FP8_TENSOR_STATIC, "w13"), (NVFP4, "w13_global")):
        weights = draw_quantised(2, 64, 32, scheme, torch.float32)
        hidden, routing = torch.randn(5, 64), draw_routing(5, 2, 1, "uniform")
        for impl in takers(weights, torch.float32):
            first = moeyard.fused_experts(hidden, routing, weights, activation=Activation("relu2"), impl=impl)
            for half, factor in ((0, 4.0), (1, 2.0)):  # relu2 of twice as much is four times as much

                def double(tensor: Tensor, half: int = half) -> Tensor:
                    tensor[:, half] *= 2
                    return tensor

                if scheme.static:  # the second product's rows are rounded by a scale that does not follow
                    judged = judged_experts(
                        hidden, routing, with_scales(weights, **{name: double}), activation=Activation("relu2")
                    )
                    got = moeyard.fused_experts(
                        hidden,
                        routing,
                        with_scales(weights, **{name: double}),
                        activation=Activation("relu2"),
                        impl=impl,
                    )
                    assert judged.error(got) is None and not torch.equal(got, first)
                    continue
                got = moeyard.fused_experts(
                    hidden, routing, with_scales(weights, **{name: double}), activation=Activation("relu2"), impl=impl
                )
                assert torch.allclose(got, factor * first, rtol=1e-5, atol=1e-6), (impl, half)


def test_trap_03_static_scales_are_those_of_expert_and_product() -> None:
    weights = draw_quantised(3, 64, 32, FP8_TENSOR_STATIC)
    hidden, routing = torch.randn(12, 64).bfloat16(), draw_routing(12, 3, 2, "uniform")
    judged = judged_experts(hidden, routing, weights)
    for change in ({"w13_input": lambda t: t.roll(1)}, {"w2_input": lambda t: 4 * t}):
        got = moeyard.fused_experts(hidden, routing, with_scales(weights, **change), impl="torch")
        assert judged.error(got) is not None


def test_trap_10_int8_weights_of_minus_128_and_long_sums() -> None:
    """A sum of 2^17 products of 127 * -128 passes 2^31; sums here are of floats."""
    size = 2**17 + 8
    scheme = QuantScheme("int8", (1, 0), activations="int8")
    w13, w2 = torch.full((1, 2, size), -128, dtype=torch.int8), torch.full((1, size, 2), -128, dtype=torch.int8)
    scales = moeyard.ExpertScales(torch.full((1, 2, 1), 2.0**-24), torch.full((1, size, 1), 2.0**-7))
    weights = ExpertWeights(w13, w2, gated=False, scheme=scheme, scales=scales)
    hidden, routing = torch.full((1, size), -1.0), Routing(torch.ones(1, 1), torch.zeros(1, 1).int())
    once = size * 128 * 2.0**-24
    wanted = -2 * once**2
    for impl in takers(weights, torch.float32):
        got = moeyard.fused_experts(hidden, routing, weights, activation=Activation("relu2"), impl=impl)
        assert torch.allclose(got, torch.full_like(got, wanted), rtol=1e-5), impl


@pytest.mark.parametrize("scheme", [FP8_BLOCK_WEIGHTS, MXFP4, NVFP4, int4_scheme(128, zero_points=True)], ids=str)
def test_trap_11_and_12_slices_that_begin_inside_blocks_add_up(scheme: QuantScheme) -> None:
    """The layer of all columns is the sum of the layers of slices, with their blocks cut where the slices are."""
    whole, size, rows, columns = draw_quantised(3, 256, 320, scheme, torch.float32), 320, *scheme.block
    assert whole.scales is not None
    hidden, routing = torch.randn(7, 256), draw_routing(7, 3, 2, "uniform")
    w13, w2 = dequantised(whole)
    cuts = (0, 70, 180, 320)
    parts = []
    for first, last in pairwise(cuts):
        taken = torch.cat((torch.arange(first, last), torch.arange(size + first, size + last)))
        blocks = torch.arange(first // rows, -(-last // rows))
        of_half = -(-size // rows)
        both = torch.cat((blocks, blocks + of_half))
        across = slice(first // columns, -(-last // columns))

        def of_rows(t: Tensor | None, both: Tensor = both) -> Any:
            return None if t is None else t.view(torch.uint8).view(*t.shape, -1)[:, both].flatten(2).view(t.dtype)

        def of_columns(t: Tensor | None, across: slice = across) -> Any:
            return None if t is None else t[:, :, across]

        scales = dataclasses.replace(
            whole.scales, block_start=first % scheme.period,
            w13=of_rows(whole.scales.w13), w13_zero_points=of_rows(whole.scales.w13_zero_points),
            w2=of_columns(whole.scales.w2), w2_zero_points=of_columns(whole.scales.w2_zero_points),
        )  # fmt: skip
        stored = slice(first // scheme.per_byte, last // scheme.per_byte)
        part = dataclasses.replace(whole, w13=whole.w13[:, taken], w2=whole.w2[:, :, stored], scales=scales)
        values = dequantised(part)
        assert torch.equal(values[0], w13[:, taken]) and torch.equal(values[1], w2[:, :, first:last])
        parts.append(part)
    for impl in takers(whole, torch.float32):
        wanted = moeyard.fused_experts(hidden, routing, whole, impl=impl)
        got = sum(moeyard.fused_experts(hidden, routing, part, impl=impl) for part in parts)
        assert isinstance(got, Tensor) and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5), impl


def test_trap_13_sizes_of_gpt_oss() -> None:
    """2880 is 90 groups of 32 and no multiple of 128; interleaved rows are taken apart before."""
    weights = draw_quantised(2, 2880, 96, MXFP4, bias=True)
    hidden, routing = torch.randn(3, 2880).bfloat16(), draw_routing(3, 2, 2, "uniform")
    judged = judged_experts(hidden, routing, weights, activation=GPT_OSS_ACTIVATION)
    for impl in takers(weights):
        got = moeyard.fused_experts(hidden, routing, weights, activation=GPT_OSS_ACTIVATION, impl=impl)
        assert judged.error(got) is None, impl


@pytest.mark.parametrize(("experts", "top_k"), [(512, 10), (64, 6), (1, 1)])
def test_trap_14_many_experts_and_odd_top_k(experts: int, top_k: int) -> None:
    weights = draw_quantised(experts, 64, 32, FP8_BLOCK)
    for tokens in (0, 1, 19):
        hidden, routing = torch.randn(tokens, 64).bfloat16(), draw_routing(tokens, experts, top_k, "uniform")
        same = Routing(routing.topk_weights, torch.full_like(routing.topk_ids, experts // 2))
        for routed in (routing, same):
            judged = judged_experts(hidden, routed, weights)
            for impl in takers(weights):
                assert judged.error(moeyard.fused_experts(hidden, routed, weights, impl=impl)) is None, impl


@pytest.mark.parametrize("scheme", [FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL], ids=str)
def test_trap_25_the_router_weight_is_in_the_scale(scheme: QuantScheme) -> None:
    """On the input it multiplies once, before rows are quantised: codes of a tiny weight are those of the row."""
    weights = draw_quantised(2, 256, 128, scheme, torch.float32)
    hidden, routing = torch.randn(6, 256), Routing(torch.full((6, 1), 2.0**-3), torch.arange(6).view(6, 1).int() % 2)
    for impl in takers(weights, torch.float32):
        activation = Activation("relu2")
        small = moeyard.fused_experts(
            hidden, routing, weights, activation=activation, apply_router_weight_on_input=True, impl=impl
        )
        plain = Routing(torch.ones(6, 1), routing.topk_ids)
        large = moeyard.fused_experts(hidden, plain, weights, activation=activation, impl=impl)
        assert torch.allclose(small * 2.0**9, large, rtol=1e-5, atol=1e-6), impl  # relu2 of gate, times up: cubed
        output = moeyard.fused_experts(hidden, routing, weights, activation=activation, impl=impl)
        assert torch.allclose(output * 2.0**3, large, rtol=1e-5, atol=1e-6), impl


def test_trap_26_biases_are_not_scaled_and_count_once() -> None:
    """Of a second matrix of zeros its bias is left, times the router's weight, on the rank that has the expert."""
    weights = draw_quantised(4, 64, 32, FP8_CHANNEL, torch.float32, bias=True)
    hidden, routing = torch.randn(9, 64), draw_routing(9, 4, 2, "uniform")
    zero = dataclasses.replace(weights, w2=torch.zeros_like(weights.w2))
    judged = judged_experts(hidden, routing, weights)
    assert weights.w2_bias is not None
    for impl in takers(weights, torch.float32):
        wanted = (weights.w2_bias[routing.topk_ids.long()] * routing.topk_weights.unsqueeze(2)).sum(1)
        assert torch.allclose(moeyard.fused_experts(hidden, routing, zero, impl=impl), wanted, atol=1e-6), impl
        parts = torch.zeros_like(wanted)
        for rank in range(2):
            mine = moved(
                weights,
                lambda t, rank=rank: (
                    t.view(torch.uint8).view(*t.shape, -1)[2 * rank : 2 * rank + 2].view(t.dtype).view(2, *t.shape[1:])
                ),
            )  # type: ignore[misc]
            where = torch.tensor([0, 1, -1, -1] if rank == 0 else [-1, -1, 0, 1], dtype=torch.int32)
            parts += moeyard.fused_experts(hidden, routing, mine, expert_map=where, impl=impl)
        assert judged.error(parts) is None, impl


def test_trap_27_repeated_rows_are_quantised_alike() -> None:
    """A token's row is the same for all its experts, and tokens beside it do not matter."""
    weights = draw_quantised(4, 256, 128, FP8_BLOCK)
    hidden, routing = torch.randn(8, 256).bfloat16(), draw_routing(8, 4, 3, "uniform")
    hidden[4:] *= 100
    judged = judged_experts(hidden, routing, weights)
    for impl in takers(weights):
        for t in range(8):
            alone = Routing(routing.topk_weights[t : t + 1], routing.topk_ids[t : t + 1])
            got = moeyard.fused_experts(hidden[t : t + 1], alone, weights, impl=impl)
            part = judged._replace(wide=judged.wide[t : t + 1], budget=judged.budget[t : t + 1])
            assert part.error(got) is None, impl


def test_trap_28_what_the_activation_leaves_may_be_rounded_or_not() -> None:
    """One code apart where rounding decides: within `middle`'s budget, and outside the exact one."""
    weights = draw_quantised(2, 512, 512, INT8_CHANNEL)
    hidden, routing = torch.randn(16, 512).bfloat16(), draw_routing(16, 2, 2, "uniform")
    wide = judged_experts(hidden.float(), routing, weights)  # float32 rows: nothing is rounded in between
    exact, loose = (judged_experts(hidden, routing, weights, middle=middle) for middle in (0.0, 2**-8))
    assert loose.error(wide.wide) is None and bool((exact.budget < loose.budget).all())


@pytest.mark.parametrize("size", [7168, 14336])
def test_trap_29_long_sums_of_positive_values(size: int) -> None:
    """The worst case of sums that round: everything is positive. float32 sums stay within a float32 budget."""
    weights = draw_quantised(1, size, 32, FP8_BLOCK, torch.float32)
    positive = moved(weights, lambda t: t.float().abs().to(t.dtype))
    hidden, routing = torch.rand(2, size), Routing(torch.ones(2, 1), torch.zeros(2, 1).int())
    judged = judged_experts(hidden, routing, positive)
    for impl in takers(positive, torch.float32):
        assert judged.error(moeyard.fused_experts(hidden, routing, positive, impl=impl)) is None, impl


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_trap_31_nothing_waits_for_a_device(scheme: QuantScheme) -> None:
    """On a device without values any read on the host fails; sizes alone decide what is allocated."""
    weights = moved(draw_quantised(4, 64, 32, scheme, bias=True), lambda t: t.to("meta"))
    hidden, routing = torch.randn(5, 64).bfloat16().to("meta"), draw_routing(5, 4, 2)
    routing = Routing(routing.topk_weights.to("meta"), routing.topk_ids.to("meta"))
    got = moeyard.fused_experts(hidden, routing, weights, impl="torch")
    assert got.shape == (5, 64) and got.device.type == "meta"


@pytest.mark.parametrize("scheme", [FP8_BLOCK, FP8_TENSOR_STATIC, NVFP4, int4_scheme(32, zero_points=True)], ids=str)
def test_quantised_experts_compile(scheme: QuantScheme) -> None:
    weights = draw_quantised(4, 64, 32, scheme, bias=True)
    hidden, routing = torch.randn(5, 64).bfloat16(), draw_routing(5, 4, 2)
    for impl in takers(weights):

        def layer(x: Tensor, impl: str = impl) -> Tensor:
            return moeyard.fused_experts(x, routing, weights, impl=impl) + 1

        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(hidden), layer(hidden)), impl


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of matrices are dequantised, never more at once than the limit says; results do not change."""
    weights = draw_quantised(3, 256, 96, MXFP4)
    hidden, routing = torch.randn(50, 256).bfloat16(), draw_routing(50, 3, 2, "uniform")
    judged, seen = judged_experts(hidden, routing, weights), []
    honest = vectorised.Matrices.part

    def part(self: Any, *arguments: Any) -> Tensor:
        seen.append(honest(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(vectorised.Matrices, "part", part)
    for limit in (1 << 26, 100_000, 6000):
        monkeypatch.setattr(vectorised, "_CHUNK_BYTES", limit)
        assert judged.error(moeyard.fused_experts(hidden, routing, weights, impl="torch")) is None
        assert all(t.nbytes <= max(limit, 256 * 4) for t in seen)
        seen.clear()
