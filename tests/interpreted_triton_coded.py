"""Triton's experts of 8-bit codes against the rule; test_triton_coded.py runs this under the interpreter."""

from dataclasses import replace
from random import Random

import pytest
import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing
from moeyard.dispatch.schemes import TAKES
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, INT8_CHANNEL, QuantScheme
from moeyard.reference.quant import quantise_rows
from moeyard.testing import (
    differing,
    draw_quantised,
    draw_routing,
    draw_weights,
    guard_broken,
    interpreted,
    judged_experts,
    poisoned,
    same_bits,
    sub_batches,
)
from moeyard.testing.quantised import SCHEMES
from moeyard.testing.straight_through import gradients_of, rounded_experts
from moeyard.triton import coded_kernels
from moeyard.triton.launch import Step

OURS = [scheme for scheme in SCHEMES if TAKES["triton"](scheme)] + [
    QuantScheme("e4m3", activations="e4m3", static=True, dynamic_second=True),
    QuantScheme("int8", (1, 0), activations="int8", activation_group=128),
    QuantScheme("int8", (128, 128), activations="int8", static=True),
]
SIZES = {  # tokens, experts, top_k, hidden_size, intermediate_size
    "one token": (1, 8, 2, 160, 96),
    "few of many": (5, 9, 3, 144, 40),
    "many of few": (60, 2, 1, 100, 60),
}


@pytest.mark.parametrize("size", ["one token", "many of few", pytest.param("few of many", marks=pytest.mark.full)])
@pytest.mark.parametrize("scheme", OURS, ids=str)
def test_rows_are_within_their_budgets(scheme: QuantScheme, size: str) -> None:
    """dtypes, gates, biases, activations, slices that begin inside a block, and weights on the input, in turn."""
    tokens, experts, top_k, hidden_size, middle = SIZES[size]
    i = (OURS.index(scheme) + list(SIZES).index(size)) % 3
    dtype = (torch.bfloat16, torch.float32, torch.float16)[i]
    activation = (Activation(), GPT_OSS_ACTIVATION, Activation("relu2"))[i]
    start = 34 % scheme.period if i else 0
    weights = draw_quantised(experts, hidden_size, middle, scheme, dtype, gated=i != 2, bias=i > 0, block_start=start)
    if scheme.dynamic_second and weights.scales is not None:
        weights = replace(weights, scales=replace(weights.scales, w2_input=None))
    hidden, routing = torch.randn(tokens, hidden_size).to(dtype), draw_routing(tokens, experts, top_k)
    options = {"activation": activation, "apply_router_weight_on_input": i == 1}
    judged = judged_experts(hidden, routing, weights, **options)
    out = poisoned(tuple(hidden.shape), dtype)
    got = moeyard.fused_experts(hidden, routing, weights, out=out, impl="triton", **options)
    assert got is out and not guard_broken(out)
    assert judged.error(got) is None
    assert same_bits(moeyard.fused_experts(hidden, routing, weights, impl="triton", **options), got)


def test_under_a_map_and_with_dropped_routes() -> None:
    tokens, top_k = 20, 3
    ids = torch.randint(-1, 7, (tokens, top_k), dtype=torch.int64)
    mapping = torch.tensor([2, -1, 0, -1, 1, -1, -1], dtype=torch.int32)
    weights = draw_quantised(3, 128, 64, FP8_CHANNEL)
    hidden, routing = torch.randn(tokens, 128).bfloat16(), Routing(torch.rand(tokens, top_k), ids)
    judged = judged_experts(hidden, routing, weights, expert_map=mapping)
    got = moeyard.fused_experts(hidden, routing, weights, expert_map=mapping, impl="triton")
    assert judged.error(got) is None


def test_views_are_read_where_they_lie() -> None:
    """Hidden states, weights and scales that are parts of larger tensors."""
    whole = draw_quantised(4, 96, 48, INT8_CHANNEL)
    assert whole.scales is not None
    room = torch.zeros(4, 2 * 48 + 3, 96 + 7, dtype=torch.int8)
    room[:, 1:97, 2:98] = whole.w13
    weights = ExpertWeights(room[:, 1:97, 2:98], whole.w2, scheme=INT8_CHANNEL, scales=whole.scales)
    hidden, routing = torch.randn(9, 200)[:, 3:99].bfloat16(), draw_routing(9, 4, 2)
    got = moeyard.fused_experts(hidden, routing, weights, impl="triton")
    assert same_bits(got, moeyard.fused_experts(hidden.contiguous(), routing, whole, impl="triton"))


