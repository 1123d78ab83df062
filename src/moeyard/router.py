"""router_logits -> Routing: which experts each token goes to, and with what weight."""

from typing import Unpack

import torch
from torch import Tensor

from moeyard.checks import check_int, check_out, check_shape, check_tensor
from moeyard.impls import launcher
from moeyard.layout import moe_align_block_size
from moeyard.library import goes_straight
from moeyard.library_layer import ops
from moeyard.values import MAX_EXPERTS, Layout, RouterOptions, Routing

SCORINGS = ("softmax", "sigmoid")
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def route(
    router_logits: Tensor,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = False,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    routed_scaling_factor: float = 1.0,
    is_padding: Tensor | None = None,
    out: Routing | None = None,
    impl: str = "auto",
) -> Routing:
    """Chooses `top_k` experts for every token.

    Args:
        router_logits: [num_tokens, num_experts] float32, bfloat16 or float16, of any strides; at most 8192 experts.
        top_k: experts of a token, at most num_experts (with groups: at most the experts of `top_k_groups` of them).
        scoring: "softmax" over all experts or "sigmoid", in float32. A score that is NaN or infinite counts as 0.
        renormalize: whether the weights of a token are divided by their sum (where that is above 0).
        selection_bias: [num_experts] float32, added to the scores for the choice alone: the weights are scores.
        num_groups: consecutive groups of equal size that the experts are in; a divisor of num_experts.
        top_k_groups: groups that a token may choose from, those with the largest keys; at most num_groups.
        routed_scaling_factor: multiplies the weights at the end.
        is_padding: [num_tokens] bool; padding tokens get ids of -1 and weights of 0.
        out: a routing of the right shapes to overwrite.

    Experts are ranked by logit, or by score + bias in float32 where there is a bias; the lower id comes first on ties,
    and NaN ranks with -inf. A softmax row without a value (a NaN or +inf in it, or nothing but -inf) ranks all alike:
    it gets experts 0 to top_k - 1 with weights of 0. A group's key is that of its best expert; with a bias, the sum of
    its two best (DeepSeek-V3).

    Returns a `Routing`, best expert first. Gradients flow from the weights to the logits. Raises TypeError or
    ValueError naming the argument. Follows vLLM's `topk_softmax`, `topk_sigmoid` and `grouped_topk`; ranking by
    logits, not by rounded scores, keeps experts apart whose scores round to the same float32.
    """
    check_tensor("router_logits", router_logits, dtypes=LOGIT_DTYPES, ndim=(2,))
    _check_options(router_logits, top_k, scoring, selection_bias, num_groups, top_k_groups, is_padding)
    shape, device = (router_logits.shape[0], top_k), router_logits.device
    if out is not None:
        _check_routing_out(out, shape, device)
    if not goes_straight(router_logits, selection_bias, is_padding):
        fields = ops.route(
            router_logits, selection_bias, is_padding, top_k, scoring, renormalize, num_groups, top_k_groups,
            routed_scaling_factor, impl,
        )  # fmt: skip
        return Routing(*fields) if out is None else out.copy_(Routing(*fields))
    if out is None:
        weights, ids = router_logits.new_empty((2, *shape), dtype=torch.int32).unbind()
        out = Routing(weights.view(torch.float32), ids)
    launcher("route", impl, device, router_logits.dtype)(
        router_logits,
        selection_bias,
        is_padding,
        scoring=scoring,
        renormalize=renormalize,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        routed_scaling_factor=routed_scaling_factor,
        out=out,
    )
    return out


def route_and_align(
    router_logits: Tensor,
    *,
    block_size: int,
    expert_map: Tensor | None = None,
    num_local_experts: int | None = None,
    impl: str = "auto",
    **options: Unpack[RouterOptions],
) -> tuple[Routing, Layout]:
    """`route`, then `moe_align_block_size` of what it chose: where every token goes, from its logits.

    Args:
        router_logits: [num_tokens, num_experts], as in `route`; `options` are those of `route`.
        block_size, expert_map, num_local_experts: as in `moe_align_block_size`.
        impl: an implementation of both by name, or "auto".

    Returns (`Routing`, `Layout`); padding tokens have no slot. Raises as those two do.
    """
    routing = route(router_logits, impl=impl, **options)
    layout = moe_align_block_size(
        routing.topk_ids,
        num_experts=router_logits.shape[1],
        block_size=block_size,
        expert_map=expert_map,
        num_local_experts=num_local_experts,
        impl=impl,
    )
    return routing, layout


def _check_options(
    router_logits: Tensor,
    top_k: int,
    scoring: str,
    selection_bias: Tensor | None,
    num_groups: int,
    top_k_groups: int,
    is_padding: Tensor | None,
) -> None:
    num_tokens, num_experts = router_logits.shape
    check_int("router_logits.shape[1]", num_experts, low=1, high=MAX_EXPERTS)
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: expected one of {SCORINGS}, got {scoring!r}")
    if num_groups != 1 or top_k_groups != 1:
        check_int("num_groups", num_groups, low=1, high=num_experts)
        if num_experts % num_groups:
            raise ValueError(f"num_groups: expected a divisor of num_experts={num_experts}, got {num_groups}")
        check_int("top_k_groups", top_k_groups, low=1, high=num_groups)
    check_int("top_k", top_k, low=1, high=top_k_groups * (num_experts // num_groups))
    if selection_bias is not None:
        check_tensor("selection_bias", selection_bias, dtypes=(torch.float32,), ndim=(1,), device=router_logits.device)
        check_shape("selection_bias", selection_bias, (num_experts,), "one an expert")
        if selection_bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "selection_bias: expected a tensor that needs no gradient, got one with requires_grad=True"
            )
    if is_padding is not None:
        check_tensor("is_padding", is_padding, dtypes=(torch.bool,), ndim=(1,), device=router_logits.device)
        check_shape("is_padding", is_padding, (num_tokens,), "one a token")


def _check_routing_out(out: object, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(out, Routing):
        raise TypeError(f"out: expected a Routing, got {type(out).__name__}")
    check_out("out.topk_weights", out.topk_weights, shape, torch.float32, device)
    check_out("out.topk_ids", out.topk_ids, shape, torch.int32, device)
