"""Inputs of cases of routers, what a case asks of its router, and what model files write for it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from moeyard.bench.operators import Case
from moeyard.values import RouterOptions, Routing

_MODEL_KEYS = ("scoring", "renormalize", "num_groups", "top_k_groups", "routed_scaling_factor")


@dataclass(frozen=True)
class RouterInputs:
    """What a case hands to every provider."""

    logits: Tensor
    """[num_tokens, num_experts]"""
    options: RouterOptions


def draw_logits(case: Case, device: torch.device, generator: Generator) -> RouterInputs:
    """Fresh logits of 8 bits: where they differ, float32 scores differ too, by which peers rank."""
    logits = torch.randn(case["num_tokens"], case["num_experts"], generator=generator).bfloat16()
    return RouterInputs(logits.to(case.dtype).to(device), router_options(case, device))


def router_options(case: Case, device: torch.device | str = "cpu") -> RouterOptions:
    """What a router is asked for: what the case's model says, or what its num_groups stands for.

    One group is a softmax, renormalised; several are DeepSeek-V3's: sigmoid scores, a bias, half of the groups. The
    bias is a fixed random one.
    """
    model = case.model
    if not model:
        groups = int(dict(case.sizes).get("num_groups", 1))
        model = {"renormalize": True}
        if groups > 1:
            model |= {"scoring": "sigmoid", "selection_bias": True, "num_groups": groups, "top_k_groups": groups // 2}
            model["routed_scaling_factor"] = 2.5
    options: RouterOptions = {"top_k": case["top_k"], **{key: model[key] for key in _MODEL_KEYS if key in model}}  # type: ignore[typeddict-item]
    if model.get("selection_bias"):
        bias = torch.randn(case["num_experts"], generator=Generator().manual_seed(7)) * 0.05
        options["selection_bias"] = bias.to(device)
    return options


def rules(options: RouterOptions) -> dict[str, Any]:
    """The options without top_k, which an answer's ids show."""
    return {key: value for key, value in options.items() if key != "top_k"}


def bytes_of_routing(case: Case) -> int:
    """Logits read, ids and weights written."""
    return int(case["num_tokens"] * (case["num_experts"] * case.dtype.itemsize + case["top_k"] * 8))


def plain_route(
    logits: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = False,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    routed_scaling_factor: float = 1.0,
) -> Routing:
    """As model files write it; ties go where topk sends them."""
    if scoring == "sqrtsoftplus":
        scores = torch.nn.functional.softplus(logits.float()).sqrt()
    else:
        scores = torch.softmax(logits.float(), 1) if scoring == "softmax" else torch.sigmoid(logits.float())
    keys = scores if selection_bias is None else scores + selection_bias
    if num_groups > 1:
        grouped = keys.view(len(keys), num_groups, -1)
        best = grouped.amax(2) if selection_bias is None else grouped.topk(2, 2).values.sum(2)
        kept = torch.zeros_like(best).scatter_(1, best.topk(top_k_groups, 1, sorted=False).indices, 1).bool()
        keys = keys.masked_fill(~kept.repeat_interleave(grouped.shape[2], 1), -torch.inf)
    ids = keys.topk(top_k, 1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    return Routing(weights * routed_scaling_factor, ids.int())