@pytest.mark.full
@pytest.mark.parametrize("scheme", OURS, ids=str)
def test_no_token_depends_on_its_batch(scheme: QuantScheme) -> None:
    tokens, dtype = 70, torch.float16 if OURS.index(scheme) % 2 else torch.bfloat16
    weights, routing = draw_quantised(3, 144, 48, scheme, dtype, bias=True), draw_routing(tokens, 3, 2)
    if scheme.dynamic_second and weights.scales is not None:
        weights = replace(weights, scales=replace(weights.scales, w2_input=None))

    def call(rows: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return moeyard.fused_experts(rows, Routing(factors, ids), weights, batch_invariant=True, impl="triton")

    tensors = (torch.randn(tokens, 144).to(dtype), routing.topk_weights, routing.topk_ids)
    with interpreted.products_in_order():
        count, wrong, first = differing(call, tensors, sub_batches(tokens, 4, Random(1)))
    assert (count, wrong) == (4, 0), first


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("code", ["e4m3", "int8"])
def test_codes_are_those_of_the_rule(code: str, group: int) -> None:
    """Every code's neighbourhood, subnormals, ties, infinities and NaN included."""
    scheme = QuantScheme(code, activations=code, activation_group=group)
    values = torch.tensor([*range(256)], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    ties = (values.sort().values[1:] + values.sort().values[:-1]) / 2
    edge = torch.cat(
        (values, ties, torch.nextafter(ties, torch.tensor(1e9)), torch.nextafter(ties, torch.tensor(-1e9)))
    )
    rows = torch.zeros(6, 1024)
    rows[0, : len(edge)] = edge
    rows[1] = torch.randn(1024) * torch.exp2(torch.randint(-30, 30, (1024,)))
    rows[2] = 1e-12
    rows[3, 7], rows[4, 9] = float("inf"), float("nan")
    wanted = quantise_rows(rows, scheme)
    stored = torch.uint8 if code == "e4m3" else torch.int8
    codes, scales = torch.empty(rows.shape, dtype=stored), torch.empty(wanted.scales.shape)
    Step(
        coded_kernels.quantize_kernel, (len(rows), 1), (1024, 1024, scales.shape[1], 0, 1, 0), E4M3=code == "e4m3",
        GROUP=group, COLUMNS=256, PDL=False,
    )(rows, None, None, None, codes, scales)  # fmt: skip
    got = codes.view(wanted.codes.dtype).double() * scales.double().repeat_interleave(1024 // scales.shape[1], 1)
    assert same_bits(got.nan_to_num(1e300), wanted.values.nan_to_num(1e300))
    finite = wanted.scales.isfinite()
    assert torch.equal(scales[finite], wanted.scales[finite])


@pytest.mark.full
def test_straight_through_gradients() -> None:
    """In blocks; of rows whose products the interpreter rounds as a GPU does, float16."""
    tokens, experts, hidden, size, dtype = 24, 3, 136, 72, torch.float16
    masters, routing = draw_weights(experts, hidden, size, torch.float32, bias=True), draw_routing(tokens, experts, 2)
    of_masters = [t for t in (masters.w13, masters.w2, masters.w13_bias, masters.w2_bias) if t is not None]
    rows, upstream = (torch.randn(tokens, hidden).to(dtype) for _ in range(2))
    codes = moeyard.quantize_experts(masters, FP8_BLOCK)

    def plain(rows: torch.Tensor, where: Routing, of: ExpertWeights) -> torch.Tensor:
        return rounded_experts(rows, where, of, codes, dtype=dtype)

    def ours(rows: torch.Tensor, where: Routing, of: ExpertWeights) -> torch.Tensor:
        return moeyard.straight_through_experts(rows, where, of, FP8_BLOCK, impl="triton")

    given = (rows, routing.topk_weights, *of_masters)
    exact = gradients_of(plain, (rows.double(), *given[1:]), routing.topk_ids, upstream)
    honest, found = (gradients_of(call, given, routing.topk_ids, upstream) for call in (plain, ours))
    for mine, theirs, wanted in zip(found, honest, exact, strict=True):
        off, bound = ((one.double() - wanted).square().mean().sqrt() for one in (mine, theirs))
        assert float(off) <= 1.5 * float(bound) + 1e-6 * float(wanted.abs().max())
