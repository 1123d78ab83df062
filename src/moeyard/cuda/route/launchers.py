"""Routers of CUDA tensors: one launch of route.cu, or of route_block.cu for many experts or groups."""

from collections.abc import Callable

import torch
from torch import Tensor

from moeyard.cuda.route.plan import RouterPlan, router_plan
from moeyard.cuda.runtime.cards import WARP, card_of
from moeyard.cuda.runtime.launch import SETTINGS, Launch, Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import KINDS, float_bits
from moeyard.cuda.runtime.planning import Noted
from moeyard.cuda.runtime.ready import Ready
from moeyard.values import Router, Routing

BLOCK_THREADS = 256
"""Of route_block.cu."""
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
"""In the order of their numbers in route.cuh."""


def route_launch(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    is_padding: Tensor | None,
    router: Router,
    *,
    out: Routing,
) -> None:
    """Fills a routing from float32, bfloat16 or float16 logits [T, E]; see route.cu for what ranks how."""
    device = router_logits.get_device()
    router_logits = dense_rows(router_logits)
    num_tokens, num_experts = router_logits.shape
    if not num_tokens:
        return
    bias = padding = 0
    if selection_bias is not None:
        selection_bias = selection_bias.contiguous()
        bias = selection_bias.data_ptr()
    if is_padding is not None:
        is_padding = is_padding.contiguous()
        padding = is_padding.data_ptr()
    logits = router_logits.data_ptr()
    stride = router_logits.stride(0) * router_logits.element_size()
    key = (
        num_tokens, num_experts, router, router_logits.dtype, stride, (logits | stride) & 15,
        None if selection_bias is None else bias & 15, device, SETTINGS["programmatic"],
    )  # fmt: skip
    launch, shape = _READY.get(key) or _READY.add(key, _prepare(*key))
    weights, ids = out.topk_weights.data_ptr(), out.topk_ids.data_ptr()
    launch(shape, logits, bias, padding, weights, ids)


def route_anew(
    router_logits: Tensor, selection_bias: Tensor | None, is_padding: Tensor | None, router: Router
) -> Callable[..., bool] | None:
    """What repeats `route_launch` for other tensors of equal shapes, strides and dtypes: (logits, bias, padding,
    addresses of weights and of ids) -> whether it could.

    It cannot for logits or a bias that begin elsewhere modulo 16 bytes, and after `programmatic_launch` has changed.
    None for tensors that are copied first.
    """
    given = (selection_bias, is_padding)
    dense = dense_rows(router_logits) is router_logits and all(t is None or t.is_contiguous() for t in given)
    if not dense or not router_logits.shape[0]:
        return None
    stride = router_logits.stride(0) * router_logits.element_size()
    misaligned = (router_logits.data_ptr() | stride) & 15
    programmatic = SETTINGS["programmatic"]
    of_bias = None if selection_bias is None else selection_bias.data_ptr() & 15
    key = (
        *router_logits.shape, router, router_logits.dtype, stride, misaligned, of_bias, router_logits.get_device(),
        programmatic,
    )  # fmt: skip
    launch, shape = _READY.get(key) or _READY.add(key, _prepare(*key))

    def repeat(logits: Tensor, bias: Tensor | None, padding: Tensor | None, weights: int, ids: int) -> bool:
        address, biases = logits.data_ptr(), 0 if bias is None else bias.data_ptr()
        if (address | stride) & 15 != misaligned or biases & 15 != (of_bias or 0):
            return False
        if SETTINGS["programmatic"] is not programmatic:
            return False
        launch(shape, address, biases, 0 if padding is None else padding.data_ptr(), weights, ids)
        return True

    return repeat


_READY = Ready()


def _prepare(
    num_tokens: int,
    num_experts: int,
    router: Router,
    dtype: torch.dtype,
    stride: int,
    misaligned: int,
    bias: int | None,
    device: int,
    programmatic: bool,
) -> tuple[Launch | Noted, Shape]:
    num_groups = router.num_groups
    plan = router_plan(num_experts, num_groups)
    sizes = (num_tokens, *router_sizes(router), stride)
    defines = router_defines(num_experts, num_groups, dtype, router.scoring, bias, misaligned, plan)
    if plan is None:
        shared = 8 * 8 + 4 * 8 + 4 * num_experts + 4 * num_groups
        recipe = Recipe(
            "route_block.cu", "route_block_kernel", defines, BLOCK_THREADS, 5 + len(sizes), programmatic=programmatic
        )
        return launch_of(recipe, device), Shape(num_tokens, shared, sizes)
    processors = card_of(device).processors
    warps = 1 if num_tokens <= processors else 2 if num_tokens <= 2 * processors else 4
    recipe = Recipe("route.cu", "route_kernel", defines, warps * WARP, 5 + len(sizes), programmatic=programmatic)
    return launch_of(recipe, device), Shape(-(-num_tokens // warps), 0, sizes)


def router_sizes(router: Router) -> tuple[int, int, int, int]:
    """What of a router the kernels take as numbers."""
    return router.top_k, router.top_k_groups, int(router.renormalize), float_bits(router.routed_scaling_factor)


def router_defines(
    num_experts: int,
    num_groups: int,
    dtype: torch.dtype,
    scoring: str,
    bias: int | None,
    misaligned: int,
    plan: RouterPlan | None,
) -> tuple[tuple[str, str], ...]:
    """What a router is compiled for; `misaligned`: address and stride of its logits, or-ed, modulo 16; `bias`
    is its address modulo 16, None without one.
    """
    defines = {
        "NUM_EXPERTS": num_experts,
        "GROUPS": num_groups,
        "LOGIT_KIND": KINDS[dtype],
        "SCORING": SCORINGS.index(scoring),
        "SELECTION_BIAS": "false" if bias is None else "true",
    }
    if plan is not None:
        bits = misaligned | plan.experts_a_lane * dtype.itemsize | 16
        defines["LANES_A_GROUP"], defines["EXPERTS_A_LANE"] = plan.lanes_a_group, plan.experts_a_lane
        defines["ALL_LANES_FULL"] = "true" if plan.full else "false"
        defines["WORD"] = bits & -bits
        bits = (bias or 0) | plan.experts_a_lane * 4 | 16
        defines["BIAS_WORD"] = bits & -bits
    return tuple((name, str(value)) for name, value in defines.items())


def dense_rows(router_logits: Tensor) -> Tensor:
    """Logits [T, E] whose rows are dense."""
    return router_logits if router_logits.stride(1) == 1 or router_logits.shape[1] == 1 else router_logits.contiguous()
