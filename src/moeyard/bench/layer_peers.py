"""Peers of experts: torch's grouped products, and the classes of transformers."""

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moeyard.bench.operators import Case, Provider, Run
from moeyard.bench.peers import installed
from moeyard.values import Activation, ExpertWeights

_COPIED_BYTES = 1 << 30  # providers that copy weights for every route take part up to here


def grouped_experts(act: Activation) -> Run:
    """Rows sorted by expert, two grouped products, sums by `index_add_`: torch's own way without a wait. Routes
    of bfloat16 rows, none dropped.
    """

    def run(x: Any) -> Tensor:
        hidden, weights, top_k = x.hidden_states, x.weights, x.routing.topk_ids.shape[1]
        ids, order = x.routing.topk_ids.flatten().sort(stable=True)
        experts = torch.arange(weights.num_local_experts, device=ids.device, dtype=ids.dtype)
        ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
        token = order // top_k
        middle = torch._grouped_mm(hidden[token], weights.w13.transpose(1, 2), offs=ends)
        if weights.w13_bias is not None:
            middle = middle + weights.w13_bias[ids]
        gate, up = middle.chunk(2, 1)
        if act.limit is not None:
            gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        plain = act.alpha == 1 and act.beta == 0
        middle = functional.silu(gate) * up if plain else gate * torch.sigmoid(act.alpha * gate) * (up + act.beta)
        rows = torch._grouped_mm(middle, weights.w2.transpose(1, 2), offs=ends)
        if weights.w2_bias is not None:
            rows = rows + weights.w2_bias[ids]
        rows = rows * x.routing.topk_weights.flatten()[order].to(rows.dtype).unsqueeze(1)
        return torch.zeros_like(hidden).index_add_(0, token, rows)

    return run


def transformers_experts(case: Case) -> list[Provider]:
    """The experts of the model's own class in transformers, in each of its implementations; none if not installed."""
    where = case.model.get("transformers")
    if where is None or not installed("transformers"):
        return []
    module, _, name = where.partition(":")
    kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    experts: dict[int, Any] = {}

    def make(weights: ExpertWeights) -> Any:
        if id(weights) not in experts:
            experts.clear()
            experts[id(weights)] = _module(kind, weights)
        return experts[id(weights)]

    def run(implementation: str) -> Run:
        def call(x: Any) -> Tensor:
            made = make(x.weights)
            made.config._experts_implementation = implementation
            with torch.no_grad():
                result: Tensor = made(
                    x.hidden_states, x.routing.topk_ids.long(), x.routing.topk_weights.to(x.hidden_states.dtype)
                )
            return result

        return call

    found = [Provider("transformers", name, run(name)) for name in ("eager", "grouped_mm")]
    copied = case["num_tokens"] * case["top_k"] * 2 * case["intermediate_size"] * case["hidden_size"]
    if copied * case.dtype.itemsize <= _COPIED_BYTES:
        found.append(Provider("transformers", "batched_mm", run("batched_mm")))
    return found


def _module(kind: Any, weights: ExpertWeights) -> Any:
    """transformers' experts module around our weights, without copying where its order is ours."""
    experts, hidden_size, size = weights.w2.shape
    config = SimpleNamespace(
        num_experts=experts, num_local_experts=experts, n_routed_experts=experts, hidden_size=hidden_size,
        intermediate_size=size, moe_intermediate_size=size, hidden_act="silu", swiglu_alpha=1.702, swiglu_limit=7.0,
        _experts_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        made = kind(config)

    def parameter(tensor: Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad=False)

    if weights.w13_bias is None or weights.w2_bias is None:
        made.gate_up_proj, made.down_proj = parameter(weights.w13), parameter(weights.w2)
        return made
    mixed = torch.stack(weights.w13.chunk(2, 1), 2).flatten(1, 2)  # gate and up in turn
    made.gate_up_proj = parameter(mixed.transpose(1, 2).contiguous())
    made.gate_up_proj_bias = parameter(torch.stack(weights.w13_bias.chunk(2, 1), 2).flatten(1, 2))
    made.down_proj, made.down_proj_bias = parameter(weights.w2.transpose(1, 2).contiguous()), parameter(weights.w2_bias)
    return made
