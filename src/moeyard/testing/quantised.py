"""Random layers of quantised experts, of any scheme."""

from dataclasses import replace

import torch
from torch import Tensor

from moeyard.quant import (
    FP8_BLOCK,
    FP8_BLOCK_WEIGHTS,
    FP8_CHANNEL,
    FP8_TENSOR,
    FP8_TENSOR_STATIC,
    FP8_WEIGHTS,
    INT8_CHANNEL,
    INT8_WEIGHTS,
    MXFP4,
    MXFP4_FP8,
    NVFP4,
    SCALES,
    ExpertScales,
    QuantScheme,
    int4_scheme,
    scale_shapes,
)
from moeyard.values import ExpertWeights

SCHEMES = (
    FP8_TENSOR, FP8_TENSOR_STATIC, FP8_CHANNEL, FP8_BLOCK, FP8_WEIGHTS, FP8_BLOCK_WEIGHTS, INT8_CHANNEL, INT8_WEIGHTS,
    MXFP4, NVFP4, int4_scheme(128), int4_scheme(32, zero_points=True), int4_scheme(0),
    QuantScheme("int8", activations="int8", static=True),
    QuantScheme("e4m3", (1, 32), "e8m0", activations="e4m3", activation_group=32),
    QuantScheme("e4m3", (128, 128), "e8m0", activations="e4m3", activation_group=128),
    MXFP4_FP8, int4_scheme(32, zero_points=True, activations="e4m3"),
    QuantScheme("int8", (24, 20), activations="int8", activation_group=20),
    QuantScheme("e2m1", (4, 6), zero_points=False, activations="e4m3", activation_group=10),
)  # fmt: skip
"""The schemes that are in use, and some whose blocks fit nothing."""


def draw_quantised(
    experts: int,
    hidden: int,
    size: int,
    scheme: QuantScheme,
    dtype: torch.dtype = torch.bfloat16,
    *,
    gated: bool = True,
    bias: bool = False,
    block_start: int = 0,
) -> ExpertWeights:
    """Codes and scales that keep rows near 1; scales of neighbouring blocks differ by up to 4; biases of `dtype`."""
    wide = size * (1 + gated)
    first, second = scale_shapes(scheme, hidden, size, gated, block_start)
    scales = ExpertScales(
        _scales(scheme, (experts, *first), hidden),
        _scales(scheme, (experts, *second), size),
        _zero_points(scheme, (experts, *first)),
        _zero_points(scheme, (experts, *second)),
        torch.rand(experts, 1 + gated) + 0.5 if scheme.global_scales else None,
        torch.rand(experts, 1) + 0.5 if scheme.global_scales else None,
        _inputs(scheme, experts),
        _inputs(scheme, experts),
        block_start,
    )
    return ExpertWeights(
        _codes(scheme, (experts, wide, hidden)),
        _codes(scheme, (experts, hidden, size)),
        torch.randn(experts, wide).to(dtype) if bias else None,
        torch.randn(experts, hidden).to(dtype) if bias else None,
        gated,
        scheme,
        scales,
    )


_SPREAD = {"e4m3": 100.0, "int8": 40.0, "int4": 4.6, "e2m1": 2.9}
"""The root mean square of drawn codes."""


def _codes(scheme: QuantScheme, shape: tuple[int, int, int]) -> Tensor:
    if scheme.weights == "e4m3":
        return (torch.randn(shape) * _SPREAD["e4m3"]).clamp(-448, 448).to(torch.float8_e4m3fn)
    if scheme.weights == "int8":
        return (torch.randn(shape) * _SPREAD["int8"]).clamp(-128, 127).to(torch.int8)
    return torch.randint(0, 256, (*shape[:2], shape[2] // 2), dtype=torch.uint8)


def _scales(scheme: QuantScheme, shape: tuple[int, int, int], summed: int) -> Tensor:
    mean = 1 / (max(summed, 1) ** 0.5 * _SPREAD[scheme.weights])
    values: Tensor = mean * torch.exp2(2 * torch.rand(shape) - 1)
    return values.to(SCALES[scheme.scales][0])


def _zero_points(scheme: QuantScheme, shape: tuple[int, int, int]) -> Tensor | None:
    return torch.randint(0, 16, shape, dtype=torch.uint8) if scheme.zero_points else None


def _inputs(scheme: QuantScheme, experts: int) -> Tensor | None:
    """Scales under which rows near 1 do not saturate often."""
    return (torch.rand(experts) + 0.5) * 4 / (448 if scheme.activations == "e4m3" else 127) if scheme.static else None


def moved_to(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    """Quantised weights and their scales on another device."""
    assert weights.scales is not None
    first, second = (None if bias is None else bias.to(device) for bias in (weights.w13_bias, weights.w2_bias))
    scales = weights.scales.moved(lambda tensor: tensor.to(device))
    return replace(
        weights, w13=weights.w13.to(device), w2=weights.w2.to(device), w13_bias=first, w2_bias=second, scales=scales
    )
