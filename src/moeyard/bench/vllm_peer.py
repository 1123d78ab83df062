"""vLLM's operators, where a vLLM is installed: the functions that its layers call."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from moeyard.bench.operators import Run
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
