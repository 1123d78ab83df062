"""Triton's experts of 4 bits in tiles against the rule; test_triton_four_bits.py runs this under the interpreter."""

from dataclasses import replace

import pytest
import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, Activation, Routing, pack_experts
from moeyard.quant import MXFP4, MXFP4_FP8, NVFP4, QuantScheme, int4_scheme
from moeyard.testing import draw_quantised, draw_routing, guard_broken, judged_experts, poisoned, same_bits

SCHEMES = (
    MXFP4, NVFP4, int4_scheme(), int4_scheme(32, zero_points=True), int4_scheme(64), int4_scheme(0, zero_points=True),
    int4_scheme(128, zero_points=True), int4_scheme(16), MXFP4_FP8, int4_scheme(activations="e4m3"),
    int4_scheme(32, zero_points=True, activations="e4m3"), int4_scheme(16, activations="e4m3"),
    QuantScheme("e2m1", (1, 16), "e4m3", global_scales=True, activations="e4m3"),
)  # fmt: skip
SIZES = {  # tokens, experts, top_k, hidden_size, intermediate_size
    "one token": (1, 8, 2, 192, 64),
    "many of few": (60, 2, 1, 64, 64),
    "few of many": (5, 9, 3, 128, 192),
}


FEW = [("one token", MXFP4), ("one token", MXFP4_FP8)]


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        pytest.param(size, scheme, marks=() if (size, scheme) in FEW else pytest.mark.full, id=f"{size}; {scheme}")
        for size in SIZES
        for scheme in SCHEMES
    ],
)
def test_rows_are_within_their_budgets(size: str, scheme: QuantScheme) -> None:
    """dtypes, gates, biases, activations, and weights on the input, in turn."""
    tokens, experts, top_k, hidden_size, middle = SIZES[size]
    i = (SCHEMES.index(scheme) + list(SIZES).index(size)) % 3
    dtype = (torch.bfloat16, torch.float32, torch.float16)[i]
    activation = (GPT_OSS_ACTIVATION, Activation(), Activation("relu2"))[i]
    weights = draw_quantised(experts, hidden_size, middle, scheme, dtype, gated=i != 2, bias=i != 1)
    hidden, routing = torch.randn(tokens, hidden_size).to(dtype), draw_routing(tokens, experts, top_k)
    options = {"activation": activation, "apply_router_weight_on_input": i == 1}
    judged = judged_experts(hidden, routing, weights, **options)
    out = poisoned(tuple(hidden.shape), dtype)
    packed = pack_experts(weights)
    got = moeyard.fused_experts(hidden, routing, packed, out=out, impl="triton", **options)
    assert got is out and not guard_broken(out)
    assert judged.error(got) is None
    assert same_bits(moeyard.fused_experts(hidden, routing, packed, impl="triton", **options), got)


@pytest.mark.full
@pytest.mark.parametrize(
    "scheme",
    [
        MXFP4, int4_scheme(64, zero_points=True), MXFP4_FP8,
        int4_scheme(64, zero_points=True, activations="e4m3"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_weights_are_outside_their_budgets(scheme: QuantScheme) -> None:
    """What a kernel with a wrong order of codes, scales or rows would answer."""
    weights = draw_quantised(2, 128, 64, scheme, bias=True)
    hidden, routing = torch.randn(6, 128).bfloat16(), draw_routing(6, 2, 1)
    judged = judged_experts(hidden, routing, weights)
    packed = pack_experts(weights)
    scales = packed.scales
    assert scales is not None
    words = packed.w13.view(torch.int16)

    def answer(**changes: object) -> torch.Tensor:
        return moeyard.fused_experts(hidden, routing, replace(packed, **changes), impl="triton")  # type: ignore[arg-type]

    assert judged.error(answer()) is None
    mutants: dict[str, dict[str, object]] = {
        "neighbouring columns": {"w13": words.unflatten(2, (-1, 2)).flip(3).flatten(2).view(torch.uint8)},
        "codes without pack_experts": {"w13": weights.w13},
        "gate for up": {"w13": words.unflatten(2, (-1, 2, 4)).flip(3).flatten(2).contiguous().view(torch.uint8)},
        "scales without pack_experts": {"scales": weights.scales},
        "neighbouring groups": {"scales": replace(scales, w2=scales.w2.roll(8, 1))},
    }
    if scheme.zero_points:
        mutants["zero points of 8"] = {
            "scales": replace(scales, w13_zero_points=torch.full_like(scales.w13_zero_points, 8))  # type: ignore[arg-type]
        }
    for name, change in mutants.items():
        assert judged.error(answer(**change)) is not None, name


@pytest.mark.full
def test_scales_at_their_ends() -> None:
    """e8m0 of 0, a subnormal, and of 255, NaN; e4m3 scales that are negative, zero or NaN."""
    for scheme, stored in ((MXFP4, (0, 255)), (NVFP4, (0xB8, 0x00, 0x7F, 0x80)), (MXFP4_FP8, (0, 255))):
        for byte in stored:
            weights = draw_quantised(1, 64, 64, scheme, bias=True)
            assert weights.scales is not None
            weights.scales.w13.view(torch.uint8)[0, 5, 1] = byte
            hidden, routing = torch.randn(3, 64).bfloat16(), Routing(torch.rand(3, 1), torch.zeros(3, 1).int())
            judged = judged_experts(hidden, routing, weights)
            got = moeyard.fused_experts(hidden, routing, pack_experts(weights), impl="triton")
            assert judged.error(got) is None, f"{scheme}: {byte}"


@pytest.mark.full
def test_under_a_map_and_with_dropped_routes() -> None:
    ids = torch.randint(-1, 7, (20, 3), dtype=torch.int64)
    mapping = torch.tensor([2, -1, 0, -1, 1, -1, -1], dtype=torch.int32)
    weights = draw_quantised(3, 128, 64, MXFP4)
    hidden, routing = torch.randn(20, 128).bfloat16(), Routing(torch.rand(20, 3), ids)
    judged = judged_experts(hidden, routing, weights, expert_map=mapping)
    got = moeyard.fused_experts(hidden, routing, pack_experts(weights), expert_map=mapping, impl="triton")
    assert judged.error(got) is None
