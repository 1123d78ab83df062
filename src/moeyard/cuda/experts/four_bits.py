"""The experts of up to some 64 tokens with weights of 4 bits in three launches of four_bits.cu."""

import torch
from torch import Tensor

from moeyard.cuda.experts.four_bits_plan import (
    FourBitPlan,
    FourBitSizes,
    four_bit_plan,
    four_bits_are_few,
    most_routes_of,
)
from moeyard.cuda.runtime.cards import WARP, card_of
from moeyard.cuda.runtime.launch import Launch, Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import KINDS, float_bits, id_type
from moeyard.cuda.runtime.planning import Noted
from moeyard.cuda.runtime.ready import Ready
from moeyard.dispatch.call import Call
from moeyard.quant import QuantScheme
from moeyard.values import Activation, ExpertCall


def unfit(call: Call) -> str | None:
    """Why three launches are not the way for such a call, in words; None if they are."""
    weights = call.weights
    if weights is None or weights.scheme is None or call.num_tokens is None:
        return "takes weights of 4 bits and a few tokens: give num_tokens, top_k and weights"
    if weights.readable:
        return weights.readable
    num_experts = call.num_experts or weights.num_local_experts
    sizes = FourBitSizes(
        most_routes_of(max(1, call.num_tokens * call.top_k)), call.top_k, weights.num_local_experts, weights.size,
        weights.columns // (1 + weights.gated), weights.gated, weights.scheme, 4,
    )  # fmt: skip
    return four_bits_are_few(sizes, call.num_tokens, num_experts, card_of(call.device.index))


def fused_experts_launch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall, *, out: Tensor
) -> None:
    """Fills `out` by three launches, which read an expert once for every 8 of its routes.

    Weights are multiplied as codes: sums of a group of columns are scaled, so that no weight is rounded. Rows of
    bfloat16 become float16 times a power of two of the row. Sums are float32, in a fixed order. Allocates [T * K, I] of
    the dtype and [T * K, H] float32. Raises ValueError for sizes that `four_bit_plan` has no plan for.
    """
    weights, activation, num_experts, expert_map, weight_on_input, _ = call
    scales, scheme = weights.scales, weights.scheme
    assert scales is not None and scheme is not None
    num_tokens, top_k = topk_ids.shape
    if not num_tokens:
        return
    hidden_states, ids, factors = dense_rows(hidden_states), topk_ids.contiguous(), topk_weights.contiguous()
    expert_map = None if expert_map is None else expert_map.contiguous()
    b13, b2 = (None if bias is None else bias.contiguous() for bias in (weights.w13_bias, weights.w2_bias))
    s13, s2, z13, z2, g13, g2 = (None if one is None else dense(one) for one in scales.tensors[:6])
    assert s13 is not None
    key = (
        most_routes_of(num_tokens * top_k), num_tokens, top_k, weights.num_local_experts, weights.hidden_size,
        weights.intermediate_size, weights.gated, scheme, s13.dtype, hidden_states.dtype, topk_ids.dtype,
        expert_map is not None, b13 is not None, b2 is not None, weight_on_input, activation, num_experts,
        2 * hidden_states.stride(0), hidden_states.get_device(),
    )  # fmt: skip
    launches = _READY.get(key)
    if launches is None:
        launches = _READY.add(key, _prepare(*key))
    (up, up_shape), (down, down_shape), (total, total_shape) = launches
    routes = num_tokens * top_k
    act = out.new_empty(routes, weights.intermediate_size)
    results = torch.empty(routes, weights.hidden_size, dtype=torch.float32, device=out.device)
    which, mapping, by = ids.data_ptr(), _at(expert_map), factors.data_ptr()
    up(
        up_shape, which, mapping, by, hidden_states.data_ptr(), weights.w13.data_ptr(), _at(b13), _at(s13), _at(z13),
        _at(g13), act.data_ptr(),
    )  # fmt: skip
    down(
        down_shape, which, mapping, act.data_ptr(), weights.w2.data_ptr(), _at(b2), _at(s2), _at(z2), _at(g2),
        results.data_ptr(),
    )  # fmt: skip
    total(total_shape, which, mapping, by, results.data_ptr(), out.data_ptr())


_READY = Ready()
"""The launches and their shapes by all that they depend on."""


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor) -> Tensor:
    """What bulk copies can read: dense, from a multiple of 16 bytes."""
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 else tensor.clone()


def dense_rows(rows: Tensor) -> Tensor:
    """Rows that are dense, each from a multiple of 16 bytes."""
    strided = rows.stride(1) != 1 or (rows.shape[0] > 1 and rows.stride(0) % 8)
    return rows.clone(memory_format=torch.contiguous_format) if strided or rows.data_ptr() % 16 else rows


