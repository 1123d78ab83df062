"""router_logits -> Routing: which experts each token goes to, and with what weight."""

from typing import Unpack

import torch
from torch import Tensor

from moeyard.checks import check_router_options, check_routes, check_routing_out, check_tensor
from moeyard.impls import launcher, with_layout_launcher
from moeyard.layout import moe_align_block_size
from moeyard.library import goes_straight
from moeyard.library_layer import ops
from moeyard.outputs import allocate_layout_at_once, allocate_routing, cached_layout_lengths, check_sizes
from moeyard.tiles import MOST_DECODE_TOKENS
from moeyard.values import ROUTER_DEFAULTS, Layout, RouterOptions, Routing

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
    check_router_options(router_logits, top_k, scoring, selection_bias, num_groups, top_k_groups, is_padding)
    shape, device = (router_logits.shape[0], top_k), router_logits.device
    if out is not None:
        check_routing_out(out, shape, device)
    if not goes_straight(router_logits, selection_bias, is_padding):
        fields = ops.route(
            router_logits, selection_bias, is_padding, top_k, scoring, renormalize, num_groups, top_k_groups,
            routed_scaling_factor, impl,
        )  # fmt: skip
        return Routing(*fields) if out is None else out.copy_(Routing(*fields))
    if out is None:
        weights = torch.empty(shape, dtype=torch.float32, device=device)  # quicker than two slices of one allocation
        out = Routing(weights, torch.empty(shape, dtype=torch.int32, device=device))
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

    Returns (`Routing`, `Layout`); padding tokens have no slot. Raises as those two do. Small batches of CUDA tensors
    take one launch.
    """
    at_once = _at_once(router_logits, block_size, expert_map, num_local_experts, impl, options)
    if at_once is not None:
        return at_once
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


def _at_once(
    router_logits: Tensor,
    block_size: int,
    expert_map: Tensor | None,
    num_local_experts: int | None,
    impl: str,
    options: RouterOptions,
) -> tuple[Routing, Layout] | None:
    """What `route_and_align` returns, from an implementation that does both together; None if that is not quicker."""
    check_tensor("router_logits", router_logits, dtypes=LOGIT_DTYPES, ndim=(2,))
    chosen: RouterOptions = {**ROUTER_DEFAULTS, **options}
    if set(chosen) != {"top_k", *ROUTER_DEFAULTS} or not goes_straight(
        router_logits, expert_map, chosen["selection_bias"], chosen["is_padding"]
    ):
        return None
    launch = with_layout_launcher("route", impl, router_logits.device, router_logits.dtype)
    if launch is None or router_logits.shape[0] > MOST_DECODE_TOKENS:
        return None
    check_router_options(
        router_logits, chosen["top_k"], chosen["scoring"], chosen["selection_bias"], chosen["num_groups"],
        chosen["top_k_groups"], chosen["is_padding"],
    )  # fmt: skip
    num_experts, top_k = router_logits.shape[1], chosen["top_k"]
    sizes = (num_experts, num_experts if num_local_experts is None else num_local_experts, block_size, top_k)
    check_sizes(*sizes[:3])
    routing = allocate_routing(router_logits, top_k)
    check_routes(routing.topk_ids, top_k, expert_map, num_experts)
    lengths = cached_layout_lengths(routing.topk_ids.numel(), *sizes[1:3])
    layout = allocate_layout_at_once(routing.topk_ids.new_empty, lengths, sizes)
    return (routing, layout) if launch(router_logits, expert_map, chosen, routing=routing, layout=layout) else None
