"""router_logits -> Routing: which experts each token goes to, and with what weight."""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from moeyard.dispatch.again import Repeats, calling_of
from moeyard.dispatch.call import Call
from moeyard.dispatch.checks import check_router, check_routes, check_routing_out, check_sizes, check_tensor
from moeyard.dispatch.invariance import batch_invariance
from moeyard.dispatch.op import Gradient, Op, goes_straight
from moeyard.dispatch.sizes import MOST_FUSED_TOKENS, cached_layout_lengths
from moeyard.dispatch.table import companion
from moeyard.layout import aligned_anew, moe_align_block_size
from moeyard.layout_memory import allocate_layout_at_once, memory_of
from moeyard.values import Layout, Router, RouterOptions, Routing

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _allocate(router_logits: Tensor, _bias: Tensor | None, _padding: Tensor | None, router: Router, _: bool) -> Routing:
    shape = (router_logits.shape[0], router.top_k)
    weights = router_logits.new_empty(shape, dtype=torch.float32)  # quicker than two slices of one allocation
    return Routing(weights, router_logits.new_empty(shape, dtype=torch.int32))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    router_logits, _, _, *router, _, _ = inputs
    ctx.router = Router(*router)
    ctx.save_for_backward(router_logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_weights: Tensor, _grad_ids: Any) -> tuple[Any, ...]:
    """The choice is constant; weights are the scores of the chosen, maybe over their sum, times the factor."""
    router_logits, ids = ctx.saved_tensors
    router: Router = ctx.router
    taken, where = ids >= 0, ids.clamp(min=0).long()
    logits = router_logits.double() if router.renormalize else router_logits.float()  # tiny scores have ratios, too
    if router.scoring == "softmax":
        scores = torch.softmax(logits, 1)
    elif router.scoring == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()
    scores = torch.where(scores.isfinite(), scores, 0)
    chosen = torch.where(taken, scores.gather(1, where), 0)
    grad = torch.where(taken, grad_weights.to(logits.dtype) * router.routed_scaling_factor, 0)
    if router.renormalize:
        kept = chosen.float().sum(1, keepdim=True) > 0  # the others got weights of 0
        total = torch.where(kept, chosen.sum(1, keepdim=True), 1)
        centred = grad - (grad * chosen / total).sum(1, keepdim=True)
        grad = torch.where(taken & kept, centred / total, 0)
    grad_scores = torch.zeros_like(scores).scatter(1, where, grad)  # a token's ids differ, or all are padding's: zeros
    if router.scoring == "softmax":
        grad_logits = scores * (grad_scores - (grad_scores * scores).sum(1, keepdim=True))
    elif router.scoring == "sigmoid":
        grad_logits = grad_scores * scores * (1 - scores)
    else:
        grad_logits = torch.where(scores > 0, grad_scores * torch.sigmoid(logits) / (2 * scores), 0)
    return grad_logits.to(router_logits.dtype), *(None,) * 10


