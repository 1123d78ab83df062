"""Tokens through their experts: hidden_states and a Routing -> hidden_states."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from moeyard.activation import ACTIVATION, flatten_activation
from moeyard.dispatch import checks
from moeyard.dispatch.again import Calling, Repeats, calling_of
from moeyard.dispatch.call import Call, facts_of_experts
from moeyard.dispatch.checks import FLOATS, check_activation, check_experts, check_tensor
from moeyard.dispatch.ids import narrow_ids
from moeyard.dispatch.invariance import batch_invariance
from moeyard.dispatch.op import Gradient, Op, needs_gradient
from moeyard.dispatch.table import companion
from moeyard.quant import ExpertScales, scheme_of
from moeyard.training import Needs, experts_gradients, experts_keeping_products
from moeyard.values import Activation, ExpertCall, ExpertWeights, Routing


def _flatten(hidden_states: Tensor, routing: Routing, call: ExpertCall) -> tuple[Any, ...]:
    weights, scales = call.weights, call.weights.scales
    return (
        hidden_states, routing.topk_weights, routing.topk_ids, call.expert_map, weights.w13, weights.w2,
        weights.w13_bias, weights.w2_bias, *(_NO_SCALES if scales is None else scales.tensors),
        0 if scales is None else scales.block_start, "" if weights.scheme is None else str(weights.scheme),
        weights.gated, *flatten_activation(call.activation), call.num_experts, call.weight_on_input,
        call.batch_invariant,
    )  # fmt: skip


_NO_SCALES = (None,) * 8


def _gather(
    hidden_states: Tensor, factors: Tensor, ids: Tensor, expert_map: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    w13, w2, b13, b2 = rest[:4]
    words, gated, *curve, num_experts, weight_on_input, invariant = rest[13:]
    scheme = scheme_of(words) if words else None
    scales = None if scheme is None else ExpertScales(*rest[4:13])
    weights, activation = ExpertWeights(w13, w2, b13, b2, gated, scheme, scales), Activation(*curve)
    call = ExpertCall(weights, activation, num_experts, expert_map, weight_on_input, invariant)
    return hidden_states, Routing(factors, ids), call


def _tensors(hidden_states: Tensor, factors: Tensor, ids: Tensor, call: ExpertCall) -> tuple[Tensor | None, ...]:
    weights, scales = call.weights, call.weights.scales
    return (
        hidden_states, factors, ids, call.expert_map, weights.w13, weights.w2, weights.w13_bias, weights.w2_bias,
        *(() if scales is None else scales.tensors),
    )  # fmt: skip


def _call(hidden_states: Tensor, routing: Routing, call: ExpertCall) -> Call | None:
    scheme, invariant = call.weights.scheme, call.batch_invariant
    if hidden_states.is_cpu and scheme is None and not invariant:  # where no implementation looks at sizes
        return None
    tokens, top_k = routing.topk_ids.shape
    facts = facts_of_experts(call.weights)
    if scheme is None:
        facts = facts._replace(dtype=hidden_states.dtype)  # masters are cast
    device, dtype = hidden_states.device, hidden_states.dtype
    return Call(device, dtype, facts, tokens, top_k, call.num_experts, call.weight_on_input, invariant)


def _launch(launch: Any, out: Tensor, hidden_states: Tensor, routing: Routing, call: ExpertCall) -> None:
    weights, dtype = call.weights, hidden_states.dtype
    if weights.scheme is None and any(t is not None and t.dtype != dtype for t in _of_weights(weights)):
        cast = [None if t is None else t.to(dtype) for t in _of_weights(weights)]
        w13, w2, w13_bias, w2_bias = cast
        assert w13 is not None and w2 is not None
        call = call._replace(weights=replace(weights, w13=w13, w2=w2, w13_bias=w13_bias, w2_bias=w2_bias))
    launch(hidden_states, routing.topk_weights, narrow_ids(routing.topk_ids), call, out=out)


def _of_weights(weights: ExpertWeights) -> tuple[Tensor | None, ...]:
    return weights.w13, weights.w2, weights.w13_bias, weights.w2_bias


_SCHEME = 17
"""Where the schema lists the scheme."""


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *rest, ctx.impl, invariant = inputs[8:]
    ctx.rest = (*rest, invariant)
    ctx.save_for_backward(*inputs[:8])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden_states, routing, call = _gather(*ctx.saved_tensors, *ctx.rest)
    wanted = ctx.needs_input_grad
    needs = Needs(wanted[0], wanted[1], *wanted[4:8])
    factors, ids = routing.topk_weights, routing.topk_ids
    hidden, of_factors, *of_weights = experts_gradients(grad, hidden_states, factors, ids, call, needs, ctx.impl)
    return hidden, of_factors, None, None, *of_weights, *(None,) * 19


FUSED_EXPERTS = Op(
    "fused_experts(Tensor hidden_states, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor w13, "
    "Tensor w2, Tensor? w13_bias, Tensor? w2_bias, Tensor? w13_scale, Tensor? w2_scale, Tensor? w13_zero_points, "
    "Tensor? w2_zero_points, Tensor? w13_global_scale, Tensor? w2_global_scale, Tensor? w13_input_scale, "
    f"Tensor? w2_input_scale, SymInt block_start, str scheme, {ACTIVATION}, SymInt num_experts, "
    "bool weight_on_input, str impl, bool batch_invariant=False) -> Tensor",
    flatten=_flatten,
    gather=_gather,
    seen=lambda hidden_states, routing, call: _tensors(hidden_states, routing.topk_weights, routing.topk_ids, call),
    allocate=lambda hidden_states, *_: hidden_states.new_empty(hidden_states.shape),
    call=_call,
    launch=_launch,
    gradient=Gradient(
        ("hidden_states", "topk_weights", "w13", "w2", "w13_bias", "w2_bias"),
        _setup,
        _backward,
        applies=lambda *flat: not flat[_SCHEME],
    ),
)
SAVES = ("product", "inputs")
"""What `fused_experts` keeps for a backward."""


def fused_experts(
    hidden_states: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    *,
    activation: Activation | None = None,
    num_experts: int | None = None,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    batch_invariant: bool | None = None,
    save: str = "product",
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sends every token through its experts and adds up what comes out, weighted.

    Args:
        hidden_states: [num_tokens, hidden_size] float32, bfloat16, float16 or float64.
        routing: of the same tokens. Ids may be int32, int64 or uint32; dropped ones (as in `moe_align_block_size`) add
            nothing: a token with no other gets zeros.
        weights: of the experts of this rank, dtype of `hidden_states`; or quantised, with scheme and scales: then
            `hidden_states` are not float64, and the scheme says how rows are rounded before each product. Under
            torch.autocast to the dtype of `hidden_states` they may be float32 (masters), rounded to it here.
        activation: silu unless given.
        num_experts: global number of experts; as many as `weights` or `expert_map` has unless given.
        expert_map: [num_experts] int32, as in `moe_align_block_size`.
        apply_router_weight_on_input: whether weights multiply a token's row before its experts, not what comes out.
        batch_invariant: whether a token's result may not depend on the batch around it, bit for bit: which tokens there
            are, how many, in what order. `cpu`, `triton` and the products of `cuda` promise that, and others refuse.
            None asks MOEYARD_BATCH_INVARIANT, which is read once: 1 is True, 0 (or unset) False.
        save: what a backward finds kept beside inputs and layout: "product", the first product before the activation,
            [num_tokens * top_k, rows of w13]; or "inputs", nothing, so that the backward multiplies once more.
        out: [num_tokens, hidden_size] of the dtype of `hidden_states`, to overwrite.

    Returns [num_tokens, hidden_size]. Sums are float32 (float64 rows: float64). What the activation leaves is rounded
    to the dtype once, and the result once. Beyond a few tokens on a GPU each route's row is rounded, too: of float16
    the weighted row, which stays finite where the row alone would not. Gradients flow to hidden states, router weights,
    weights and biases, in the dtypes of these, and sums have a fixed order. Where one is wanted and the product saved,
    that is rounded to the dtype, too. With a scheme gradients are refused
    (`straight_through_experts` has some). Gradients of a batch-invariant result need
    `save="inputs"`. Those of hidden states and router weights do not depend on the batch, either. Those of an expert's
    weights are sums over its tokens: they depend on these and their order alone. Raises TypeError or ValueError naming
    the argument. Follows vLLM's `fused_experts`; for `batch_invariant` see `dispatch/invariance.py`.
    """
    asked = (activation, num_experts, apply_router_weight_on_input, batch_invariant, save, impl)
    calling = _calling(hidden_states, routing, weights, expert_map, out, asked)
    repeated = None if calling is None else _repeated(calling, hidden_states, routing, weights, expert_map, out)
    if repeated is not None:
        return repeated
    check_tensor("hidden_states", hidden_states, dtypes=FLOATS, ndim=(2,))
    check_experts(weights, hidden_states)
    activation = check_activation(activation)
    num_experts = checks.check_routed(routing, hidden_states, weights, num_experts, expert_map)
    ids, factors = routing.topk_ids, routing.topk_weights
    checks.check_flag("apply_router_weight_on_input", apply_router_weight_on_input)
    invariant = batch_invariance(batch_invariant)
    _check_save(save)
    if out is not None:
        checks.check_out("out", out, tuple(hidden_states.shape), hidden_states.dtype, hidden_states.device)
    call = ExpertCall(weights, activation, num_experts, expert_map, apply_router_weight_on_input, invariant)
    arguments = (hidden_states, routing, call)
    if save == "product" and weights.scheme is None and needs_gradient(hidden_states, factors, *_of_weights(weights)):
        if invariant:
            raise ValueError(
                "save: expected 'inputs' for batch-invariant results with gradients, got 'product', which rounds a "
                "product more"
            )
        kept = experts_keeping_products(hidden_states, factors, ids, call, impl)
        return kept if out is None else FUSED_EXPERTS.fill(out, kept, arguments)
    result: Tensor = FUSED_EXPERTS(arguments, impl, out)
    _REPEATS.add(calling, lambda: experts_anew(hidden_states, routing, call, impl))
    return result


