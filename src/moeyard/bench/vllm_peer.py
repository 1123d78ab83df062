"""vLLM's operators, where a vLLM is installed: the functions that its layers call."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from moeyard.bench.operators import Run
from moeyard.quant import QuantScheme
from moeyard.values import GPT_OSS_ACTIVATION, Activation, ExpertWeights

_FOLDER = "vllm.model_executor.layers.fused_moe"


def load() -> None:
    """Loads the compiled operators, `torch.ops._moe_C`."""
    importlib.import_module("vllm._custom_ops")


def function(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of vLLM's fused_moe folder."""
    load()
    found: Callable[..., Any] = getattr(importlib.import_module(f"{_FOLDER}.{module}"), name)
    return found


def experts(act: Activation) -> Run:
    """vLLM's layer of experts: its Triton kernels with the configurations that were tuned for the card.

    It clamps only where gate and up are interleaved, so gpt-oss's weights are copied into that order, once.
    """
    fused = function("fused_moe", "fused_experts_impl")
    name, arranged = arrangement(act)
    kept: dict[int, ExpertWeights] = {}

    def run(x: Any) -> Any:
        if id(x.weights) not in kept:
            kept[id(x.weights)] = arranged(x.weights)
        weights = kept[id(x.weights)]
        return fused(
            x.hidden_states, weights.w13, weights.w2, x.routing.topk_weights, x.routing.topk_ids, activation=name,
            w1_bias=weights.w13_bias, w2_bias=weights.w2_bias,
        )  # fmt: skip

    return run


def quantised_experts(scheme: QuantScheme) -> Run | None:
    """vLLM's Triton layer of quantised experts with silu; None where it has no such scheme.

    It has a scale per channel beside rows with a scale each, so one per matrix is repeated.
    """
    eight = scheme.weights in ("e4m3", "int8") and scheme.activations == scheme.weights and scheme.scales == "float"
    whole = scheme.block in ((0, 0), (1, 0)) and not scheme.activation_group
    blocks = scheme.block[1] > 0 and scheme.activation_group == scheme.block[1]
    if not eight or scheme.static or not (whole or blocks):
        return None
    fused = function("fused_moe", "fused_experts_impl")
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(x: Any) -> Any:
        weights = x.weights
        if id(weights) not in kept:
            kept[id(weights)] = channel_scales(weights) if whole else (weights.scales.w13, weights.scales.w2)
        first, second = kept[id(weights)]
        return fused(
            x.hidden_states, weights.w13, weights.w2, x.routing.topk_weights, x.routing.topk_ids,
            use_fp8_w8a8=scheme.weights == "e4m3", use_int8_w8a8=scheme.weights == "int8", per_channel_quant=whole,
            block_shape=list(scheme.block) if blocks else None, w1_scale=first, w2_scale=second,
            w1_bias=weights.w13_bias, w2_bias=weights.w2_bias,
        )  # fmt: skip

    return run


def channel_scales(weights: ExpertWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of both weights as [E, rows, 1] float32, of one scale per matrix or row."""
    assert weights.scales is not None
    first, second = weights.scales.w13.float(), weights.scales.w2.float()
    rows = weights.w13.shape[1] // first.shape[1], weights.w2.shape[1] // second.shape[1]
    return first.repeat_interleave(rows[0], 1), second.repeat_interleave(rows[1], 1)


def arrangement(act: Activation) -> tuple[str, Callable[[ExpertWeights], ExpertWeights]]:
    """(vLLM's name of an activation, what puts weights into the order that it wants)."""
    if act == Activation():
        return "silu", _as_they_are
    if act == GPT_OSS_ACTIVATION:
        return "swigluoai", _interleaved
    raise ValueError(f"activation: expected silu or gpt-oss's for vLLM, got {act}")


def _as_they_are(weights: ExpertWeights) -> ExpertWeights:
    return weights


def _interleaved(weights: ExpertWeights) -> ExpertWeights:
    """A row of the gate, one of up, and so on."""

    def mixed(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(tensor.chunk(2, 1), 2).flatten(1, 2).contiguous()

    bias = None if weights.w13_bias is None else mixed(weights.w13_bias)
    return ExpertWeights(mixed(weights.w13), weights.w2, bias, weights.w2_bias)