ROUTE = Op(
    "route(Tensor router_logits, Tensor? selection_bias, Tensor? is_padding, SymInt top_k, str scoring, "
    "bool renormalize, int num_groups, int top_k_groups, float routed_scaling_factor, str impl, "
    "bool batch_invariant=False) -> (Tensor topk_weights, Tensor topk_ids)",
    flatten=lambda logits, bias, padding, router, invariant: (logits, bias, padding, *router, invariant),
    gather=lambda logits, bias, padding, *rest: (logits, bias, padding, Router(*rest[:-1]), rest[-1]),
    allocate=_allocate,
    assemble=lambda fields, *_: Routing(*fields),
    call=lambda logits, *rest: Call(logits.device, logits.dtype, batch_invariant=True) if rest[-1] else None,
    launch=lambda launch, out, logits, bias, padding, router, _: launch(logits, bias, padding, router, out=out),
    gradient=Gradient(("router_logits",), _setup, _backward),
)


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
    batch_invariant: bool | None = None,
    impl: str = "auto",
) -> Routing:
    """Chooses `top_k` experts for every token.

    Args:
        router_logits: [num_tokens, num_experts] float32, bfloat16 or float16, of any strides; at most 8192 experts.
        top_k: experts of a token, at most num_experts (with groups: at most the experts of `top_k_groups` of them).
        scoring: "softmax" over all experts, "sigmoid", or "sqrtsoftplus", which is sqrt(log(1 + exp(logit))); in
            float32. A score that is NaN or infinite counts as 0.
        renormalize: whether the weights of a token are divided by their sum (where that is above 0).
        selection_bias: [num_experts] float32, added to the scores for the choice alone: the weights are scores.
        num_groups: consecutive groups of equal size that the experts are in; a divisor of num_experts.
        top_k_groups: groups that a token may choose from, those with the largest keys; at most num_groups.
        routed_scaling_factor: multiplies the weights at the end.
        is_padding: [num_tokens] bool; padding tokens get ids of -1 and weights of 0.
        out: a routing of the right shapes to overwrite.
        batch_invariant: whether only implementations may answer that promise a token the same bits in any batch, which
            `cpu` and `cuda` always do; None asks `MOEYARD_BATCH_INVARIANT`, as in `fused_experts`.

    Experts are ranked by logit, or by score + bias in float32 where there is a bias; the lower id comes first on ties,
    and NaN ranks with -inf. A softmax row without a value (a NaN or +inf in it, or nothing but -inf) ranks all alike:
    it gets experts 0 to top_k - 1 with weights of 0. A group's key is that of its best expert; with a bias, the sum of
    its two best (DeepSeek-V3).

    Returns a `Routing`, best expert first. Gradients flow from the weights to the logits. Raises TypeError or
    ValueError naming the argument. Follows vLLM's `topk_softmax`, `topk_sigmoid`, `topk_softplus_sqrt` and
    `grouped_topk`; ranking by logits, not by rounded scores, keeps experts apart whose scores round to one float32.
    """
    asked = (top_k, scoring, renormalize, num_groups, top_k_groups, routed_scaling_factor, batch_invariant, impl)
    calling = None if out is not None else calling_of(router_logits, (selection_bias, is_padding), asked)
    repeated: Routing | None = _ROUTES.repeated(calling, router_logits, selection_bias, is_padding)
    if repeated is not None:
        return repeated
    check_tensor("router_logits", router_logits, dtypes=LOGIT_DTYPES, ndim=(2,))
    router = Router(top_k, scoring, renormalize, num_groups, top_k_groups, routed_scaling_factor)
    check_router(router_logits, router, selection_bias, is_padding)
    invariant = batch_invariance(batch_invariant)
    if out is not None:
        check_routing_out(out, (router_logits.shape[0], top_k), router_logits.device)
    arguments = (router_logits, selection_bias, is_padding, router, invariant)
    routing: Routing = ROUTE(arguments, impl, out)
    _ROUTES.add(calling, lambda: routing_anew(arguments, impl))
    return routing


_ROUTES, _BOTH = Repeats(), Repeats()
"""Calls of `route` and of `route_and_align` on GPUs."""


def _companion(kind: str, logits: Tensor, impl: str, invariant: bool) -> Callable[..., Any] | None:
    facts = Call(logits.device, logits.dtype, batch_invariant=True) if invariant else None
    return companion("route", kind, impl, logits.device, logits.dtype, facts)


def routing_anew(arguments: tuple[Any, ...], impl: str) -> Callable[..., Routing | None] | None:
    """What gives the routing of other logits: (logits, bias, padding) -> routing, or None where it could not."""
    prepare = _companion("anew", arguments[0], impl, arguments[-1])
    start = None if prepare is None else prepare(*arguments[:-1])
    if start is None:
        return None
    rest = arguments[3:]

    def repeat(logits: Tensor, bias: Tensor | None, padding: Tensor | None) -> Routing | None:
        routing = _allocate(logits, bias, padding, *rest)
        weights, ids = routing.topk_weights.data_ptr(), routing.topk_ids.data_ptr()
        return routing if start(logits, bias, padding, weights, ids) else None

    return repeat


def route_and_align(
    router_logits: Tensor,
    *,
    block_size: int,
    expert_map: Tensor | None = None,
    num_local_experts: int | None = None,
    batch_invariant: bool | None = None,
    impl: str = "auto",
    **options: Unpack[RouterOptions],
) -> tuple[Routing, Layout]:
    """`route`, then `moe_align_block_size` of what it chose: where every token goes, from its logits.

    Args:
        router_logits: [num_tokens, num_experts], as in `route`; `options` are the keyword arguments of `route`.
        block_size, expert_map, num_local_experts: as in `moe_align_block_size`.
        batch_invariant: as in `route`; layouts are integers.
        impl: an implementation of both by name, or "auto".

    Returns (`Routing`, `Layout`); padding tokens have no slot. Raises as those two do. Small batches of CUDA tensors
    take one launch.
    """
    given: dict[str, Any] = options  # type: ignore[assignment]  # what is no tensor, after these two
    bias, padding = given.pop("selection_bias", None), given.pop("is_padding", None)
    asked = (block_size, num_local_experts, batch_invariant, impl, *given, *given.values())
    calling = calling_of(router_logits, (bias, padding, expert_map), asked)
    both: tuple[Routing, Layout] | None = _BOTH.repeated(calling, router_logits, bias, padding, expert_map)
    if both is not None:
        return both
    invariant = batch_invariance(batch_invariant)
    both = _at_once(router_logits, bias, padding, expert_map, block_size, num_local_experts, impl, given)
    if both is None:
        routing = route(
            router_logits, selection_bias=bias, is_padding=padding, batch_invariant=batch_invariant, impl=impl,
            **given,
        )  # fmt: skip
        both = routing, moe_align_block_size(
            routing.topk_ids, num_experts=router_logits.shape[1], block_size=block_size, expert_map=expert_map,
            num_local_experts=num_local_experts, impl=impl,
        )  # fmt: skip
    tensors, (routing, layout) = (router_logits, bias, padding), both
    _BOTH.add(calling, lambda: _repeat_of_both((*tensors, Router(**given), invariant), expert_map, layout, impl))
    return routing, layout


