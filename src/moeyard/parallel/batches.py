"""What was dispatched as one batch per local expert: the format of kernels that take experts with counts.

DeepEP's low-latency dispatch hands out such batches. Here they are made where rows have arrived. So each token crosses
once, not room for every token at every expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeyard.combine import combine_routes
from moeyard.dispatch.checks import check_shape, check_tensor
from moeyard.layout import moe_align_block_size
from moeyard.parallel.layer import Dispatched
from moeyard.permute import shuffle_rows


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """The rows of each local expert, side by side from its first place on."""

    sent: Dispatched
    rows: Tensor
    """[num_local_experts, num_received, hidden_size] of the connection's dtype; zeros past an expert's count. Of ways
    with fixed sizes num_received is ranks * max_tokens."""
    counts: Tensor
    """[num_local_experts] int32: rows of each expert, an `expert_num_tokens`."""
    places: Tensor
    """[num_received * top_k] int32: the row of each route among all places, -1 where its expert is elsewhere."""
    crowded: Tensor
    """[num_received] bool: tokens whose ids name an expert more than once, so that it ran out of places."""


def to_batches(sent: Dispatched) -> Batches:
    """Arranges what `dispatch` returned, of order "grouped", as one batch per expert of this rank.

    An expert has a place for every token that was received. That is enough where the ids of a token are distinct, as
    those of `route` are. The host waits for nothing. Gradients flow. Raises TypeError or ValueError naming an argument.
    """
    if not isinstance(sent, Dispatched):
        raise TypeError(f"sent: expected what dispatch returned, got {type(sent).__name__}")
    connection = sent.connection
    if connection.order != "grouped" or connection.weight_on_input:
        raise ValueError("sent: expected order='grouped' and router weights behind the experts, got another connection")
    room, top_k = sent.rows.shape[0], connection.top_k
    experts = len(connection.plan.experts_of(connection.rank))
    layout = moe_align_block_size(
        sent.routing.topk_ids,
        num_experts=connection.plan.num_slots,
        block_size=1,
        expert_map=connection.expert_map,
        num_local_experts=experts,
    )
    there = layout.route_rows >= 0
    slots = torch.where(there, layout.route_rows, 0).long()
    expert = torch.searchsorted(layout.expert_offsets[1:], slots, right=True).clamp_(max=experts - 1)
    number = slots - layout.expert_offsets[expert]
    fits = there & (number < room)
    places = torch.where(fits, expert * room + number, -1)
    total = experts * room
    tokens = torch.arange(room, device=places.device).repeat_interleave(top_k)
    sources = tokens.new_full((total + 1,), -1).scatter_(0, torch.where(fits, places, total), tokens)[:-1]
    rows = shuffle_rows(sent.rows, sources).view(experts, room, connection.hidden_size)
    crowded = (there & ~fits).view(room, top_k).any(1)
    return Batches(sent, rows, layout.expert_counts.clamp(max=room), places.int(), crowded)


def from_batches(rows: Tensor, batches: Batches) -> Tensor:
    """Adds up what experts made of batches, for `moeyard.parallel.combine`.

    Args:
        rows: [num_local_experts, num_received, hidden_size] of the connection's dtype; past an expert's count it is not
            read.
        batches: what `to_batches` returned.

    Returns [num_received, hidden_size], weighted and added in k order in float32, rounded once. A token that is crowded
    gets NaN. Gradients flow. Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(batches, Batches):
        raise TypeError(f"batches: expected what to_batches returned, got {type(batches).__name__}")
    sent = batches.sent
    check_tensor("rows", rows, dtypes=(sent.connection.dtype,), ndim=(3,), device=sent.connection.device)
    check_shape("rows", rows, tuple(batches.rows.shape), "as batches.rows has")
    top_k, factors = sent.connection.top_k, sent.routing.topk_weights
    total = combine_routes(rows.flatten(0, 1), batches.places, factors, top_k, out=None, impl="auto")
    return torch.where(batches.crowded.unsqueeze(1), torch.nan, total)