_REPEATS = Repeats()
"""Calls of `fused_experts` on GPUs, whose checks would take longer than their launches."""


def _calling(
    hidden_states: object, routing: object, weights: object, expert_map: object, out: object, asked: tuple[Any, ...]
) -> Calling | None:
    """How a call is known again; None for quantised weights, whose checks are many more."""
    if type(routing) is not Routing or type(weights) is not ExpertWeights or weights.scheme is not None:
        return None
    ids, w13 = routing.topk_ids, weights.w13
    if not isinstance(ids, Tensor) or not isinstance(w13, Tensor):
        return None
    others = (routing.topk_weights, ids, w13, weights.w2, weights.w13_bias, weights.w2_bias, expert_map, out)
    return calling_of(hidden_states, others, (ids.shape, w13.shape, weights.gated, *asked))


def _repeated(
    calling: Calling, hidden_states: Tensor, routing: Routing, weights: ExpertWeights, expert_map: Tensor | None,
    out: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The result of a call whose like has been checked; None where nothing has done so, or it has to be again."""
    found = _REPEATS.find(*calling)
    if found is None or found.start is None:
        return None
    if out is None:
        out = hidden_states.new_empty(hidden_states.shape)
    elif found.is_apart(out, calling[1]):
        increment_version(out)
    else:
        return None
    done = found.start(hidden_states, routing.topk_weights, routing.topk_ids, weights, expert_map, out)
    return out if done else None


def experts_anew(hidden_states: Tensor, routing: Routing, call: ExpertCall, impl: str) -> Callable[..., bool] | None:
    """What repeats a call on the implementation that has met it: (hidden states, router weights, ids, weights, map,
    out) -> whether it could. None where that has nothing of the kind.
    """
    ids, dtype = routing.topk_ids, hidden_states.dtype
    if ids.dtype == torch.uint32 or any(t is not None and t.dtype != dtype for t in _of_weights(call.weights)):
        return None  # they are cast first
    facts = _call(hidden_states, routing, call)
    prepare = companion("fused_experts", "anew", impl, hidden_states.device, dtype, facts)
    return None if prepare is None else prepare(hidden_states, routing.topk_weights, ids, call)


def _check_save(save: object) -> None:
    if save not in SAVES:
        raise ValueError(f"save: expected one of {SAVES}, got {save!r}")
