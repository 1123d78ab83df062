"""The whole layer: router, experts, shared experts."""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from moeyard.dispatch.again import Calling, Repeats, calling_of
from moeyard.dispatch.checks import FLOATS, check_experts, check_shape, check_tensor
from moeyard.dispatch.invariance import batch_invariance
from moeyard.experts import experts_anew, fused_experts
from moeyard.grouped_gemm import GROUPED_GEMM
from moeyard.router import route, routing_anew
from moeyard.values import Activation, ExpertCall, ExpertWeights, Router, RouterOptions, Routing, Segments


def moe_layer(
    hidden_states: Tensor,
    router_weight: Tensor,
    weights: ExpertWeights,
    *,
    router_bias: Tensor | None = None,
    activation: Activation | None = None,
    shared: ExpertWeights | None = None,
    shared_gate: Tensor | None = None,
    batch_invariant: bool | None = None,
    save: str = "product",
    impl: str = "auto",
    **router_options: Unpack[RouterOptions],
) -> Tensor:
    """A whole Mixture-of-Experts layer: linear router, choice, experts, shared experts.

    Args:
        hidden_states: [num_tokens, hidden_size], as in `fused_experts`.
        router_weight: [num_experts, hidden_size]; logits are computed in its dtype.
        weights: of all experts, of a scheme or not.
        router_bias: [num_experts] of the dtype of router_weight, added to the logits (gpt-oss).
        activation: of routed and shared experts; silu unless given.
        shared: one expert (several shared ones side by side are one wide one) that every token goes through.
        shared_gate: [1, hidden_size]: the sigmoid of its product with a token weighs the shared expert (Qwen3-Next).
        batch_invariant: as in `fused_experts`, of the whole layer: then router and `shared_gate` are multiplied by
            `grouped_gemm`'s implementations, not by torch.
        save: as in `fused_experts`, of routed and shared experts.
        impl: an implementation of the experts by name, or "auto"; the router takes "auto".
        router_options: options of `route`; `top_k` must be among them. Padding tokens get what the shared expert gives.

    Returns [num_tokens, hidden_size]. Gradients flow to all floats. Raises TypeError or ValueError naming the argument.
    """
    given: dict[str, Any] = router_options  # type: ignore[assignment]  # what is no tensor, after these two
    bias, padding = given.pop("selection_bias", None), given.pop("is_padding", None)
    asked = (activation, batch_invariant, save, impl, *given, *given.values())
    tensors = (router_weight, router_bias, shared_gate, bias, padding)
    calling = _calling(hidden_states, tensors, weights, shared, asked)
    invariant = batch_invariance(batch_invariant)
    linear = _linear_by_row if invariant else _linear

    def experts(routing: Routing, weights: ExpertWeights) -> Tensor:
        return fused_experts(
            hidden_states, routing, weights, activation=activation, batch_invariant=invariant, save=save, impl=impl
        )

    repeated = _REPEATS.repeated(calling, hidden_states, router_weight, router_bias, weights, bias, padding)
    if repeated is None:
        _check(hidden_states, router_weight, router_bias, weights, shared, shared_gate)
        logits = linear(hidden_states, router_weight, router_bias)
        logits = logits.float() if logits.dtype == torch.float64 else logits
        routing = route(
            logits, selection_bias=bias, is_padding=padding, batch_invariant=invariant, **given
        )  # fmt: skip
        result = experts(routing, weights)
        _REPEATS.add(calling, lambda: _repeat_of(
            hidden_states, linear, (logits, bias, padding, Router(**given), invariant), routing,
            ExpertCall(weights, activation or Activation(), weights.num_local_experts, batch_invariant=invariant), impl,
        ))  # fmt: skip
    else:
        result = repeated
    if shared is None:
        return result
    if shared_gate is None:
        factor = hidden_states.new_ones(hidden_states.shape[0], 1, dtype=torch.float32)
    else:
        logits = linear(hidden_states, shared_gate)
        if invariant:  # torch's sigmoid may differ between the vectors of a tensor and what is left of it
            factor = route(logits, top_k=1, scoring="sigmoid", batch_invariant=True).topk_weights
        else:
            factor = torch.sigmoid(logits.float())
    return result.add_(experts(Routing(factor, torch.zeros_like(factor, dtype=torch.int32)), shared))


