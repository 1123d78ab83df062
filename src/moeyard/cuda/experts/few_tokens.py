"""The experts of a few tokens in two launches of few_tokens.cu, which read every weight of every route once."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moeyard.cuda.experts.few_tokens_plan import (
    WORD,
    ExpertSizes,
    FewTokensPlan,
    down_room,
    few_tokens_are_quicker,
    few_tokens_plan,
    most_tokens,
)
from moeyard.cuda.runtime.cards import WARP, Card, card_of
from moeyard.cuda.runtime.chain import Chain, Step
from moeyard.cuda.runtime.few import FEW_KERNELS
from moeyard.cuda.runtime.launch import Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import KINDS, float_bits, id_type
from moeyard.cuda.runtime.ready import Ready
from moeyard.dispatch.call import Call
from moeyard.quant import ExpertScales, QuantScheme
from moeyard.values import Activation, ExpertCall, ExpertWeights


def unfit(call: Call) -> str | None:
    """Why two launches are not the way for such a call, in words; None if they are.

    They take rows of whole 16 bytes, and few tokens: so few that reading an expert once per route costs less than a
    layout and a combination.
    """
    weights = call.weights
    if weights is None or call.num_tokens is None:
        return "takes a few tokens: give num_tokens, top_k and weights"
    if weights.readable:
        return weights.readable
    if weights.scheme is not None and weights.block_start % WORD:
        return f"weights.scales.block_start: takes multiples of {WORD}, got {weights.block_start}"
    if weights.scheme is not None and weights.scheme.dynamic_second:
        return "takes given scales of both products or of none, got those of the first alone"
    sizes = ExpertSizes(
        call.num_tokens, call.top_k, weights.size, weights.columns // (1 + weights.gated), weights.gated,
        weights.scheme, weights.block_start,
    )  # fmt: skip
    if not sizes.rows_are_whole:
        return f"takes rows of whole 16 bytes, got {sizes.hidden_size} and {sizes.intermediate_size} columns of weights"
    num_experts = call.num_experts or weights.num_local_experts
    share = min(1.0, weights.num_local_experts / num_experts)
    if not _are_quicker(sizes, num_experts, card_of(call.device.index), share):
        return f"takes a few tokens, got {call.num_tokens} of {call.top_k} experts each"
    return None


_are_quicker = lru_cache(maxsize=4096)(few_tokens_are_quicker)


def fused_experts_launch(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    call: ExpertCall,
    *,
    out: Tensor,
    chosen: FewTokensPlan | None = None,
) -> None:
    """Fills `out` by two launches and one allocation of [T * K, I]. Sums are float32; the same input, the same bits.

    Codes of 8 bits are multiplied as codes: int8 by int8 exactly, others as 16-bit floats. Rows are quantised in shared
    memory, by every block those that it needs. Raises ValueError for sizes that `few_tokens_plan` has no plan for.
    """
    weights, _, _, expert_map, _, _ = call
    if not hidden_states.shape[0]:
        return
    hidden_states, topk_ids, topk_weights = _dense(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()
    w13, w2, mapping, b13, b2 = weights.w13, weights.w2, 0, 0, 0
    w13_bias, w2_bias = weights.w13_bias, weights.w2_bias
    if w13_bias is not None:
        w13_bias = w13_bias.contiguous()
        b13 = w13_bias.data_ptr()
    if w2_bias is not None:
        w2_bias = w2_bias.contiguous()
        b2 = w2_bias.data_ptr()
    if expert_map is not None:
        expert_map = expert_map.contiguous()
        mapping = expert_map.data_ptr()
    more: tuple[int, ...] = ()
    if weights.scales is not None:
        scales = _dense_scales(weights.scales)
        given = (scales.w13, scales.w13_input, scales.w2, scales.w2_input)
        more = tuple(0 if tensor is None else tensor.data_ptr() for tensor in given)
    key = _key(hidden_states, topk_ids, call, chosen)
    start: Chain = _READY.get(key) or _READY.add(key, _prepare(*key))
    act = out.new_empty(topk_ids.numel() * w2.shape[2])
    start(
        topk_ids.data_ptr(), mapping, topk_weights.data_ptr(), hidden_states.data_ptr(), act.data_ptr(),
        out.data_ptr(), w13.data_ptr(), b13, w2.data_ptr(), b2, *more,
    )  # fmt: skip


_READY = Ready()
"""Both launches by all that they depend on."""
_NAMES = ("ids", "mapping", "factors", "rows", "act", "result", "w13", "b13", "w2", "b2")
_SCALES = ("w13 scales", "w13 input", "w2 scales", "w2 input")
"""What a call gives, in this order; scales beside codes."""


def fused_experts_anew(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall
) -> Callable[..., bool] | None:
    """What repeats a launch of unquantised weights for other tensors of equal shapes, strides and dtypes: (hidden
    states, router weights, ids, weights, map, out) -> whether it could. None where tensors had to be copied.

    It cannot for tensors at addresses that are no multiples of 16 bytes.
    """
    weights = call.weights
    given = (topk_weights, topk_ids, weights.w13_bias, weights.w2_bias, call.expert_map)
    if weights.scheme is not None or _dense(hidden_states) is not hidden_states or not hidden_states.shape[0]:
        return None
    if not all(tensor is None or tensor.is_contiguous() for tensor in given):
        return None
    key = _key(hidden_states, topk_ids, call, None)
    start: Chain = _READY.get(key) or _READY.add(key, _prepare(*key))
    length = topk_ids.numel() * weights.w2.shape[2]

    def repeat(
        hidden: Tensor, factors: Tensor, ids: Tensor, weights: ExpertWeights, mapping: Tensor | None, out: Tensor
    ) -> bool:
        rows, w13, w2 = hidden.data_ptr(), weights.w13.data_ptr(), weights.w2.data_ptr()
        if (rows | w13 | w2) & (WORD - 1):
            return False
        b13, b2 = weights.w13_bias, weights.w2_bias
        act = out.new_empty(length)
        start(
            ids.data_ptr(), 0 if mapping is None else mapping.data_ptr(), factors.data_ptr(), rows, act.data_ptr(),
            out.data_ptr(), w13, 0 if b13 is None else b13.data_ptr(), w2, 0 if b2 is None else b2.data_ptr(),
        )  # fmt: skip
        return True

    return repeat


def _key(hidden_states: Tensor, topk_ids: Tensor, call: ExpertCall, chosen: FewTokensPlan | None) -> tuple[Any, ...]:
    """What launches depend on: the arguments of `_prepare`."""
    weights, activation, num_experts, expert_map, weight_on_input, _ = call
    w13, w2, scales = weights.w13, weights.w2, weights.scales
    itemsize = w13.element_size()
    return (
        *topk_ids.shape, hidden_states.shape[1], w2.shape[2], weights.gated, hidden_states.dtype, topk_ids.dtype,
        expert_map is not None, weights.w13_bias is not None, weights.w2_bias is not None, weight_on_input, activation,
        num_experts, w13.shape[0], 2 * hidden_states.stride(0), itemsize * w13.stride(0), itemsize * w2.stride(0),
        weights.scheme, 0 if scales is None else scales.block_start, None if scales is None else scales.w13.dtype,
        hidden_states.get_device(), chosen,
    )  # fmt: skip


def _dense(hidden_states: Tensor) -> Tensor:
    """Rows that bulk copies can read: dense, each from a multiple of 16 bytes."""
    strided = hidden_states.stride(1) != 1 or (hidden_states.shape[0] > 1 and hidden_states.stride(0) % WORD)
    if strided or hidden_states.data_ptr() % 16:
        return hidden_states.clone(memory_format=torch.contiguous_format)
    return hidden_states


def _dense_scales(scales: ExpertScales) -> ExpertScales:
    """Scales whose rows follow each other."""
    if all(tensor is None or tensor.is_contiguous() for tensor in scales.tensors):
        return scales
    return scales.moved(lambda tensor: tensor.contiguous())


def _prepare(
    num_tokens: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    gated: bool,
    dtype: torch.dtype,
    id_dtype: torch.dtype,
    mapped: bool,
    up_biased: bool,
    down_biased: bool,
    weight_on_input: bool,
    activation: Activation,
    num_experts: int,
    num_local: int,
    token_stride: int,
    up_stride: int,
    down_stride: int,
    scheme: QuantScheme | None,
    block_start: int,
    scale_dtype: torch.dtype | None,
    device: int,
    chosen: FewTokensPlan | None,
) -> Chain:
    sizes = ExpertSizes(num_tokens, top_k, hidden_size, intermediate_size, gated, scheme, block_start)
    card, share = card_of(device), min(1.0, num_local / num_experts)
    given: tuple[int, ...] = ()
    if "experts" in FEW_KERNELS and chosen is None:
        most = most_tokens(sizes, num_experts, card, share)
        if most >= num_tokens:
            sizes, given = replace(sizes, num_tokens=most), (num_tokens,)
    plan = chosen or few_tokens_plan(sizes, card, share)
    if plan is None:
        raise ValueError(
            "hidden_states, topk_ids: expected at most 32 routes, rows of whole 16 bytes, and compute capability 9.0 "
            f"or later with enough shared memory, got {sizes} on {card}"
        )
    defines = few_tokens_defines(
        sizes, plan, card, dtype, id_type(id_dtype), mapped, (up_biased, down_biased),
        activation, weight_on_input, scale_dtype, bool(given),
    )  # fmt: skip
    constants = (activation.alpha, activation.beta, activation.limit or 0.0)
    up_sizes = (num_experts, num_local, token_stride, up_stride, *map(float_bits, constants), *given)
    up = Shape(card.processors, plan.up_bytes(sizes, card), up_sizes)
    down = Shape(card.processors, down_room(plan, sizes, card), (num_experts, num_local, down_stride, *given))

    def step(name: str, shape: Shape, *pointers: str) -> Step:
        words = len(pointers) + len(shape.sizes)
        recipe = Recipe("few_tokens.cu", name, defines, WARP * plan.warps, words, overlapping=True)
        return Step(launch_of(recipe, device), shape, pointers)

    scales: tuple[str, ...] = () if scheme is None else _SCALES
    first, second, routes = scales[:2], scales[2:], ("ids", "mapping", "factors")
    steps = [
        step("few_tokens_up_kernel", up, *routes, "rows", "w13", "b13", *first, "act"),
        step("few_tokens_down_kernel", down, *routes, "act", "w2", "b2", *second, "result"),
    ]
    return Chain(device, (), (*_NAMES, *scales), steps)


def few_tokens_defines(
    sizes: ExpertSizes,
    plan: FewTokensPlan,
    card: Card,
    dtype: torch.dtype,
    of_ids: str,
    mapped: bool,
    biased: tuple[bool, bool],
    activation: Activation,
    weight_on_input: bool,
    scale_dtype: torch.dtype | None = None,
    tokens_given: bool = False,
) -> tuple[tuple[str, str], ...]:
    """What few_tokens.cu is compiled for; `of_ids` is the C++ type of ids, `biased` of w13 and of w2. With
    `tokens_given` launches say how many tokens there are, those of `sizes` at most.
    """
    scheme = sizes.scheme
    flags = {
        "MAP": mapped,
        "GATED_ROWS": sizes.gated,
        "W13_BIAS": biased[0],
        "W2_BIAS": biased[1],
        "WEIGHT_ON_INPUT": weight_on_input,
        "HAS_LIMIT": activation.limit is not None,
        "QUANTISED_WEIGHTS": scheme is not None,
        "STATIC_SCALES": scheme is not None and scheme.static,
    }
    numbers = {
        "NUM_TOKENS": sizes.num_tokens,
        "NUM_TOP_K": sizes.top_k,
        "HIDDEN_SIZE": sizes.hidden_size,
        "INTERMEDIATE_SIZE": sizes.intermediate_size,
        "ACTIVATION": activation.name.upper(),
        "ROW_KIND": KINDS[dtype],
        "ID": of_ids,
        "WARPS_A_BLOCK": plan.warps,
        "UP_SEGMENT": plan.up_segment,
        "UP_STAGES": plan.up_stages,
        "UP_BYTES": plan.up_bytes(sizes, card),
        "DOWN_SEGMENT": plan.down_segment,
        "DOWN_STAGES": plan.down_stages,
        "DOWN_ROWS": plan.down_rows,
        "DOWN_BYTES": down_room(plan, sizes, card),
        "TRIGGER": plan.trigger,
        "EVICT_FIRST": int(plan.evict_first),
        "WEIGHT_CODE": _CODES["none" if scheme is None else scheme.weights],
        "ACTIVATION_CODE": _CODES["none" if scheme is None else scheme.activations],
        "ACTIVATION_GROUP": 0 if scheme is None else scheme.activation_group,
        "SCALE_ROWS": 0 if scheme is None else scheme.block[0],
        "SCALE_COLUMNS": 0 if scheme is None else scheme.block[1],
        "SCALE_KIND": KINDS[scale_dtype or torch.float32],
        "BLOCK_START": sizes.block_start,
        "BLOCKS": card.processors,
    }
    named = [(name, "true" if flag else "false") for name, flag in flags.items()]
    if tokens_given:
        named.append(("TOKENS_GIVEN", "1"))
    return (*named, *((name, str(value)) for name, value in numbers.items()))


_CODES = {"none": "NO_CODE", "e4m3": "E4M3", "int8": "INT8"}
"""The names of codes in codes.cuh."""
