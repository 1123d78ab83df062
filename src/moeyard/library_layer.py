"""The registered ops of the layer: router, products, activation, experts. `library.py` says how ops are reached."""

from typing import Any

import torch
from torch import Tensor

from moeyard.library import define, find, register_gradient
from moeyard.values import Routing

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
