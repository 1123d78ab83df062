"""Experts whose gradients are wanted: two operators that keep as little as a backward needs, and its formulas.

Forward: the first product by route, from hidden states that are not permuted; then `finish_experts`, all the rest.
Autograd keeps hidden states, first product, routing and layout. Nothing kept has a row of hidden_size per route. The
gradient of a router weight needs no expert's result y = W2 m: it is the dot product of m and W2^T g, which the backward
has anyway (Guo et al., SonicMoE, arXiv:2512.14080).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard.activation import (
    ACTIVATE,
    ACTIVATION,
    activation_gradient,
    flatten_activation,
    weighted_gradients,
)
from moeyard.combine import COMBINE, held_results
from moeyard.dispatch.op import Gradient, Op
from moeyard.dispatch.table import among, for_gradients
from moeyard.grouped_gemm import GROUPED_GEMM, outer_sums, product_gradients, row_sums
from moeyard.layout import moe_align_block_size
from moeyard.values import Activation, ExpertCall, Segments


class Routes(NamedTuple):
    """Where routes go, as products by route need it."""

    segments: Segments
    """Entries are routes; `divisor` is top_k."""
    route_rows: Tensor
    """[num_routes] int32: -1 where a route is dropped."""


class Needs(NamedTuple):
    """Which gradients of experts are wanted."""

    hidden_states: bool
    factors: bool
    w13: bool
    w2: bool
    w13_bias: bool
    w2_bias: bool


def routes_of(topk_ids: Tensor, call: ExpertCall, impl: str) -> Routes:
    """Where the routes of ids [num_tokens, top_k] go."""
    layout = moe_align_block_size(
        topk_ids,
        num_experts=call.num_experts,
        block_size=1,
        expert_map=call.expert_map,
        num_local_experts=call.weights.num_local_experts,
        impl=among("moe_align_block_size", impl),
    )
    firsts, slots = layout.expert_offsets[:-1], layout.sorted_token_ids
    segments = Segments(
        firsts, layout.expert_counts, slots, layout.top_k, call.num_experts, call.batch_invariant
    )  # fmt: skip
    return Routes(segments, layout.route_rows)


# The first product


def first_product(hidden_states: Tensor, factors: Tensor, routes: Routes, call: ExpertCall, impl: str) -> Tensor:
    """[num_routes, rows of w13]: what the activation takes, rounded to the dtype of `hidden_states`."""
    weights, num_routes = call.weights, factors.numel()
    if not call.weight_on_input:
        arguments = (hidden_states, weights.w13, weights.w13_bias, None, routes.segments, num_routes)
        return _product(arguments, impl)
    product = _product((hidden_states, weights.w13, None, factors, routes.segments, num_routes), impl)
    if weights.w13_bias is None:
        return product
    biases = products_by_route(hidden_states.new_ones(1, 1), weights.w13_bias.unsqueeze(2), routes, num_routes, impl)
    return product + biases


def _product(arguments: tuple[Any, ...], impl: str) -> Tensor:
    result: Tensor = GROUPED_GEMM(arguments, impl)
    return result


def products_by_route(
    rows: Tensor, matrices: Tensor, routes: Routes, num_routes: int, impl: str, bias: Tensor | None = None
) -> Tensor:
    """[num_routes, rows of a matrix]: products by route of one row for all, or of one row per token."""
    divisor = max(1, num_routes) if rows.shape[0] == 1 else routes.segments.divisor
    segments = routes.segments._replace(divisor=divisor)
    return _product((rows, matrices, bias, None, segments, num_routes), for_gradients(impl))


def first_gradients(
    grad: Tensor, hidden_states: Tensor, factors: Tensor, routes: Routes, call: ExpertCall, needs: Needs, impl: str
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, router weights, w13 and its bias from that of the first product."""
    weights, on_input = call.weights, call.weight_on_input
    operands = (hidden_states, weights.w13, None if on_input else weights.w13_bias, factors if on_input else None)
    wanted = (needs.hidden_states, needs.w13, needs.w13_bias and not on_input, needs.factors and on_input)
    hidden, first, bias, of_factors = product_gradients(grad, operands, routes.segments, wanted, impl)
    if needs.w13_bias and on_input:
        assert weights.w13_bias is not None
        apart = routes.segments._replace(divisor=1)
        bias = row_sums(grad, apart, grad.shape[0], weights.w13_bias.dtype, impl)
    return hidden, of_factors, first, bias


