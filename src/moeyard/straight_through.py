"""Experts that train at a lower precision: a forward of rounded weights and rows, gradients as if nothing were rounded.

The masters stay what is trained. A scheme rounds them, the layer of rounded weights answers, and the derivative of
every rounding counts as 1: the straight-through estimator (Bengio et al., arXiv:1308.3432). In blocks of e4m3 it is
the forward of DeepSeek-V3 (arXiv:2412.19437, section 3.3). There products of gradients are e4m3, too; here they have
the dtype of the hidden states.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moeyard.activation import ACTIVATE, ACTIVATION, flatten_activation, weighted_gradients
from moeyard.combine import held_results, sums_in_order
from moeyard.dispatch.checks import QUANTISED_ROWS, check_activation, check_experts, check_routed, check_tensor
from moeyard.dispatch.invariance import batch_invariance
from moeyard.dispatch.op import Gradient, Op
from moeyard.dispatch.table import among, for_gradients
from moeyard.experts import FUSED_EXPERTS
from moeyard.grouped_gemm import outer_sums, product_gradients, row_sums
from moeyard.quant import ExpertScales, QuantScheme, scheme_of
from moeyard.quantize import quantize_experts
from moeyard.training import Routes, products_by_route, routes_of
from moeyard.values import Activation, ExpertCall, ExpertWeights, Routing
from moeyard.vectorised.quant import CHUNK_BYTES, matrices_of, quantise_rows


def _flatten(hidden_states: Tensor, routing: Routing, masters: ExpertWeights, call: ExpertCall) -> tuple[Any, ...]:
    rounded = call.weights
    assert rounded.scales is not None
    return (
        hidden_states, routing.topk_weights, routing.topk_ids, call.expert_map, masters.w13, masters.w2,
        masters.w13_bias, masters.w2_bias, rounded.w13, rounded.w2, *rounded.scales.tensors[:_SCALES],
        str(rounded.scheme), rounded.gated, *flatten_activation(call.activation), call.num_experts,
        call.batch_invariant,
    )  # fmt: skip


_SCALES = 6
"""Tensors of scales that are no scales of activations: those are dynamic here."""


def _gather(*flat: Any) -> tuple[Any, ...]:
    hidden_states, factors, ids, expert_map, w13, w2, b13, b2, first, second = flat[:10]
    scales, (words, gated, *curve, num_experts, invariant) = flat[10 : 10 + _SCALES], flat[10 + _SCALES :]
    masters = ExpertWeights(w13, w2, b13, b2, gated)
    biases = [None if bias is None else bias.to(hidden_states.dtype) for bias in (b13, b2)]
    rounded = ExpertWeights(first, second, biases[0], biases[1], gated, scheme_of(words), ExpertScales(*scales))
    call = ExpertCall(rounded, Activation(*curve), num_experts, expert_map, batch_invariant=invariant)
    return hidden_states, Routing(factors, ids), masters, call


def _seen(hidden_states: Tensor, routing: Routing, masters: ExpertWeights, call: ExpertCall) -> tuple[Any, ...]:
    of_masters = (masters.w13, masters.w2, masters.w13_bias, masters.w2_bias)
    return (hidden_states, routing.topk_weights, routing.topk_ids, call.expert_map, *of_masters, call.weights.w13)


def _launch(
    impl: str, out: Tensor, hidden_states: Tensor, routing: Routing, _: ExpertWeights, call: ExpertCall
) -> None:
    FUSED_EXPERTS((hidden_states, routing, call), impl, out, apart=True)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *rest, ctx.impl, invariant = inputs[10 + _SCALES :]
    ctx.rest = (*rest, invariant)
    ctx.save_for_backward(*inputs[: 10 + _SCALES])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise ValueError(
            "create_graph: expected False for straight_through_experts, whose gradients have no gradients, got True"
        )
    hidden_states, routing, masters, call = _gather(*ctx.saved_tensors, *ctx.rest)
    needs = ctx.needs_input_grad
    found = _gradients(grad, hidden_states, routing, masters, call, (*needs[:2], *needs[4:8]), ctx.impl)
    hidden, factors, *of_weights = found
    return hidden, factors, None, None, *of_weights, *(None,) * (len(needs) - 8)


def _gradients(
    grad: Tensor, hidden_states: Tensor, routing: Routing, masters: ExpertWeights, call: ExpertCall,
    needs: tuple[bool, ...], impl: str,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of hidden states, router weights, w13, w2 and biases. Rounded values take the place of given ones."""
    impl, rounded, dtype = for_gradients(impl), call.weights, hidden_states.dtype
    scheme, curve = rounded.scheme, (rounded.gated, call.activation)
    assert scheme is not None
    first, second = matrices_of(rounded)
    routes = routes_of(routing.topk_ids, call, impl)
    segments, num_routes, factors = routes.segments, routing.topk_weights.numel(), routing.topk_weights
    rows, w13 = _rounded_rows(hidden_states, scheme), first.values(dtype)
    product = products_by_route(rows, w13, routes, num_routes, impl, rounded.w13_bias)
    back = products_by_route(grad, second.values(dtype).transpose(1, 2), routes, num_routes, impl)
    of_product = weighted_gradients(product, back, factors, *curve, impl, segments.batch_invariant).rows
    found: list[Tensor | None] = [None] * 6
    if needs[1] or needs[3]:
        middle = _rounded_rows(ACTIVATE((product, *curve), among("activate", impl)), scheme)
        if needs[1]:
            found[1] = _of_factors(grad, middle, back, routes, rounded.w2_bias, impl).view_as(factors)
        del back, product
        if needs[3]:
            weighted = (middle * factors.reshape(-1, 1)).to(dtype)
            found[3] = outer_sums(grad, weighted, segments, 1, masters.w2.dtype, impl)
            del weighted, middle
    if needs[5]:
        assert masters.w2_bias is not None
        column = factors.reshape(-1, 1).to(dtype)
        found[5] = outer_sums(grad, column, segments, 1, masters.w2_bias.dtype, impl).squeeze(2)
    apart = segments._replace(divisor=1)
    if needs[0]:
        operands = (None, w13, None, None)
        found[0] = product_gradients(of_product, operands, segments, (True, False, False, False), impl)[0]
    if needs[2]:
        found[2] = outer_sums(of_product, rows, apart, segments.divisor, masters.w13.dtype, impl)
    if needs[4]:
        assert masters.w13_bias is not None
        found[4] = row_sums(of_product, apart, num_routes, masters.w13_bias.dtype, impl)
    return found


