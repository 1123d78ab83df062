"""quantize_experts and dequantize_experts: the nearest codes under the scales that the rules give, and back."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard import ExpertWeights, dequantize_experts, quantize, quantize_experts
from moeyard.quant import (
    CODES,
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR_STATIC,
    INT8_CHANNEL,
    MXFP4,
    NVFP4,
    QuantScheme,
    int4_scheme,
)
from moeyard.reference.quant import code_values, dequantised
from moeyard.testing import draw_quantised, draw_routing, draw_weights, judged_experts, same_bits
from moeyard.testing.quantised import SCHEMES
from moeyard.vectorised import quant as vectorised_quant

LARGEST = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0, "e2m1": 6.0}


def quantised(weights: ExpertWeights, scheme: QuantScheme) -> ExpertWeights:
    inputs: dict[str, Any] = {}
    if scheme.static:
        inputs = {name: torch.full((weights.num_local_experts,), 0.04) for name in ("w13_input", "w2_input")}
    return quantize_experts(weights, scheme, **inputs)


def all_values(scheme: QuantScheme) -> Tensor:
    """The values of all codes, by code."""
    count = 16 if scheme.per_byte == 2 else 256
    codes = torch.arange(count, dtype=torch.uint8).view(CODES[scheme.weights].dtype)
    return code_values(codes, scheme)[..., :: scheme.per_byte]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_the_nearest(scheme: QuantScheme) -> None:
    """Under the scales that are stored no other code is nearer to a weight than the one that was taken."""
    weights = draw_weights(2, 136, 60, torch.bfloat16, gated=True, bias=True)
    got = quantised(weights, scheme)
    assert got.scheme == scheme and got.w13_bias is weights.w13_bias and got.w2_bias is weights.w2_bias
    known = all_values(scheme).double()
    known = known[known.isfinite()]
    if scheme.weights == "int8":
        known = known[known > -128]
    for plain, values, unit, zero in zip((weights.w13, weights.w2), dequantised(got), *units(got), strict=True):
        wanted = plain.double()
        possible = (known - zero.unsqueeze(-1)) * unit.unsqueeze(-1)
        best = (possible - wanted.unsqueeze(-1)).abs().amin(-1)
        assert bool(((values - wanted).abs() <= best + 1e-6 * wanted.abs()).all())


def units(weights: ExpertWeights) -> tuple[list[Tensor], list[Tensor]]:
    """Of every weight the product of its scales, and its zero point: what codes of 0 and 1 mean."""
    scheme = weights.scheme
    assert scheme is not None
    one = {"e4m3": 0x38, "int8": 1, "int4": 0x11, "e2m1": 0x22}[scheme.weights]

    def filled(byte: int) -> ExpertWeights:
        return dataclasses.replace(
            weights,
            w13=torch.full_like(weights.w13.view(torch.uint8), byte).view(weights.w13.dtype),
            w2=torch.full_like(weights.w2.view(torch.uint8), byte).view(weights.w2.dtype),
        )

    at_one, at_zero = dequantised(filled(one)), dequantised(filled(0))
    scales = [a - b for a, b in zip(at_one, at_zero, strict=True)]
    return scales, [-b / s for b, s in zip(at_zero, scales, strict=True)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_again_changes_nothing(scheme: QuantScheme) -> None:
    weights = draw_weights(2, 130, 60, torch.float32, gated=False)
    once = quantised(weights, scheme)
    values = dequantize_experts(once, torch.float32)
    assert values.scheme is None and values.w13.shape == weights.w13.shape and not values.gated
    again = dequantize_experts(quantised(values, scheme), torch.float32)
    for first, second in ((values.w13, again.w13), (values.w2, again.w2)):
        if scheme.zero_points:  # a range that was rounded is another range: at most a step further
            assert float((first - second).abs().max()) <= float(first.abs().max()) / 7
        else:
            assert torch.allclose(first, second, rtol=2e-6, atol=1e-12)
    wide = dequantize_experts(once, torch.float64)
    for got, wanted in zip((wide.w13, wide.w2), dequantised(once), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_layer_of_rounded_weights_is_near(scheme: QuantScheme) -> None:
    weights = draw_weights(3, 256, 128, torch.bfloat16, bias=True)
    hidden, routing = torch.randn(6, 256).bfloat16(), draw_routing(6, 3, 2, "uniform")
    got = moeyard.fused_experts(hidden, routing, quantised(weights, scheme), impl="torch")
    assert judged_experts(hidden, routing, quantised(weights, scheme)).error(got) is None
    wanted = moeyard.fused_experts(hidden, routing, weights, impl="torch")
    coarse = scheme.per_byte == 2 or scheme.block[1] == 6
    assert float((got - wanted).float().norm() / wanted.float().norm()) < (0.35 if coarse else 0.09)


def test_scales_follow_their_rules() -> None:
    w13 = torch.zeros(1, 2, 64)
    w13[0, 0, 0], w13[0, 0, 40], w13[0, 1, 3] = 7.9, -0.25, 1e-20
    weights = ExpertWeights(w13, torch.zeros(1, 64, 2), gated=False)
    mx = quantize_experts(weights, MXFP4)
    assert mx.scales is not None
    assert mx.scales.w13.view(torch.uint8).tolist() == [[[127, 123], [127 - 34 - 2, 127 - 34 - 2]]]
    values = dequantised(mx)[0][0]
    assert values[0, 0] == 6 and values[0, 40] == -0.25 and int(values.count_nonzero()) == 2  # 7.9 saturates
    channel = quantize_experts(weights, FP8_CHANNEL)
    assert channel.scales is not None
    floor = torch.tensor(1e-10) / torch.tensor(448.0)
    assert channel.scales.w13.flatten().tolist() == [float(torch.tensor(7.9) / torch.tensor(448.0)), float(floor)]
    nv = quantize_experts(weights, NVFP4)
    assert nv.scales is not None and nv.scales.w13_global is not None
    assert nv.scales.w13.float().max() == 448 and float(nv.scales.w13_global) == pytest.approx(7.9 / 6 / 448)
    signed = ExpertWeights(
        torch.tensor([[[-8.0, 7.0, 0.0, 3.5], [2.0, 17.0, 5.0, 9.5]]]), torch.zeros(1, 4, 2), gated=False
    )
    four = quantize_experts(signed, int4_scheme(0))
    assert four.scales is not None and four.scales.w13.flatten().tolist() == pytest.approx([8 / 7, 17 / 7])
    asymmetric = quantize_experts(signed, int4_scheme(0, zero_points=True))
    assert asymmetric.scales is not None and asymmetric.scales.w13_zero_points is not None
    assert asymmetric.scales.w13.flatten().tolist() == pytest.approx([1.0, 17 / 15])
    assert asymmetric.scales.w13_zero_points.flatten().tolist() == [8, 0]
    assert dequantised(asymmetric)[0][0, 0].tolist() == [-8, 7, 0, 4]  # 3.5 is a tie: to even


def test_ties_go_to_even_codes() -> None:
    row = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 4.9]
    weights = ExpertWeights(torch.tensor([[row]]), torch.zeros(1, 16, 2), gated=False)
    weights = dataclasses.replace(weights, w13=weights.w13.expand(1, 2, 16))
    values = dequantised(quantize_experts(weights, QuantScheme("e2m1", (1, 16))))[0][0, 0]
    assert values.tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -0.0, -1, -1, -2, -2, -4, -4, 4]


def test_gate_and_up_have_blocks_of_their_own() -> None:
    """I of 200 is no multiple of 128: up's first block begins at up's first row."""
    weights = draw_weights(2, 256, 200, torch.float32)
    weights.w13[:, 200:] *= 1000
    got = quantize_experts(weights, FP8_BLOCK)
    assert got.scales is not None and got.scales.w13.shape == (2, 4, 2)
    assert bool((got.scales.w13[:, 2:] > 100 * got.scales.w13[:, :2]).all())


@pytest.mark.parametrize("scheme", [FP8_BLOCK, INT8_CHANNEL, MXFP4, NVFP4, int4_scheme(32, zero_points=True)], ids=str)
def test_nan_and_infinities_stay_in_their_block(scheme: QuantScheme) -> None:
    for bad in (torch.nan, torch.inf):
        weights = draw_weights(2, 256, 128, torch.float32)
        weights.w2[1, 130, 5] = bad
        values = dequantised(quantize_experts(weights, scheme))[1]
        assert bool(values[1, 130, 5].isnan()) and bool(values[0].isfinite().all())
        assert scheme.global_scales or bool(values[1, :128].isfinite().all())


def test_some_experts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = draw_weights(5, 64, 32, torch.bfloat16)
    for scheme in (FP8_BLOCK, NVFP4, MXFP4, int4_scheme(32, zero_points=True)):
        found = []
        for at_once in (1 << 26, 2 * 4 * 64 * 64):
            for room in (quantize, vectorised_quant):
                monkeypatch.setattr(room, "CHUNK_BYTES", at_once)
            codes = quantize_experts(weights, scheme)
            found.append((codes, dequantize_experts(codes, torch.bfloat16).w13))
        (whole, whole_values), (parts, values) = found
        assert whole.scales is not None and parts.scales is not None
        assert same_bits(whole.w13, parts.w13) and same_bits(whole.w2, parts.w2)
        for a, b in zip(whole.scales.tensors, parts.scales.tensors, strict=True):
            assert (a is None) == (b is None) and (a is None or b is None or same_bits(a, b))
        assert same_bits(values, whole_values)


def test_what_cannot_be_rounded_is_named() -> None:
    weights = draw_weights(2, 64, 32, torch.float32)
    cases: list[tuple[Any, str]] = [
        (lambda: quantize_experts(weights, "e4m3"), "scheme: expected a QuantScheme, got str"),  # type: ignore[arg-type]
        (lambda: quantize_experts(weights.w13, MXFP4), "weights: expected ExpertWeights, got Tensor"),  # type: ignore[arg-type]
        (lambda: quantize_experts(draw_quantised(2, 64, 32, MXFP4), MXFP4), "weights.scheme: expected None"),
        (
            lambda: quantize_experts(draw_weights(2, 64, 32, torch.float64), MXFP4),
            "weights.w13: expected dtype float32",
        ),
        (lambda: quantize_experts(weights, FP8_TENSOR_STATIC), "weights.scales.w13_input: expected a torch.Tensor"),
        (lambda: quantize_experts(weights, MXFP4, w13_input=torch.ones(2)), "weights.scales.w13_input: expected None"),
        (
            lambda: quantize_experts(draw_weights(2, 64, 33, torch.float32), MXFP4),
            "weights: expected even hidden_size and",
        ),
        (lambda: dequantize_experts(weights, torch.float32), "weights.scheme: expected a QuantScheme"),
        (lambda: dequantize_experts(draw_quantised(2, 64, 32, MXFP4), torch.int8), "dtype: expected float32, bfloat16"),
    ]
    for call, said in cases:
        with pytest.raises((TypeError, ValueError), match=said):
            call()
