"""The layer: tokens through their experts, and around that the router and the shared experts."""

from typing import Unpack

import torch
from torch import Tensor

from moeyard import checks
from moeyard.activation import check_activation
from moeyard.checks import FLOATS, check_experts, check_shape, check_tensor
from moeyard.ids import narrow_ids
from moeyard.impls import launcher
from moeyard.library import goes_straight
from moeyard.library_layer import ops
from moeyard.router import route
from moeyard.values import MAX_EXPERTS, Activation, ExpertWeights, RouterOptions, Routing


def fused_experts(
    hidden_states: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    *,
    activation: Activation | None = None,
    num_experts: int | None = None,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sends every token through its experts and adds up what comes out, weighted.

    Args:
        hidden_states: [num_tokens, hidden_size] float32, bfloat16, float16 or float64.
        routing: of the same tokens. Ids may be int32, int64 or uint32; dropped ones (as in `moe_align_block_size`) add
            nothing: a token with no other gets zeros.
        weights: of the experts of this rank, dtype of `hidden_states`.
        activation: silu unless given.
        num_experts: global number of experts; those of `weights`, or of `expert_map`, unless given.
        expert_map: [num_experts] int32, as in `moe_align_block_size`.
        apply_router_weight_on_input: whether weights multiply a token's row before its experts, not what comes out.
        out: [num_tokens, hidden_size] of the dtype of `hidden_states`, to overwrite; not `hidden_states` itself.

    Returns [num_tokens, hidden_size]. Sums are float32 (float64 rows: float64); what the activation leaves is rounded
    to the dtype once, and the result once (beyond a few tokens on a GPU also each route's row before the sum). Raises
    TypeError or ValueError naming the argument; also where a gradient is needed, which this op does not have yet.
    Follows vLLM's `fused_experts`.
    """
    check_tensor("hidden_states", hidden_states, dtypes=FLOATS, ndim=(2,))
    check_experts(weights, hidden_states)
    activation = check_activation(activation)
    num_tokens, device = hidden_states.shape[0], hidden_states.device
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    ids, factors = routing.topk_ids, routing.topk_weights
    check_tensor("routing.topk_ids", ids, dtypes=checks.ID_DTYPES, ndim=(2,), device=device)
    check_tensor("routing.topk_weights", factors, dtypes=(torch.float32,), ndim=(2,), device=device)
    checks.check_int("routing.topk_ids.shape[1]", ids.shape[1], low=1)
    check_shape("routing.topk_ids", ids, (num_tokens, ids.shape[1]), "the tokens of hidden_states")
    check_shape("routing.topk_weights", factors, tuple(ids.shape), "that of topk_ids")
    if num_experts is None:
        num_experts = weights.num_local_experts if expert_map is None else expert_map.shape[0]
    checks.check_int("num_experts", num_experts, low=1, high=MAX_EXPERTS)
    if expert_map is not None:
        check_tensor("expert_map", expert_map, dtypes=(torch.int32,), ndim=(1,), device=device)
        check_shape("expert_map", expert_map, (num_experts,), "num_experts")
    w13, w2, b13, b2 = weights.w13, weights.w2, weights.w13_bias, weights.w2_bias
    checks.refuse_gradients(hidden_states=hidden_states, w13=w13, w2=w2, w13_bias=b13, w2_bias=b2, topk_weights=factors)
    if out is not None:
        checks.check_out("out", out, tuple(hidden_states.shape), hidden_states.dtype, device)
        if out.untyped_storage().data_ptr() == hidden_states.untyped_storage().data_ptr() and out.numel():
            raise ValueError("out: expected a tensor beside hidden_states, got one in the same storage")
    if not goes_straight(hidden_states, ids, factors, expert_map, w13, w2):
        a = activation
        result: Tensor = ops.fused_experts(
            hidden_states, factors, ids, expert_map, w13, w2, b13, b2, weights.gated, a.name, a.alpha, a.beta, a.limit,
            num_experts, apply_router_weight_on_input, impl,
        )  # fmt: skip
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    launcher("fused_experts", impl, device, hidden_states.dtype)(
        hidden_states,
        factors,
        narrow_ids(ids),
        expert_map,
        weights,
        activation=activation,
        num_experts=num_experts,
        weight_on_input=apply_router_weight_on_input,
        out=out,
    )
    return out


def moe_layer(
    hidden_states: Tensor,
    router_weight: Tensor,
    weights: ExpertWeights,
    *,
    router_bias: Tensor | None = None,
    activation: Activation | None = None,
    shared: ExpertWeights | None = None,
    shared_gate: Tensor | None = None,
    impl: str = "auto",
    **router_options: Unpack[RouterOptions],
) -> Tensor:
    """A whole Mixture-of-Experts layer: linear router, choice, experts, shared experts.

    Args:
        hidden_states: [num_tokens, hidden_size], as in `fused_experts`.
        router_weight: [num_experts, hidden_size]; logits are computed in its dtype.
        weights: of all experts.
        router_bias: [num_experts], added to the logits (gpt-oss).
        activation: of routed and shared experts; silu unless given.
        shared: one expert (several shared ones side by side are one wide one) that every token goes through.
        shared_gate: [1, hidden_size]: the sigmoid of its product with a token weighs the shared expert (Qwen3-Next).
        impl: an implementation of the experts by name, or "auto"; the router takes "auto".
        router_options: those of `route`; `top_k` must be among them. Padding tokens get what the shared expert gives.

    Returns [num_tokens, hidden_size]. Raises TypeError or ValueError naming the argument.
    """
    check_tensor("hidden_states", hidden_states, dtypes=FLOATS, ndim=(2,))
    check_experts(weights, hidden_states)
    check_tensor("router_weight", router_weight, dtypes=FLOATS, ndim=(2,), device=hidden_states.device)
    shape = (weights.num_local_experts, hidden_states.shape[1])
    check_shape("router_weight", router_weight, shape, "the experts and hidden_size of weights")
    if shared_gate is not None and shared is None:
        raise ValueError("shared: expected the shared experts beside shared_gate, got None")
    logits = torch.nn.functional.linear(hidden_states.to(router_weight.dtype), router_weight, router_bias)
    routing = route(logits.float() if logits.dtype == torch.float64 else logits, **router_options)
    result = fused_experts(hidden_states, routing, weights, activation=activation, impl=impl)
    if shared is None:
        return result
    check_experts(shared, hidden_states)
    if shared.num_local_experts != 1:
        raise ValueError(f"shared: expected one expert (side by side as one wide one), got {shared.num_local_experts}")
    if shared_gate is None:
        factor = hidden_states.new_ones(hidden_states.shape[0], 1, dtype=torch.float32)
    else:
        check_tensor("shared_gate", shared_gate, dtypes=FLOATS, ndim=(2,), device=hidden_states.device)
        check_shape("shared_gate", shared_gate, (1, hidden_states.shape[1]), "hidden_size of weights")
        gate = torch.nn.functional.linear(hidden_states.to(shared_gate.dtype), shared_gate)
        factor = torch.sigmoid(gate.float())
    everyone = Routing(factor, torch.zeros_like(factor, dtype=torch.int32))
    return result.add_(fused_experts(hidden_states, everyone, shared, activation=activation, impl=impl))