_REPEATS = Repeats()
"""Layers on GPUs, up to what the shared experts add."""


def _calling(
    hidden_states: Tensor,
    tensors: tuple[Tensor | None, ...],
    weights: ExpertWeights,
    shared: ExpertWeights | None,
    asked: tuple[Any, ...],
) -> Calling | None:
    """How a call is known again; None for quantised weights, and under autocast, which admits other dtypes."""
    others = list(tensors)
    for given in (weights,) if shared is None else (weights, shared):
        if type(given) is not ExpertWeights or given.scheme is not None:
            return None
        others += (given.w13, given.w2, given.w13_bias, given.w2_bias)
    if torch.is_autocast_enabled("cuda"):
        return None
    return calling_of(hidden_states, others, (weights.gated, None if shared is None else shared.gated, *asked))


def _repeat_of(
    hidden_states: Tensor,
    linear: Callable[..., Tensor],
    routed: tuple[Any, ...],
    routing: Routing,
    call: ExpertCall,
    impl: str,
) -> Callable[..., Tensor | None] | None:
    """What gives the result of the routed experts for other tensors, or None where it could not: (hidden states, router
    weight and bias, weights, selection bias, padding).
    """
    choose, compute = routing_anew(routed, "auto"), experts_anew(hidden_states, routing, call, impl)
    if choose is None or compute is None:
        return None

    def repeat(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: ExpertWeights, selection: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        chosen = choose(linear(hidden, weight, bias), selection, padding)
        if chosen is None:
            return None
        out = hidden.new_empty(hidden.shape)
        return out if compute(hidden, chosen.topk_weights, chosen.topk_ids, weights, None, out) else None

    return repeat


def _check(
    hidden_states: Tensor, router_weight: Tensor, router_bias: Tensor | None, weights: ExpertWeights,
    shared: ExpertWeights | None, shared_gate: Tensor | None,
) -> None:  # fmt: skip
    """What `moe_layer` has to be sure of before it begins."""
    check_tensor("hidden_states", hidden_states, dtypes=FLOATS, ndim=(2,))
    check_experts(weights, hidden_states)
    check_tensor("router_weight", router_weight, dtypes=FLOATS, ndim=(2,), device=hidden_states.device)
    shape = (weights.num_local_experts, hidden_states.shape[1])
    check_shape("router_weight", router_weight, shape, "the experts and hidden_size of weights")
    if shared_gate is not None and shared is None:
        raise ValueError("shared: expected the shared experts beside shared_gate, got None")
    if router_bias is not None:
        check_tensor("router_bias", router_bias, dtypes=(router_weight.dtype,), ndim=(1,), device=hidden_states.device)
        check_shape("router_bias", router_bias, (weights.num_local_experts,), "one per expert")
    if shared is not None:
        check_experts(shared, hidden_states)
        if (count := shared.num_local_experts) != 1:
            raise ValueError(f"shared: expected one expert (side by side as one wide one), got {count}")
    if shared_gate is not None:
        check_tensor("shared_gate", shared_gate, dtypes=FLOATS, ndim=(2,), device=hidden_states.device)
        check_shape("shared_gate", shared_gate, (1, hidden_states.shape[1]), "hidden_size of weights")


def _linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden_states @ weight.T + bias in the dtype of `weight`, also under autocast."""
    rows, kind = hidden_states.to(weight.dtype), hidden_states.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # there is none for meta tensors
        return torch.nn.functional.linear(rows, weight, bias)
    with torch.autocast(kind, enabled=False):
        return torch.nn.functional.linear(rows, weight, bias)


def _linear_by_row(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as a product of one expert, so that a row does not depend on the others."""
    num_tokens, device = hidden_states.shape[0], hidden_states.device
    counts = torch.full((1,), num_tokens, dtype=torch.int32, device=device)
    segments = Segments(torch.zeros(1, dtype=torch.int64, device=device), counts, batch_invariant=True)
    biases = None if bias is None else bias.unsqueeze(0)
    operands = (hidden_states.to(weight.dtype), weight.unsqueeze(0), biases, None, segments, num_tokens)
    result: Tensor = GROUPED_GEMM(operands, "auto")
    return result
