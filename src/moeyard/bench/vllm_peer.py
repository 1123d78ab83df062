"""vLLM's operators as a provider, where a vLLM is installed: the functions that its layers call."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from moeyard.bench.workloads import Case
from moeyard.values import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing

OPS = ("moe_align_block_size", "ids_to_rows", "combine", "moe_sum", "route")
_FOLDER = "vllm.model_executor.layers.fused_moe"


def answer(case: Case) -> Callable[[Any], Any]:
    """vLLM's answer to a case of one of `OPS`, into tensors that are there already where it takes such."""
    importlib.import_module("vllm._custom_ops")  # loads the compiled operators
    if case.op == "moe_align_block_size":
        align = importlib.import_module(f"{_FOLDER}.moe_align_block_size").moe_align_block_size
        return lambda x: align(x.topk_ids, case["block_size"], case["num_experts"])
    if case.op == "route":
        return _route(case)
    out: dict[str, Any] = {}

    def kept(name: str, make: Callable[[], Any]) -> Any:
        if name not in out:
            out[name] = make()
        return out[name]

    if case.op == "moe_sum":

        def moe_sum(x: Any) -> Any:
            total = kept("total", lambda: torch.empty_like(x.rows[:, 0]))
            torch.ops._moe_C.moe_sum(x.rows, total)
            return total

        return moe_sum
    rows_module = importlib.import_module(f"{_FOLDER}.moe_permute_unpermute")
    if case.op == "ids_to_rows":

        def permute(x: Any) -> Any:
            rows = kept("rows", lambda: x.hidden_states.new_empty((x.topk_ids.numel(), x.hidden_states.shape[1])))
            return rows_module.moe_permute(
                x.hidden_states, None, x.topk_ids, case["num_experts"], permuted_hidden_states=rows
            )[0]

        return permute

    def unpermute(x: Any) -> Any:
        total = kept("total", lambda: torch.empty_like(x.hidden_states))
        offsets = x.layout.expert_offsets
        rows_module.moe_unpermute(total, x.rows, x.topk_weights, x.layout.route_rows, offsets)
        return total

    return unpermute


def experts(act: Activation) -> Callable[[Any], Any]:
    """vLLM's layer of experts: its Triton kernels with the configurations that were tuned for the card.

    It clamps only where gate and up are interleaved, so gpt-oss's weights are copied into that order, once.
    """
    importlib.import_module("vllm._custom_ops")
    fused = importlib.import_module(f"{_FOLDER}.fused_moe").fused_experts_impl
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


def _route(case: Case) -> Callable[[Any], Any]:
    if case["num_groups"] > 1:

        def grouped(x: Any) -> Routing:
            o = x.options
            return Routing(
                *torch.ops._moe_C.grouped_topk(
                    x.router_logits, o["num_groups"], o["top_k_groups"], o["top_k"], o["renormalize"],
                    o["routed_scaling_factor"], o["selection_bias"], 1,
                )
            )  # fmt: skip

        return grouped
    out: list[Any] = []

    def softmax(x: Any) -> Routing:
        if not out:
            weights = x.router_logits.new_empty((case["num_tokens"], case["top_k"]), dtype=torch.float32)
            out[:] = weights, torch.empty_like(weights, dtype=torch.int32), torch.empty_like(weights, dtype=torch.int32)
        torch.ops._moe_C.topk_softmax(*out, x.router_logits, x.options["renormalize"], None)
        return Routing(out[0], out[1])

    return softmax