def _repeat_of_both(
    arguments: tuple[Any, ...], expert_map: Tensor | None, layout: Layout, impl: str
) -> Callable[..., tuple[Routing, Layout] | None] | None:
    """What gives routing and layout of other logits: (logits, bias, padding, map) -> both, or None where it could not.

    It makes one launch, or those of `route` and of `moe_align_block_size`.
    """
    logits, bias, padding, router, invariant = arguments
    together = _companion("with layout anew", logits, impl, invariant)
    start = None if together is None else together(logits, bias, padding, expert_map, router, layout)
    if start is None:
        start = _two_launches_anew(arguments, expert_map, layout, impl)
    if start is None:
        return None
    words, split = memory_of(layout)

    def repeat(
        logits: Tensor, bias: Tensor | None, padding: Tensor | None, mapping: Tensor | None
    ) -> tuple[Routing, Layout] | None:
        routing = _allocate(logits, bias, padding, router, invariant)
        factors, ids = routing.topk_weights, routing.topk_ids
        memory = ids.new_empty(words)
        done = start(logits, bias, padding, mapping, factors.data_ptr(), ids.data_ptr(), memory.data_ptr())
        return (routing, split(memory)) if done else None

    return repeat


def _two_launches_anew(
    arguments: tuple[Any, ...], expert_map: Tensor | None, layout: Layout, impl: str
) -> Callable[..., bool] | None:
    """What starts the launches of `route` and `moe_align_block_size`, as `with layout anew` starts one for both."""
    logits, bias, padding, router, invariant = arguments
    prepare = _companion("anew", logits, impl, invariant)
    first = None if prepare is None else prepare(logits, bias, padding, router)
    second = aligned_anew(_allocate(*arguments).topk_ids, expert_map, layout, impl)
    if first is None or second is None:
        return None

    def start(
        logits: Tensor, bias: Tensor | None, padding: Tensor | None, mapping: Tensor | None, factors: int, ids: int,
        memory: int,
    ) -> bool:  # fmt: skip
        return bool(first(logits, bias, padding, factors, ids) and second(ids, mapping, memory))

    return start


def _at_once(
    router_logits: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    expert_map: Tensor | None,
    block_size: int,
    num_local_experts: int | None,
    impl: str,
    options: dict[str, Any],
) -> tuple[Routing, Layout] | None:
    """What `route_and_align` returns, from an implementation that does both together; None if that is not quicker."""
    check_tensor("router_logits", router_logits, dtypes=LOGIT_DTYPES, ndim=(2,))
    if "top_k" not in options or not options.keys() <= set(Router._fields):
        return None  # `route` says what is wrong
    if not goes_straight(router_logits, expert_map, bias, padding):
        return None
    launch = companion("route", "with layout", impl, router_logits.device, router_logits.dtype)
    if launch is None or router_logits.shape[0] > MOST_FUSED_TOKENS:
        return None
    router = Router(**options)
    check_router(router_logits, router, bias, padding)
    num_experts = router_logits.shape[1]
    sizes = (num_experts, num_experts if num_local_experts is None else num_local_experts, block_size, router.top_k)
    check_sizes(*sizes[:3])
    routing = _allocate(router_logits, bias, padding, router, False)
    ids = routing.topk_ids
    check_routes(ids, router.top_k, expert_map, num_experts)
    layout = allocate_layout_at_once(ids.new_empty, cached_layout_lengths(ids.numel(), *sizes[1:3]), sizes)
    return (routing, layout) if launch(router_logits, bias, padding, expert_map, router, routing, layout) else None
