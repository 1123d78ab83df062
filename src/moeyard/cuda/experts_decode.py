"""The experts of a few tokens in two launches of experts_decode.cu, which read every weight of every route once."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moeyard.cuda.launch import SETTINGS, Launch, current_device, current_stream, make_room
from moeyard.cuda.layout import card_of
from moeyard.cuda.plan import WARP, Card
from moeyard.cuda.router import float_bits
from moeyard.values import Activation, ExpertWeights

WORD = 8
"""Values of 16 bits in what a lane reads at once."""


@dataclass(frozen=True)
class ExpertSizes:
    """What the kernels are compiled for, besides dtypes and activation."""

    num_tokens: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool

    @property
    def num_routes(self) -> int:
        """Routes of the batch, dropped ones included."""
        return self.num_tokens * self.top_k

    @property
    def weight_bytes(self) -> int:
        """What all routes read, each its own expert's weights."""
        return 2 * self.num_routes * (2 + self.gated) * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class ExpertPlan:
    """How units are shared among warps, and what each warp has under way."""

    warps: int
    """Of a block; a block a multiprocessor."""
    up_segment: int
    """Words of 16 bytes of a row of w13 (gated: of gate and up each) that one slot of a warp's ring holds."""
    up_stages: int
    """Slots of a ring."""
    down_segment: int
    """The same for w2."""
    down_stages: int
    down_rows: int
    """Consecutive rows of w2 that a slot holds; above 1 only whole ones."""
    trigger: int = 6
    """Copies that a warp has yet to make when it lets the second launch be placed."""
    evict_first: bool = True
    """Whether weights may leave the L2 cache first."""

    def up_bytes(self, sizes: ExpertSizes) -> int:
        """Shared memory of a block of the first launch, as experts_decode.cu counts: rings, tokens, routes."""
        ring = self.warps * self.up_stages * _up_slot(self.up_segment, sizes)
        return ring + _up_vectors(sizes) + _ROUTES_BYTES + 8 * (self.warps * self.up_stages + 1)

    def down_bytes(self, sizes: ExpertSizes) -> int:
        """The same of the second."""
        ring = self.warps * self.down_stages * 16 * self.down_rows * self.down_segment
        return ring + _down_vectors(sizes) + _ROUTES_BYTES + 8 * (self.warps * self.down_stages + sizes.num_routes)


_ROUTES_BYTES = 4 * (3 * WARP + 34)
_RESERVED = 1024
"""Bytes of shared memory that the system keeps of every block's."""
_BARRIER_BYTES = 8 * (16 * 16 + WARP)
_RING_BYTES = 96 << 10
"""In flight of a multiprocessor: 4.5 TB/s at 1.2 us are 41 KB on 132 of them, and some of a ring is being read."""
_ENOUGH_RING_BYTES = 56 << 10
_LEAST_RING_BYTES = 32 << 10
_LITTLE_BYTES = 192 << 10
"""Of weights that a multiprocessor reads: two rings."""
_WARPS = (8, 4)
"""Of a block; where it reads little."""
_MOST_STAGES = 16
_SEGMENT = 128
"""Words of a copy at most, as far as copies are not whole rows anyway."""
_LEAST_COPY_BYTES, _MOST_ROWS = 1024, 4
_MOST_VALUES = 1 << 16
"""Of a row: counts of units times blocks stay within 32 bits."""


