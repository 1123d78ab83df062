"""The registered ops of the layer: router, products, activation, experts. `library.py` says how ops are reached."""

from typing import Any

import torch
from torch import Tensor

from moeyard.ids import narrow_ids
from moeyard.library import define, find, register_gradient
from moeyard.values import Activation, ExpertWeights, Routing

ops = torch.ops.moeyard
"""Where the registered ops are called; importing it from here registers them."""

# Router


def _allocate_route(
    router_logits: Tensor, selection_bias: Tensor | None, is_padding: Tensor | None, top_k: int, *options_and_impl: Any
) -> tuple[Tensor, Tensor]:
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


def _route(
    out: tuple[Tensor, Tensor],
    router_logits: Tensor,
    selection_bias: Tensor | None,
    is_padding: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    top_k_groups: int,
    routed_scaling_factor: float,
    impl: str,
) -> None:
    find("route", impl, router_logits)(
        router_logits,
        selection_bias,
        is_padding,
        scoring=scoring,
        renormalize=renormalize,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        routed_scaling_factor=routed_scaling_factor,
        out=Routing(*out),
    )


define(
    "route(Tensor router_logits, Tensor? selection_bias, Tensor? is_padding, SymInt top_k, str scoring, "
    "bool renormalize, int num_groups, int top_k_groups, float routed_scaling_factor, str impl) -> "
    "(Tensor topk_weights, Tensor topk_ids)",
    _allocate_route,
    _route,
)


def _route_setup(ctx: Any, inputs: Any, output: Any) -> None:
    router_logits, _, _, _, ctx.scoring, ctx.renormalize, _, _, ctx.factor, _ = inputs
    ctx.save_for_backward(router_logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _route_backward(ctx: Any, grad_weights: Tensor, _grad_ids: Any) -> tuple[Any, ...]:
    """The choice is constant; weights are the scores of the chosen, maybe over their sum, times the factor."""
    router_logits, ids = ctx.saved_tensors
    logits, taken = router_logits.float(), ids >= 0
    where = ids.clamp(min=0).long()
    scores = torch.softmax(logits, 1) if ctx.scoring == "softmax" else torch.sigmoid(logits)
    scores = torch.where(scores.isfinite(), scores, 0)
    chosen = torch.where(taken, scores.gather(1, where), 0)
    grad = torch.where(taken, grad_weights * ctx.factor, 0)
    if ctx.renormalize:
        total = chosen.sum(1, keepdim=True)
        total = torch.where(total > 0, total, 1)
        grad = torch.where(taken, grad / total - (grad * chosen).sum(1, keepdim=True) / total.square(), 0)
    grad_scores = torch.zeros_like(scores).scatter_add(1, where, grad)
    if ctx.scoring == "softmax":
        grad_logits = scores * (grad_scores - (grad_scores * scores).sum(1, keepdim=True))
    else:
        grad_logits = grad_scores * scores * (1 - scores)
    return grad_logits.to(router_logits.dtype), *(None,) * 9


register_gradient("route", _route_setup, _route_backward)


# Products, activations, experts. Gradients are not there yet: the public functions refuse what needs one.


def _grouped_gemm(
    out: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    sorted_token_ids: Tensor | None,
    row_divisor: int,
    first_rows: Tensor,
    row_counts: Tensor,
    num_results: int,
    impl: str,
) -> None:
    find("grouped_gemm", impl, rows)(
        rows,
        weight,
        bias,
        topk_weights,
        sorted_token_ids=sorted_token_ids,
        row_divisor=row_divisor,
        first_rows=first_rows,
        row_counts=row_counts,
        out=out,
    )


def _activate(
    out: Tensor, rows: Tensor, gated: bool, name: str, alpha: float, beta: float, limit: float | None, impl: str
) -> None:
    find("activate", impl, rows)(rows, Activation(name, alpha, beta, limit), gated=gated, out=out)


def _fused_experts(
    out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    gated: bool,
    name: str,
    alpha: float,
    beta: float,
    limit: float | None,
    num_experts: int,
    weight_on_input: bool,
    impl: str,
) -> None:
    find("fused_experts", impl, hidden_states)(
        hidden_states,
        topk_weights,
        narrow_ids(topk_ids),
        expert_map,
        ExpertWeights(w13, w2, w13_bias, w2_bias, gated),
        activation=Activation(name, alpha, beta, limit),
        num_experts=num_experts,
        weight_on_input=weight_on_input,
        out=out,
    )


_ACTIVATION = "bool gated, str name, float alpha, float beta, float? limit"
define(
    "grouped_gemm(Tensor rows, Tensor weight, Tensor? bias, Tensor? topk_weights, Tensor? sorted_token_ids, "
    "SymInt row_divisor, Tensor first_rows, Tensor row_counts, SymInt num_results, str impl) -> Tensor",
    lambda rows, weight, *rest: rows.new_empty((rest[-2], weight.shape[1])),
    _grouped_gemm,
)
define(
    f"activate(Tensor rows, {_ACTIVATION}, str impl) -> Tensor",
    lambda rows, gated, *_: rows.new_empty((rows.shape[0], rows.shape[1] // 2 if gated else rows.shape[1])),
    _activate,
)
define(
    "fused_experts(Tensor hidden_states, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor w13, "
    f"Tensor w2, Tensor? w13_bias, Tensor? w2_bias, {_ACTIVATION}, SymInt num_experts, bool weight_on_input, str impl) "
    "-> Tensor",
    lambda hidden_states, *_: hidden_states.new_empty(hidden_states.shape),
    _fused_experts,
)
