"""Layouts of CUDA tensors: one launch of align.cu or batched.cu, straight from Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeyard.cuda.align.plan import AlignPlan, align_plan, batched_align_plan
from moeyard.cuda.runtime.barriers import barrier_for
from moeyard.cuda.runtime.cards import card_of
from moeyard.cuda.runtime.launch import SETTINGS, Launch, Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import division, id_type
from moeyard.cuda.runtime.planning import Noted
from moeyard.cuda.runtime.ready import Ready
from moeyard.dispatch.call import Call
from moeyard.values import Layout


def align_launch(
    topk_ids: Tensor,
    expert_map: Tensor | None,
    out: Layout,
    chosen: AlignPlan | None = None,
    programmatic: bool | None = None,
) -> None:
    """Fills the layout of int32 or int64 ids of any shape and strides, by a plan of its own or a given one."""
    _align(
        topk_ids,
        expert_map,
        out.num_experts,
        out.num_local_experts,
        out.block_size,
        out.sorted_token_ids,
        out.expert_ids,
        out.num_tokens_post_padded,
        out,
        chosen,
        programmatic,
    )


def unfit_for_align(call: Call) -> str | None:
    """Why `align_launch` does not take such a call, in words; None if it does."""
    if call.num_tokens is None or call.device.type != "cuda":
        return None
    return _too_many(call.num_tokens, call.num_experts, call.device.index)


def _too_many(num_routes: int, experts: int, device: int) -> str | None:
    """What is wrong with so many local experts on a card, whose blocks hold tables of them."""
    if experts <= _ALWAYS_FIT:
        return None
    try:
        align_plan(num_routes, experts, 0, card_of(device))  # the capacity only sizes grids
    except ValueError as problem:
        return str(problem)
    return None


_ALWAYS_FIT = 2048
"""So many experts fit every card of compute capability 8.0 or later (99 KiB of shared memory for a block)."""


def align_again(topk_ids: Tensor, out: Layout) -> Callable[[Tensor, Layout], bool] | None:
    """A function that fills `out` for other ids of the same shape and dtype, checking only what can have changed.

    It returns False, having done nothing, where it cannot: other devices, strides or addresses, or other settings. It
    is None for ids that are cast first or start anywhere, and for plans that need a buffer. There is no expert map.
    """
    device, pointers = topk_ids.get_device(), _addresses(out)
    capacity, experts = out.sorted_token_ids.numel(), out.num_local_experts
    if topk_ids.dtype not in (torch.int32, torch.int64) or topk_ids.data_ptr() % 16 or not capacity:
        return None
    if _too_many(topk_ids.numel(), experts, device):
        return None
    programmatic = SETTINGS["programmatic"]
    sizes = (topk_ids.numel(), out.num_experts, experts, capacity, out.block_size, topk_ids.dtype)
    launch, shape, words = _ready((*sizes, True, True, False, device, None, programmatic))
    if words:
        return None

    def again(ids: Tensor, given: Layout) -> bool:
        address = ids.data_ptr()
        if (
            address % 16
            or _addresses(given) != pointers
            or ids.get_device() != device
            or not ids.is_contiguous()
            or SETTINGS["programmatic"] is not programmatic
        ):
            return False
        launch(shape, address, 0, *pointers, 0, 0)
        return True

    return again


def align_anew(topk_ids: Tensor, expert_map: Tensor | None, out: Layout) -> Callable[..., bool] | None:
    """What repeats `align_launch` for other tensors of equal shapes, strides and dtypes: (address of ids, map, address)
    -> whether it could.

    The second address is that of other memory whose parts lie as those of `out` do, from `expert_offsets` on. It cannot
    for ids that begin elsewhere modulo 16 bytes, and after `programmatic_launch` has changed. None for ids that are
    cast or copied first, and for plans that need a buffer.
    """
    device, offsets = topk_ids.get_device(), out.expert_offsets.data_ptr()
    capacity, experts = out.sorted_token_ids.numel(), out.num_local_experts
    given = (topk_ids, expert_map)
    if topk_ids.dtype not in (torch.int32, torch.int64) or not all(t is None or t.is_contiguous() for t in given):
        return None
    aligned, programmatic = topk_ids.data_ptr() % 16 == 0, SETTINGS["programmatic"]
    launch, shape, words = _ready((
        topk_ids.numel(), out.num_experts, experts, capacity, out.block_size, topk_ids.dtype, expert_map is None,
        aligned, False, device, None, programmatic,
    ))  # fmt: skip
    if words:
        return None
    slots, blocks, used, _, counts, routes = (address - offsets for address in _addresses(out))

    def repeat(ids: int, mapping: Tensor | None, memory: int) -> bool:
        if (ids % 16 == 0) is not aligned or SETTINGS["programmatic"] is not programmatic:
            return False
        launch(
            shape, ids, 0 if mapping is None else mapping.data_ptr(), memory + slots, memory + blocks,
            memory + used, memory, memory + counts, memory + routes, 0, 0,
        )  # fmt: skip
        return True

    return repeat


def _addresses(out: Layout) -> tuple[int, ...]:
    return (
        out.sorted_token_ids.data_ptr(),
        out.expert_ids.data_ptr(),
        out.num_tokens_post_padded.data_ptr(),
        out.expert_offsets.data_ptr(),
        out.expert_counts.data_ptr(),
        out.route_rows.data_ptr(),
    )


def triple_launch(
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_experts: int,
    num_local_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
) -> None:
    """Fills the first three tensors of a layout and nothing else; slots need not be a multiple of the block size."""
    _align(
        topk_ids,
        expert_map,
        num_experts,
        num_local_experts,
        block_size,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        None,
        None,
    )


def _align(
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_experts: int,
    experts: int,
    block_size: int,
    slots: Tensor,
    expert_ids: Tensor,
    total: Tensor,
    whole: Layout | None,
    chosen: AlignPlan | None,
    programmatic: bool | None = None,
) -> None:
    device = topk_ids.get_device()
    if not topk_ids.is_contiguous():
        topk_ids = topk_ids.contiguous()
    if expert_map is not None and not expert_map.is_contiguous():
        expert_map = expert_map.contiguous()
    ids = topk_ids.data_ptr()
    key = (
        topk_ids.numel(),
        num_experts,
        experts,
        slots.numel(),
        block_size,
        topk_ids.dtype,
        expert_map is None,
        ids % 16 == 0,
        whole is None,
        device,
        chosen,
        SETTINGS["programmatic"] if programmatic is None else programmatic,
    )
    launch, shape, words = _READY.get(key) or _ready(key)
    exchange = barrier = offsets = counts = routes = 0
    if words:
        buffer = topk_ids.new_empty(words, dtype=torch.int32)
        exchange, barrier = buffer.data_ptr(), barrier_for(device)
    if whole is not None:
        offsets, counts = whole.expert_offsets.data_ptr(), whole.expert_counts.data_ptr()
        routes = whole.route_rows.data_ptr()
    mapping = 0 if expert_map is None else expert_map.data_ptr()
    blocks, used = expert_ids.data_ptr(), total.data_ptr()
    launch(shape, ids, mapping, slots.data_ptr(), blocks, used, offsets, counts, routes, exchange, barrier)


_READY = Ready()
"""A launch, its shape and the words of its exchange by all that they depend on: plain values, which are hashed on every
call.
"""


def _ready(key: tuple[Any, ...]) -> tuple[Launch | Noted, Shape, int]:
    found: tuple[Launch | Noted, Shape, int] = _READY.get(key) or _READY.add(key, prepare_align(*key))
    return found


def prepare_align(
    num_routes: int,
    num_experts: int,
    experts: int,
    capacity: int,
    block_size: int,
    dtype: torch.dtype,
    unmapped: bool,
    aligned: bool,
    triple: bool,
    device: int,
    chosen: AlignPlan | None,
    programmatic: bool,
) -> tuple[Launch | Noted, Shape, int]:
    """The launch, its shape and the words of its exchange."""
    if chosen is None:
        chosen = align_plan(num_routes, experts, capacity, card_of(device))
    defines = align_defines(chosen, experts, id_type(dtype), unmapped, aligned, not triple)
    sizes = (num_routes, num_experts, experts, block_size, capacity, *division(block_size), chosen.tiles)
    recipe = Recipe(
        "align.cu", "align_kernel", defines, chosen.threads, 10 + len(sizes), chosen.cluster, chosen.cooperative,
        programmatic=programmatic,
    )  # fmt: skip
    shape = Shape(chosen.grid, chosen.shared_bytes(experts), sizes)
    words = chosen.grid // chosen.cluster * experts if chosen.cooperative else 0
    return launch_of(recipe, device), shape, words


def align_defines(
    plan: AlignPlan, experts: int, of_ids: str, unmapped: bool, aligned: bool, whole: bool
) -> tuple[tuple[str, str], ...]:
    """What an alignment is compiled for; `of_ids` is the C++ type of ids."""
    return (
        ("EXCHANGE", plan.exchange),
        ("BLOCK", str(plan.threads)),
        ("BLOCKS_A_CLUSTER", str(plan.cluster)),
        ("PLACING_WARPS", str(plan.warps)),
        ("ROUTES_A_LANE", str(plan.rounds)),
        ("EXPERTS_A_THREAD", str(1 if plan.exchange == "TINY" else -(-experts // plan.threads))),
        ("ID", of_ids),
        ("MAP", "false" if unmapped else "true"),
        ("ALIGN", "true" if aligned else "false"),
        ("WHOLE_LAYOUT", "true" if whole else "false"),
    )


def batched_align_launch(expert_num_tokens: Tensor, max_num_tokens: int, out: Layout) -> None:
    """Fills the layout of batches of `max_num_tokens` rows."""
    device = expert_num_tokens.get_device()
    expert_num_tokens = expert_num_tokens.contiguous()
    key = (expert_num_tokens.numel(), max_num_tokens, out.block_size, device, SETTINGS["programmatic"])
    launch, shape = _BATCHED.get(key) or _BATCHED.add(key, _make_batched_ready(*key))
    outputs = (tensor.data_ptr() for tensor in out.tensors)
    launch(shape, expert_num_tokens.data_ptr(), *outputs)


_BATCHED = Ready()


def _make_batched_ready(
    experts: int, rows: int, block_size: int, device: int, programmatic: bool
) -> tuple[Launch | Noted, Shape]:
    chosen = batched_align_plan(experts, rows, block_size, card_of(device))
    defines = (("BLOCK", str(chosen.threads)), ("EXPERTS_A_THREAD", str(-(-experts // chosen.threads))))
    sizes = (experts, rows, block_size, chosen.capacity, *division(block_size), chosen.pieces)
    recipe = Recipe(
        "batched.cu", "batched_align_kernel", defines, chosen.threads, 7 + len(sizes), programmatic=programmatic
    )
    return launch_of(recipe, device), Shape(chosen.grid, chosen.shared_bytes, sizes)