@lru_cache(maxsize=1024)
def expert_plan(
    sizes: ExpertSizes,
    card: Card,
    *,
    warps: int | None = None,
    segment: int = _SEGMENT,
    ring_bytes: int | None = None,
    trigger: int = 6,
    evict_first: bool = True,
) -> ExpertPlan | None:
    """The launches for these sizes; None where the kernels do not take them.

    Where a multiprocessor reads little altogether (a tensor-parallel shard at one token) filling and draining rings is
    most of the time: few warps with short rings then take 9.3 us instead of 12.8. Elsewhere short rings cost up to
    a third (benchmarks/results/h200/decode_plans.json, which `trigger` comes from as well).

    They take rows of whole words (16 bytes), at most 32 routes, and what leaves both launches enough shared memory
    beside each other on a multiprocessor for rings, tokens [T, H] and activations [T * K, I].
    """
    sides = (sizes.hidden_size, sizes.intermediate_size)
    if not 1 <= sizes.num_routes <= WARP or any(s < WORD or s % WORD or s > _MOST_VALUES for s in sides):
        return None
    if not card.clusters:
        return None
    little = sizes.weight_bytes <= _LITTLE_BYTES * card.processors
    warps = warps or _WARPS[little]
    ring_bytes = ring_bytes or (_LEAST_RING_BYTES if little else _RING_BYTES)
    made = [_cut(sizes, card, warps, words, ring_bytes) for words in (segment, segment // 2)]
    for fewest in (3, 2):
        for cut in made:
            if min(cut[1], cut[3]) >= fewest:
                return ExpertPlan(warps, *cut, trigger, evict_first)
    return None


def _cut(sizes: ExpertSizes, card: Card, warps: int, segment: int, ring_bytes: int) -> tuple[int, int, int, int, int]:
    """Segments of at most so many words and slots of a warp, of both launches; rows of a slot of the second."""
    both = card.shared_limit - _RESERVED - 2 * (_ROUTES_BYTES + _BARRIER_BYTES)
    left = both - _up_vectors(sizes) - _down_vectors(sizes)
    up_segment = segment_of(sizes.hidden_size // WORD, segment)
    up_step = warps * _up_slot(up_segment, sizes)
    up_stages = _stages(min(ring_bytes, left - min(left // 2, _ENOUGH_RING_BYTES)), up_step)
    whole = sizes.intermediate_size // WORD
    down_segment = segment_of(whole, segment)
    rows = 1
    while down_segment == whole and 16 * whole * rows < _LEAST_COPY_BYTES and rows < _MOST_ROWS:
        units = sizes.num_tokens * sizes.hidden_size // (2 * rows)
        if units < card.processors * (warps - 1):  # as long as every warp has one
            break
        rows *= 2
    down_step = warps * 16 * rows * down_segment
    return up_segment, up_stages, down_segment, _stages(min(ring_bytes, left - up_stages * up_step), down_step), rows


def _stages(room: int, step: int) -> int:
    """Slots of every warp that fit."""
    return max(0, min(_MOST_STAGES, room // step))


def segment_of(words: int, most: int) -> int:
    """Words of a segment: as many as make the fewest, equal ones; but for a whole row, whole lines of 128 bytes."""
    pieces = -(-words // most)
    return words if pieces == 1 else min(most, -(-words // (pieces * WORD)) * WORD)


def _up_slot(segment: int, sizes: ExpertSizes) -> int:
    return 16 * segment * (1 + sizes.gated)


def _up_vectors(sizes: ExpertSizes) -> int:
    return 2 * sizes.num_tokens * sizes.hidden_size


def _down_vectors(sizes: ExpertSizes) -> int:
    return 2 * sizes.num_routes * sizes.intermediate_size


def takes(sizes: ExpertSizes, num_experts: int, card: Card) -> bool:
    """Whether these two launches are the quicker way for 16-bit weights: a pure function of sizes and card.

    A route reads its expert's weights whether or not another route of the batch has read them: at one token that is
    all that anyone can do, and with more it costs the bytes of experts that tokens share, on average over even
    routings. That must be less than what a layout, a combination and tiles that are mostly empty take.
    """
    if expert_plan(sizes, card) is None or sizes.top_k > num_experts:
        return False
    missed = (1 - sizes.top_k / num_experts) ** sizes.num_tokens
    repeated = sizes.num_routes - num_experts * (1 - missed)
    expert_bytes = 2 * (2 + sizes.gated) * sizes.hidden_size * sizes.intermediate_size
    return repeated * expert_bytes <= _MOST_REPEATED_BYTES * card.processors


_MOST_REPEATED_BYTES = 90_000
"""A multiprocessor: 12 MB on 132, some 3 us."""


def unfit(hidden_states: Tensor, weights: ExpertWeights) -> str | None:
    """Why tensors cannot be read as they lie, in words; None if they can.

    Dtypes of 16 bits; experts one after the other at any distance, their rows dense; all from multiples of 16 bytes.
    """
    if hidden_states.dtype not in _KINDS:
        return f"hidden_states: expected bfloat16 or float16, got {str(hidden_states.dtype).removeprefix('torch.')}"
    for name, tensor in (("w13", weights.w13), ("w2", weights.w2)):
        if tensor.stride()[1:] != (tensor.shape[2], 1):
            return f"weights.{name}: expected dense matrices, got strides {tensor.stride()}"
        if tensor.data_ptr() % 16 or tensor.stride(0) % WORD:
            return f"weights.{name}: expected every expert at a multiple of 16 bytes"
    return None


def fused_experts_launch(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    weights: ExpertWeights,
    *,
    activation: Activation,
    num_experts: int,
    weight_on_input: bool,
    out: Tensor,
    chosen: ExpertPlan | None = None,
) -> None:
    """Fills `out` by two launches and one allocation of [T * K, I]. Sums are float32; the same input, the same bits.

    Raises ValueError for sizes that `expert_plan` has no plan for and tensors that are `unfit`.
    """
    device = hidden_states.get_device()
    if device != current_device():
        with torch.cuda.device(device):
            fused_experts_launch(
                hidden_states, topk_weights, topk_ids, expert_map, weights, activation=activation,
                num_experts=num_experts, weight_on_input=weight_on_input, out=out, chosen=chosen,
            )  # fmt: skip
            return
    if not hidden_states.shape[0]:
        return
    reason = unfit(hidden_states, weights)
    if reason is not None:
        raise ValueError(reason)
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
    key = (
        *topk_ids.shape, hidden_states.shape[1], w2.shape[2], weights.gated, hidden_states.dtype, topk_ids.dtype,
        bool(mapping), bool(b13), bool(b2), weight_on_input, activation, num_experts, w13.shape[0],
        2 * hidden_states.stride(0), 2 * w13.stride(0), 2 * w2.stride(0), device, chosen, SETTINGS["programmatic"],
    )  # fmt: skip
    launches = _READY.get(key)
    if launches is None:
        make_room(_READY)
        launches = _READY.setdefault(key, _prepare(*key[:-1]))
    act = out.new_empty(topk_ids.numel(), w2.shape[2])
    stream, ids, factors = current_stream(device), topk_ids.data_ptr(), topk_weights.data_ptr()
    launches[0](stream, ids, mapping, factors, hidden_states.data_ptr(), w13.data_ptr(), b13, act.data_ptr())
    launches[1](stream, ids, mapping, factors, act.data_ptr(), w2.data_ptr(), b2, out.data_ptr())


_READY: dict[tuple[Any, ...], tuple[Launch, Launch]] = {}
"""Both launches by all that they depend on."""
_KINDS = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}


def _dense(hidden_states: Tensor) -> Tensor:
    """Rows that bulk copies can read: dense, each from a multiple of 16 bytes."""
    strided = hidden_states.stride(1) != 1 or (hidden_states.shape[0] > 1 and hidden_states.stride(0) % WORD)
    if strided or hidden_states.data_ptr() % 16:
        return hidden_states.clone(memory_format=torch.contiguous_format)
    return hidden_states


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
    device: int,
    chosen: ExpertPlan | None,
) -> tuple[Launch, Launch]:
    sizes, card = ExpertSizes(num_tokens, top_k, hidden_size, intermediate_size, gated), card_of(device)
    plan = chosen or expert_plan(sizes, card)
    if plan is None:
        raise ValueError(
            "hidden_states, topk_ids: expected at most 32 routes, rows of whole 16 bytes, and compute capability 9.0 "
            f"or later with enough shared memory, got {sizes} on {card}"
        )
    defines = decode_defines(
        sizes, plan, card, dtype, "i64" if id_dtype == torch.int64 else "int", mapped, (up_biased, down_biased),
        activation, weight_on_input,
    )  # fmt: skip
    constants = (activation.alpha, activation.beta, activation.limit or 0.0)
    both: Any = {"grid": card.processors, "threads": WARP * plan.warps, "overlapping": True}
    up = Launch(
        "experts_decode.cu", "decode_up_kernel", defines, device, pointers=7, shared_bytes=plan.up_bytes(sizes),
        sizes=(num_experts, num_local, token_stride, up_stride, *map(float_bits, constants)), **both,
    )  # fmt: skip
    down = Launch(
        "experts_decode.cu", "decode_down_kernel", defines, device, pointers=7,
        shared_bytes=down_room(plan, sizes, card), sizes=(num_experts, num_local, down_stride), **both,
    )  # fmt: skip
    return up, down


def down_room(plan: ExpertPlan, sizes: ExpertSizes, card: Card) -> int:
    """Shared memory that a block of the second launch asks for.

    Where there is room, more than half of what a multiprocessor has: two of its blocks on one, beside a block of the
    first launch that is about to end, would leave another multiprocessor without.
    """
    needed, whole = plan.down_bytes(sizes), card.shared_limit + _RESERVED
    spread = -(-(whole // 2 - _RESERVED + 1) // 128) * 128
    fits = spread + plan.up_bytes(sizes) + 2 * _RESERVED <= whole
    return max(needed, spread) if fits else needed


def decode_defines(
    sizes: ExpertSizes,
    plan: ExpertPlan,
    card: Card,
    dtype: torch.dtype,
    id_type: str,
    mapped: bool,
    biased: tuple[bool, bool],
    activation: Activation,
    weight_on_input: bool,
) -> tuple[tuple[str, str], ...]:
    """What experts_decode.cu is compiled for; `biased` of w13 and of w2."""
    flags = {
        "MAP": mapped,
        "GATED_ROWS": sizes.gated,
        "W13_BIAS": biased[0],
        "W2_BIAS": biased[1],
        "WEIGHT_ON_INPUT": weight_on_input,
        "HAS_LIMIT": activation.limit is not None,
    }
    numbers = {
        "NUM_TOKENS": sizes.num_tokens,
        "NUM_TOP_K": sizes.top_k,
        "HIDDEN_SIZE": sizes.hidden_size,
        "INTERMEDIATE_SIZE": sizes.intermediate_size,
        "ACTIVATION": activation.name.upper(),
        "ROW_KIND": _KINDS[dtype],
        "ID": id_type,
        "WARPS_A_BLOCK": plan.warps,
        "UP_SEGMENT": plan.up_segment,
        "UP_STAGES": plan.up_stages,
        "UP_BYTES": plan.up_bytes(sizes),
        "DOWN_SEGMENT": plan.down_segment,
        "DOWN_STAGES": plan.down_stages,
        "DOWN_ROWS": plan.down_rows,
        "DOWN_BYTES": down_room(plan, sizes, card),
        "TRIGGER": plan.trigger,
        "EVICT_FIRST": int(plan.evict_first),
    }
    named = [(name, "true" if flag else "false") for name, flag in flags.items()]
    return (*named, *((name, str(value)) for name, value in numbers.items()))