def _of_factors(grad: Tensor, middle: Tensor, back: Tensor, routes: Routes, bias: Tensor | None, impl: str) -> Tensor:
    """[num_routes]: what an expert gave for a route, times the gradient of its token."""
    num_routes = middle.shape[0]
    products = middle.float() * back.float()
    dots = sums_in_order(products, impl) if routes.segments.batch_invariant else products.sum(1)
    if bias is not None:
        dots = dots + products_by_route(grad, bias.unsqueeze(1), routes, num_routes, impl).squeeze(1)
    return torch.where(held_results(routes.segments, num_routes), dots, 0)


def _rounded_rows(rows: Tensor, scheme: QuantScheme) -> Tensor:
    """Rows as the scheme's products meet them, rounded to their dtype, some at a time."""
    if scheme.activations == "none":
        return rows
    out = torch.empty_like(rows)
    step = max(1, CHUNK_BYTES // max(1, 4 * rows.shape[1]))
    for part, some in zip(out.split(step), rows.split(step), strict=True):
        part.copy_(quantise_rows(some, scheme, None, 0))
    return out


STRAIGHT_THROUGH_EXPERTS = Op(
    "straight_through_experts(Tensor hidden_states, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    "Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, Tensor w13_codes, Tensor w2_codes, Tensor w13_scale, "
    "Tensor w2_scale, Tensor? w13_zero_points, Tensor? w2_zero_points, Tensor? w13_global_scale, "
    f"Tensor? w2_global_scale, str scheme, {ACTIVATION}, SymInt num_experts, str impl, "
    "bool batch_invariant=False) -> Tensor",
    flatten=_flatten,
    gather=_gather,
    seen=_seen,
    allocate=lambda hidden_states, *_: hidden_states.new_empty(hidden_states.shape),
    launch=_launch,
    gradient=Gradient(("hidden_states", "topk_weights", "w13", "w2", "w13_bias", "w2_bias"), _setup, _backward),
    composed=True,
)


def straight_through_experts(
    hidden_states: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    scheme: QuantScheme,
    *,
    quantized: ExpertWeights | None = None,
    activation: Activation | None = None,
    num_experts: int | None = None,
    expert_map: Tensor | None = None,
    batch_invariant: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """`fused_experts` of weights rounded to a scheme, whose gradients go to the weights that were rounded.

    Args:
        hidden_states: [num_tokens, hidden_size] float32, bfloat16 or float16.
        routing: as in `fused_experts`.
        weights: the masters: float32, or of another dtype of `quantize_experts`, in any mixture with `hidden_states`.
        scheme: what weights, and the rows that they meet, are rounded to: `moeyard.quant.FP8_BLOCK` rounds weights to
            e4m3 in blocks of 128 x 128 and rows in groups of 128. Activations have no static scales; nothing is tiled.
        quantized: what `quantize_experts(weights, scheme)` gives, for several batches between two steps of an
            optimizer. Unless given it is made in the call. Whether it belongs to the weights is not looked at.
        activation, num_experts, expert_map, batch_invariant, impl: as in `fused_experts`.

    Returns [num_tokens, hidden_size], bit by bit `fused_experts` of the quantised weights. Gradients are those of a
    layer of the rounded values: with W' and x' for these, of W it is that of W' x' by W', of x that by x'
    (straight-through). They are computed in the dtype of `hidden_states` with float32 sums and have the dtypes of what
    they belong to. Gradients of gradients are refused. The backward finds the codes kept, and makes the first product
    again. Raises TypeError or ValueError naming the argument. Follows DeepSeek-V3 (arXiv:2412.19437, section 3.3) but
    for its products of gradients, which are e4m3.
    """
    check_tensor("hidden_states", hidden_states, dtypes=QUANTISED_ROWS, ndim=(2,))
    if not isinstance(scheme, QuantScheme):
        raise TypeError(f"scheme: expected a QuantScheme, got {type(scheme).__name__}")
    if scheme.static or scheme.tiled:
        raise ValueError(f"scheme: expected one in rows whose scales of activations are dynamic, got '{scheme}'")
    activation = check_activation(activation)
    if quantized is None:
        quantized = quantize_experts(_detached(weights), scheme)
    elif not isinstance(quantized, ExpertWeights) or quantized.scheme != scheme:
        said = quantized.scheme if isinstance(quantized, ExpertWeights) else type(quantized).__name__
        raise ValueError(f"quantized: expected weights of scheme '{scheme}', got '{said}'")
    _check_same(weights, quantized)
    dtype = hidden_states.dtype
    biases = [None if bias is None else bias.to(dtype) for bias in (weights.w13_bias, weights.w2_bias)]
    rounded = replace(quantized, w13_bias=biases[0], w2_bias=biases[1])
    check_experts(rounded, hidden_states)
    num_experts = check_routed(routing, hidden_states, weights, num_experts, expert_map)
    call = ExpertCall(
        rounded, activation, num_experts, expert_map, batch_invariant=batch_invariance(batch_invariant)
    )  # fmt: skip
    result: Tensor = STRAIGHT_THROUGH_EXPERTS((hidden_states, routing, weights, call), impl)
    return result


def _detached(weights: ExpertWeights) -> ExpertWeights:
    """The same values without gradients; what is no such weights is left to a check."""
    if not isinstance(weights, ExpertWeights):
        return weights
    biases = [None if bias is None else bias.detach() for bias in (weights.w13_bias, weights.w2_bias)]
    return replace(
        weights, w13=weights.w13.detach(), w2=weights.w2.detach(), w13_bias=biases[0], w2_bias=biases[1]
    )  # fmt: skip


def _check_same(weights: object, quantized: ExpertWeights) -> None:
    """Both are of as many experts of one size, on one device, and no slices that begin inside a block."""
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights: expected ExpertWeights, got {type(weights).__name__}")
    if weights.scheme is not None:
        raise ValueError(f"weights.scheme: expected None (masters are not quantised), got {weights.scheme}")
    for name in ("w13", "w2"):
        check_tensor(f"weights.{name}", getattr(weights, name), dtypes=QUANTISED_ROWS, ndim=(3,))
    assert quantized.scheme is not None

    def facts(one: ExpertWeights, per_byte: int) -> tuple[Any, ...]:
        experts, rows, columns = one.w13.shape
        return experts, rows, columns * per_byte, one.gated, one.w13.device

    mine, theirs = facts(weights, 1), facts(quantized, quantized.scheme.per_byte)
    if mine != theirs or quantized.scales is None or quantized.scales.block_start:
        raise ValueError(f"quantized: expected (experts, rows, columns, gated, device) of weights {mine}, got {theirs}")