def _prepare(
    most_routes: int, num_tokens: int, top_k: int, num_local: int, hidden_size: int, intermediate_size: int,
    gated: bool, scheme: QuantScheme, scale_dtype: torch.dtype, dtype: torch.dtype, id_dtype: torch.dtype, mapped: bool,
    up_biased: bool, down_biased: bool, weight_on_input: bool, activation: Activation, num_experts: int,
    token_stride: int, device: int,
) -> tuple[tuple[Launch | Noted, Shape], ...]:  # fmt: skip
    sizes = FourBitSizes(
        most_routes, top_k, num_local, hidden_size, intermediate_size, gated, scheme, scale_dtype.itemsize
    )
    card = card_of(device)
    plan = four_bit_plan(sizes, card)
    if plan is None:
        raise ValueError(
            "weights: expected sides that are multiples of 64 and fit shared memory, on compute capability 9.0 or "
            f"later, got {sizes} on {card}"
        )
    defines = four_bit_defines(
        sizes, plan, dtype, id_type(id_dtype), mapped, (up_biased, down_biased), activation, weight_on_input,
        scale_dtype,
    )  # fmt: skip
    curve = (activation.alpha, activation.beta, activation.limit or 0.0)
    shapes = (
        Shape(card.processors, plan.up_bytes(sizes), (num_tokens, num_experts, token_stride, *map(float_bits, curve))),
        Shape(card.processors, plan.down_bytes(sizes), (num_tokens, num_experts)),
        Shape(min(card.processors, -(-num_tokens * hidden_size // (4 * WARP * plan.warps))), 0,
              (num_tokens, num_experts)),
    )  # fmt: skip

    def launch(name: str, pointers: int, shape: Shape) -> tuple[Launch | Noted, Shape]:
        words = pointers + len(shape.sizes)
        recipe = Recipe("four_bits.cu", f"four_bits_{name}_kernel", defines, WARP * plan.warps, words, overlapping=True)
        return launch_of(recipe, device), shape

    return tuple(map(launch, ("up", "down", "sum"), (10, 9, 5), shapes))


def four_bit_defines(
    sizes: FourBitSizes,
    plan: FourBitPlan,
    dtype: torch.dtype,
    of_ids: str,
    mapped: bool,
    biased: tuple[bool, bool],
    activation: Activation,
    weight_on_input: bool,
    scale_dtype: torch.dtype,
) -> tuple[tuple[str, str], ...]:
    """What four_bits.cu is compiled for; `of_ids` is the C++ type of ids, `biased` of w13 and of w2."""
    scheme = sizes.scheme
    flags = {
        "MAP": mapped,
        "GATED_ROWS": sizes.gated,
        "W13_BIAS": biased[0],
        "W2_BIAS": biased[1],
        "WEIGHT_ON_INPUT": weight_on_input,
        "HAS_LIMIT": activation.limit is not None,
        "CODES_ARE_E2M1": scheme.weights == "e2m1",
        "ZERO_POINTS": scheme.zero_points,
        "GLOBAL_SCALES": scheme.global_scales,
    }
    numbers = {
        "MOST_ROUTES": sizes.most_routes,
        "NUM_TOP_K": sizes.top_k,
        "NUM_LOCAL": sizes.num_local,
        "HIDDEN_SIZE": sizes.hidden_size,
        "INTERMEDIATE_SIZE": sizes.intermediate_size,
        "ACTIVATION": activation.name.upper(),
        "ROW_KIND": KINDS[dtype],
        "ID": of_ids,
        "WARPS_A_BLOCK": plan.warps,
        "HELD_ROWS": plan.held_rows,
        "UP_STEPS": plan.up_steps,
        "UP_STAGES": plan.up_stages,
        "UP_BYTES": plan.up_bytes(sizes),
        "DOWN_STEPS": plan.down_steps,
        "DOWN_STAGES": plan.down_stages,
        "DOWN_BYTES": plan.down_bytes(sizes),
        "EVICT_FIRST": 1,
        "SCALE_COLUMNS": scheme.block[1],
        "SCALE_KIND": SCALE_KINDS.get(scale_dtype) or KINDS[scale_dtype],
    }
    named = [(name, "true" if flag else "false") for name, flag in flags.items()]
    return (*named, *((name, str(value)) for name, value in numbers.items()))


SCALE_KINDS = {torch.float8_e8m0fnu: "E8M0_SCALES", torch.float8_e4m3fn: "E4M3_SCALES"}
"""The names in four_bits.cuh of scales that have no name in rows.cuh."""
