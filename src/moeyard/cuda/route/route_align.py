"""Router and alignment of small batches of CUDA tensors in one launch of route_align.cu."""

from collections.abc import Callable

import torch
from torch import Tensor

from moeyard.cuda.align.launchers import align_defines
from moeyard.cuda.route.launchers import dense_rows, router_defines, router_sizes
from moeyard.cuda.route.plan import RouteAlignPlan, route_align_plan, router_plan
from moeyard.cuda.runtime.cards import card_of
from moeyard.cuda.runtime.launch import SETTINGS, Launch, Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import division
from moeyard.cuda.runtime.planning import Noted
from moeyard.cuda.runtime.ready import Ready
from moeyard.values import Layout, Router, Routing


def route_and_align_launch(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    is_padding: Tensor | None,
    expert_map: Tensor | None,
    router: Router,
    routing: Routing,
    layout: Layout,
    chosen: RouteAlignPlan | None = None,
) -> bool:
    """Fills a routing and its layout; False, with nothing done, where two launches are quicker or needed.

    Two are needed for more tokens than a cluster routes at once, for more experts or
    groups than a warp holds, and for a top_k above 32.
    """
    device = router_logits.get_device()
    router_logits = dense_rows(router_logits)
    bias = padding = mapping = 0
    if selection_bias is not None:
        selection_bias = selection_bias.contiguous()
        bias = selection_bias.data_ptr()
    if is_padding is not None:
        is_padding = is_padding.contiguous()
        padding = is_padding.data_ptr()
    if expert_map is not None:
        expert_map = expert_map.contiguous()
        mapping = expert_map.data_ptr()
    logits = router_logits.data_ptr()
    stride = router_logits.stride(0) * router_logits.element_size()
    key = (
        *router_logits.shape, router, router_logits.dtype, stride, (logits | stride) & 15,
        None if selection_bias is None else bias & 15, expert_map is None, layout.num_local_experts,
        layout.block_size, layout.capacity, device, chosen, SETTINGS["programmatic"],
    )  # fmt: skip
    ready = _READY.get(key)
    if ready is None:
        ready = _READY.add(key, _prepare(*key))
    if ready is False:
        return False
    launch, shape = ready
    outputs = (tensor.data_ptr() for tensor in layout.tensors)
    weights, ids = routing.topk_weights.data_ptr(), routing.topk_ids.data_ptr()
    launch(shape, logits, bias, padding, weights, ids, mapping, *outputs)
    return True


def route_and_align_anew(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    is_padding: Tensor | None,
    expert_map: Tensor | None,
    router: Router,
    layout: Layout,
) -> Callable[..., bool] | None:
    """What repeats `route_and_align_launch` for other tensors of equal shapes, strides and dtypes: (logits, bias,
    padding, map, addresses of weights, of ids and of a layout) -> whether it could.

    The last address is that of other memory whose parts lie as those of `layout` do, from `expert_offsets` on. It
    cannot for logits or a bias that begin elsewhere modulo 16 bytes, and after `programmatic_launch` has changed. None
    where two launches are made, and for tensors that are copied first.
    """
    given = (selection_bias, is_padding, expert_map)
    if dense_rows(router_logits) is not router_logits or not all(t is None or t.is_contiguous() for t in given):
        return None
    stride = router_logits.stride(0) * router_logits.element_size()
    misaligned = (router_logits.data_ptr() | stride) & 15
    programmatic = SETTINGS["programmatic"]
    of_bias = None if selection_bias is None else selection_bias.data_ptr() & 15
    key = (
        *router_logits.shape, router, router_logits.dtype, stride, misaligned, of_bias, expert_map is None,
        layout.num_local_experts, layout.block_size, layout.capacity, router_logits.get_device(), None,
        programmatic,
    )  # fmt: skip
    ready = _READY.get(key)
    if not ready:
        return None
    launch, shape = ready
    first = layout.expert_offsets.data_ptr()
    slots, blocks, used, _, counts, routes = (tensor.data_ptr() - first for tensor in layout.tensors)

    def repeat(
        logits: Tensor, bias: Tensor | None, padding: Tensor | None, mapping: Tensor | None, weights: int, ids: int,
        memory: int,
    ) -> bool:  # fmt: skip
        address, biases = logits.data_ptr(), 0 if bias is None else bias.data_ptr()
        if (address | stride) & 15 != misaligned or biases & 15 != (of_bias or 0):
            return False
        if SETTINGS["programmatic"] is not programmatic:
            return False
        launch(
            shape, address, biases, 0 if padding is None else padding.data_ptr(), weights, ids,
            0 if mapping is None else mapping.data_ptr(), memory + slots, memory + blocks, memory + used, memory,
            memory + counts, memory + routes,
        )  # fmt: skip
        return True

    return repeat


_READY = Ready()
"""A launch and its shape, or False where two launches are to be made, by all that it depends on."""


def _prepare(
    num_tokens: int,
    num_experts: int,
    router: Router,
    dtype: torch.dtype,
    stride: int,
    misaligned: int,
    bias: int | None,
    unmapped: bool,
    num_local: int,
    block_size: int,
    capacity: int,
    device: int,
    chosen: RouteAlignPlan | None,
    programmatic: bool,
) -> tuple[Launch | Noted, Shape] | bool:
    routing = router_plan(num_experts, router.num_groups)
    plan = chosen or route_align_plan(num_tokens, router.top_k, num_local, capacity, card_of(device))
    if routing is None or plan is None:
        return False
    aligning, num_routes = plan.align, num_tokens * router.top_k
    defines = (
        *router_defines(num_experts, router.num_groups, dtype, router.scoring, bias, misaligned, routing),
        *align_defines(aligning, num_local, "int", unmapped, True, True),
        ("SHARED_IDS", "1"),
        ("BLOCKS_THAT_SHARE", str(plan.peers)),
    )
    aligning_bytes = aligning.shared_bytes(num_local)
    sizes = (
        num_tokens, *router_sizes(router), stride, num_routes, num_experts, num_local, block_size, capacity,
        *division(block_size), aligning_bytes,
    )  # fmt: skip
    recipe = Recipe(
        "route_align.cu", "route_align_kernel", defines, aligning.threads, 12 + len(sizes), plan.peers,
        programmatic=programmatic,
    )  # fmt: skip
    return launch_of(recipe, device), Shape(plan.grid, aligning_bytes + 16 + 4 * num_routes, sizes)
