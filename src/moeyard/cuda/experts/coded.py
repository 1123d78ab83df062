"""The experts of weights of 8-bit codes on Hopper: rows are quantised before either product, which multiplies codes."""

from math import prod

import torch
from torch import Tensor

from moeyard.cuda.align.launchers import align_launch
from moeyard.cuda.experts.plan import Way, product_plan, way_of_codes
from moeyard.cuda.experts.product import apart, compact_layout, lies_well, product, turns_of
from moeyard.cuda.rows.launchers import combine_launch, quantize_launch
from moeyard.cuda.runtime.cards import card_of
from moeyard.dispatch.sizes import expected_routes
from moeyard.quant import QuantScheme
from moeyard.values import ExpertCall

GROUP = 128
"""Columns of a block of scales, and of a row that share a scale beside blocks: 128 codes are a step of the product."""


def fused_coded_experts_launch(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    call: ExpertCall,
    *,
    out: Tensor,
    way: Way | None = None,
) -> None:
    """Layout, quantisation, product with activation, quantisation, product, sum: six launches, or five.

    A token's row is quantised once: on its way into the order of experts, or where the product gathers rows, in the
    order of tokens. What the activation leaves is rounded to 16 bits and then quantised, one scale per row, or per 128
    columns beside blocks. Those lie in one tile of the first product where tiles are tall, which then quantises them.

    Rows of results hold, before the second product writes them, the codes and scales of the first product's rows and,
    where there is room, what the activation leaves.
    """
    num_routes, top_k = topk_ids.numel(), topk_ids.shape[1]
    if not num_routes:
        return
    device = hidden_states.get_device()
    weights, activation, num_experts, expert_map, *_ = call
    scheme, scales = weights.scheme, weights.scales
    assert scheme is not None and scales is not None
    experts, hidden_size, size = weights.num_local_experts, weights.hidden_size, weights.intermediate_size
    expected = expected_routes(num_routes, experts, num_experts)
    way = way or way_of_codes(expected, experts, weights.w13.shape[1])
    grouped, weighs = bool(scheme.activation_group), hidden_states.dtype == torch.float16

    rows = hidden_states.new_empty((num_routes, hidden_size))
    first_rows = num_routes if way.copied else hidden_states.shape[0]
    first, first_scales, used = _codes(rows, first_rows, hidden_size, scheme)
    spare = rows.view(-1)[-(-used // 32) * 16 :]  # from a multiple of 32 bytes on
    as_codes = grouped and weights.gated
    if as_codes:
        plan = product_plan(num_routes, experts, size, True, False, card_of(device), way, expected, "BY_BLOCKS")
        as_codes = plan.weight_rows == 2 * GROUP
    middle = None
    if not as_codes:
        fits = num_routes * size <= spare.numel()
        middle = spare[: num_routes * size].view(num_routes, size) if fits else rows.new_empty((num_routes, size))
    groups = -(-size // GROUP) if grouped else 1
    second_room = rows.new_empty(num_routes * (size // 4 + groups), dtype=torch.int32)
    second, second_scales, _ = _codes(second_room, num_routes, size, scheme)
    inputs = (hidden_states, topk_weights, topk_ids, expert_map)
    beside = second_room if middle is not None else spare  # what nobody writes while the first product reads its layout
    layout = compact_layout(
        topk_ids, num_experts, experts, beside, None if weighs else beside,
        out if lies_well(out) and apart(out, *inputs) else None,
    )  # fmt: skip

    align_launch(topk_ids, expert_map, layout, programmatic=True)
    offsets, counts = layout.expert_offsets, layout.expert_counts
    turns = turns_of(device)
    quantize_launch(
        hidden_states, layout.route_rows if way.copied else None, top_k=top_k if way.copied else 1, grouped=grouped,
        rows=first, row_scales=first_scales, programmatic=True,
    )  # fmt: skip
    product(
        first, weights.w13, weights.w13_bias, offsets, counts, second if middle is None else middle,
        slots=None if way.copied else layout.sorted_token_ids, divisor=1 if way.copied else top_k,
        gather=not way.copied, activation=activation, gated=weights.gated, ready=way.copied and not grouped, way=way,
        expected=expected, turns=turns, weight_scales=_as_floats(scales.w13), row_scales=first_scales,
        result_scales=second_scales if as_codes else None, dtype=rows.dtype,
    )  # fmt: skip
    if middle is not None:
        quantize_launch(
            middle, None, grouped=grouped, rows=second, row_scales=second_scales, count=layout.num_tokens_post_padded,
            programmatic=True,
        )  # fmt: skip
    product(
        second, weights.w2, weights.w2_bias, offsets, counts, rows, slots=layout.sorted_token_ids if weighs else None,
        factors=topk_weights if weighs else None, ready=not grouped, way=way, expected=expected, turns=turns,
        weight_scales=_as_floats(scales.w2), row_scales=second_scales,
    )  # fmt: skip
    factors = None if weighs else topk_weights
    combine_launch(rows, factors, route_rows=layout.route_rows, top_k=top_k, out=out, programmatic=True)


def unfit_scheme(scheme: QuantScheme, block_start: int) -> str | None:
    """Why these launches do not take such codes, in words; None if they do."""
    if scheme.static:
        return "takes dynamic scales of activations, got static ones"
    if block_start:
        return f"takes matrices that begin with a block, got one that begins at {block_start} of it"
    return None


def _codes(room: Tensor, num_rows: int, columns: int, scheme: QuantScheme) -> tuple[Tensor, Tensor, int]:
    """Codes [num_rows, columns] and their scales at the beginning of `room`, and how many bytes they take."""
    dtype = torch.int8 if scheme.activations == "int8" else torch.float8_e4m3fn
    shape = (num_rows, -(-columns // GROUP)) if scheme.activation_group else (num_rows,)
    size = num_rows * columns
    codes = room.view(-1).view(dtype)[:size].view(num_rows, columns)
    scales = room.view(-1).view(torch.float32)[size // 4 : size // 4 + prod(shape)].view(shape)
    return codes, scales, size + 4 * prod(shape)


def _as_floats(scales: Tensor) -> Tensor:
    return scales.float().contiguous()