# All after it


def _flatten(
    product: Tensor, factors: Tensor | None, w2: Tensor, bias: Tensor | None, routes: Routes, *rest: Any
) -> tuple[Any, ...]:
    (first_rows, row_counts, slots, top_k, num_experts, _), route_rows = routes  # products that are kept vary
    gated, activation = rest
    return (
        product, factors, w2, bias, slots, first_rows, row_counts, route_rows, gated, *flatten_activation(activation),
        top_k, num_experts,
    )  # fmt: skip


def _gather(*flat: Any) -> tuple[Any, ...]:
    *operands, slots, first_rows, row_counts, route_rows, gated, name, alpha, beta, limit, top_k, num_experts = flat
    routes = Routes(Segments(first_rows, row_counts, slots, top_k, num_experts), route_rows)
    return *operands, routes, gated, Activation(name, alpha, beta, limit)


def _allocate(product: Tensor, _factors: Tensor | None, w2: Tensor, _bias: Any, routes: Routes, *_: Any) -> Tensor:
    return product.new_empty((routes.route_rows.shape[0] // routes.segments.divisor, w2.shape[1]))


def _launch(
    impl: str, out: Tensor, product: Tensor, factors: Tensor | None, w2: Tensor, bias: Tensor | None, routes: Routes,
    gated: bool, activation: Activation,
) -> None:  # fmt: skip
    middle = ACTIVATE((product, gated, activation), among("activate", impl))
    apart, route_rows = routes.segments._replace(divisor=1), routes.route_rows
    rows = _product((middle, w2, bias, factors, apart, route_rows.shape[0]), impl)
    where = torch.where(route_rows >= 0, torch.arange(rows.shape[0], device=rows.device), -1).int()
    COMBINE((rows, where, None, routes.segments.divisor), among("combine", impl), out, apart=True)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.gated, name, alpha, beta, limit, ctx.top_k, ctx.num_experts, ctx.impl = inputs
    ctx.activation = Activation(name, alpha, beta, limit)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *operands, slots, first_rows, row_counts, route_rows = ctx.saved_tensors
    routes = Routes(Segments(first_rows, row_counts, slots, ctx.top_k, ctx.num_experts), route_rows)
    curve = (ctx.gated, ctx.activation)
    return *finish_gradients(grad, tuple(operands), routes, curve, ctx.needs_input_grad[:4], ctx.impl), *(None,) * 12


def finish_gradients(
    grad: Tensor, operands: tuple[Any, ...], routes: Routes, curve: tuple[bool, Activation], needs: tuple[bool, ...],
    impl: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the first product, router weights, w2 and its bias from that of the result.

    Args:
        grad: [num_tokens, hidden_size], the gradient of the result.
        operands: (product [num_routes, rows of w13], router weights or None, w2, its bias or None).
        routes: where they go.
        curve: whether there is a gate, and the activation.
        needs: which of the four are wanted.
        impl: that of the forward.
    """
    (product, factors, w2, bias), impl = operands, for_gradients(impl)
    segments, num_routes = routes.segments, product.shape[0]
    invariant = segments.batch_invariant
    found: list[Tensor | None] = [None] * 4
    dtype, column = product.dtype, None if factors is None else factors.reshape(-1, 1)
    if needs[1] or needs[2]:
        back = products_by_route(grad, w2.to(dtype).transpose(1, 2), routes, num_routes, impl)
        of_product, weighted, dots = weighted_gradients(product, back, factors, *curve, impl, invariant)
        del back  # of [num_routes, intermediate_size]: gone before the next sums
        found[0] = of_product if needs[0] else None
    elif needs[0]:
        back = products_by_route(grad, w2.to(dtype).transpose(1, 2), routes, num_routes, impl)
        weighted = back if column is None else back * column
        found[0] = activation_gradient(product, weighted, *curve, impl, invariant)
    if needs[1]:
        if bias is not None:
            dots = dots + products_by_route(grad, bias.to(dtype).unsqueeze(1), routes, num_routes, impl).squeeze(1)
        dots = torch.where(held_results(segments, num_routes), dots, 0)
        found[1] = dots.to(factors.dtype).view_as(factors)
    if needs[2]:
        found[2] = outer_sums(grad, weighted, segments, 1, w2.dtype, impl)
    if needs[3]:
        if column is None:
            found[3] = row_sums(grad, segments, num_routes, bias.dtype, impl)
        else:
            found[3] = outer_sums(grad, column.to(dtype), segments, 1, bias.dtype, impl).squeeze(2)
    return tuple(found)


FINISH_EXPERTS = Op(
    "finish_experts(Tensor product, Tensor? topk_weights, Tensor w2, Tensor? w2_bias, Tensor sorted_token_ids, "
    f"Tensor first_rows, Tensor row_counts, Tensor route_rows, {ACTIVATION}, SymInt top_k, SymInt num_experts, "
    "str impl) -> Tensor",
    flatten=_flatten,
    gather=_gather,
    seen=lambda product, factors, w2, bias, *_: (product, factors, w2, bias),
    allocate=_allocate,
    launch=_launch,
    gradient=Gradient(("product", "topk_weights", "w2", "w2_bias"), _setup, _backward),
    composed=True,
)


# Both


def experts_keeping_products(
    hidden_states: Tensor, factors: Tensor, topk_ids: Tensor, call: ExpertCall, impl: str
) -> Tensor:
    """`fused_experts` whose backward finds the first product kept."""
    routes, weights = routes_of(topk_ids, call, impl), call.weights
    product = first_product(hidden_states, factors, routes, call, impl)
    operands = (product, None if call.weight_on_input else factors, weights.w2, weights.w2_bias)
    result: Tensor = FINISH_EXPERTS((*operands, routes, weights.gated, call.activation), impl)
    return result


def experts_gradients(
    grad: Tensor, hidden_states: Tensor, factors: Tensor, topk_ids: Tensor, call: ExpertCall, needs: Needs, impl: str
) -> tuple[Tensor | None, ...]:
    """The gradients of `fused_experts`, in the order of `Needs`, from its inputs, with the first product again.

    Those of hidden states and router weights depend on no batch where the result does not. ValueError for gradients of
    these, which torch computes.
    """
    if call.batch_invariant and torch.is_grad_enabled():
        raise ValueError(
            "batch_invariant: expected False where gradients have gradients (create_graph=True), which depend on the "
            "batch, got True"
        )
    impl, weights, on_input = for_gradients(impl), call.weights, call.weight_on_input
    routes = routes_of(topk_ids, call, impl)
    before = needs.hidden_states or needs.w13 or needs.w13_bias or (needs.factors and on_input)
    of_product, of_factors, second, second_bias = finish_gradients(
        grad,
        (  # no name holds the product, so that it is gone when this returns
            first_product(hidden_states, factors, routes, call, impl), None if on_input else factors, weights.w2,
            weights.w2_bias,
        ),
        routes, (weights.gated, call.activation),
        (before, needs.factors and not on_input, needs.w2, needs.w2_bias), impl,
    )  # fmt: skip
    hidden = first = first_bias = None
    if of_product is not None:
        hidden, early, first, first_bias = first_gradients(
            of_product, hidden_states, factors, routes, call, needs, impl
        )
        of_factors = early if on_input else of_factors
    return hidden, of_factors, first, second, first_bias, second_bias
