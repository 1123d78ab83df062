"""The sums of parallel experts on one device, in the same order: what several ranks have to give, bit for bit."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeyard.combine import combine_routes, moe_sum
from moeyard.dispatch.checks import check_int
from moeyard.dispatch.ids import narrow_ids
from moeyard.experts import fused_experts
from moeyard.layout import moe_align_block_size
from moeyard.parallel.layer import routes_of, rows_of_routes
from moeyard.parallel.plan import Plan, map_of, ranks_of_tokens, slots_of_routes, tables_of
from moeyard.parallel.ways import ORDERS
from moeyard.parallel.weights import refuse_sharded, slice_experts
from moeyard.parallel.wire import on_host
from moeyard.permute import shuffle_rows
from moeyard.values import Activation, ExpertWeights, Routing


def experts_in_order(
    hidden_states: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    plan: Plan,
    *,
    tokens_per_rank: Sequence[int] | None = None,
    max_tokens: int | None = None,
    order: str = "grouped",
    activation: Activation | None = None,
    apply_router_weight_on_input: bool = False,
    save: str = "product",
    impl: str = "auto",
) -> Tensor:
    """`moeyard.fused_experts` on one device, its sums in the order of `moeyard.parallel`: without any process group.

    Args:
        hidden_states: [num_tokens, hidden_size]: the tokens of all ranks, rank after rank.
        routing: of these tokens.
        weights: of all experts, in their global order.
        plan: who would hold which.
        tokens_per_rank: how many tokens each rank has, which replicas depend on; all are rank 0's unless given.
        max_tokens: that of a gathered connection, whose ranks see the tokens of all ranks; None of all_to_all. It
            changes bits only where products of an implementation depend on the number of tokens.
        order: as in `connect`. With "exact" the plan changes nothing.
        activation, apply_router_weight_on_input, save, impl: as in `moeyard.fused_experts`.

    Returns [num_tokens, hidden_size]. Each rank's experts see the rows that they would see there, one rank after the
    other. Gradients flow. The host waits for the numbers of rows. Raises TypeError or ValueError naming the argument.
    """
    refuse_sharded(weights)
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    if weights.num_local_experts != plan.num_experts:
        raise ValueError(f"weights: expected all {plan.num_experts} experts of plan, got {weights.num_local_experts}")
    device, ids, factors = hidden_states.device, narrow_ids(routing.topk_ids), routing.topk_weights
    routing = Routing(factors, ids)
    options: dict[str, Any] = {
        "activation": activation, "apply_router_weight_on_input": apply_router_weight_on_input, "save": save,
        "impl": impl,
    }  # fmt: skip
    if order == "exact":
        here = torch.where((ids >= 0) & (ids < plan.num_experts), 0, -1).int()
        count = on_host((here >= 0).sum())
        weighted = apply_router_weight_on_input or hidden_states.dtype == torch.float16
        routes = routes_of(here)
        rows = rows_of_routes(hidden_states, routing, routes, count, weights, weighted, options)
        return combine_routes(
            rows, routes.route_rows, None if weighted else factors, ids.shape[1], out=None, impl="auto"
        )
    tables, counts = tables_of(plan, device), _counts(hidden_states.shape[0], tokens_per_rank, plan)
    sources = torch.cat([torch.arange(rank, rank + count) for rank, count in enumerate(counts)]).to(device)
    slots, options["num_experts"] = slots_of_routes(ids, tables, sources), plan.num_slots
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, low=max(1, *counts))
        where = torch.cat([torch.arange(count) + rank * max_tokens for rank, count in enumerate(counts)]).to(device)
        total = plan.ranks * max_tokens
        back = where.new_full((total,), -1).index_copy(0, where, torch.arange(where.shape[0], device=device))
        rows = shuffle_rows(hidden_states, back)
        local = Routing(shuffle_rows(factors, back), slots.new_full((total, slots.shape[1]), -1))
        local.topk_ids[where] = slots
        parts = [
            fused_experts(
                rows, local, slice_experts(weights, plan, rank), expert_map=map_of(plan, rank, device), **options
            )
            for rank in range(plan.ranks)
        ]
        return moe_sum(torch.stack([shuffle_rows(part, where) for part in parts], 1))
    layout = moe_align_block_size(ranks_of_tokens(slots, tables, plan), num_experts=plan.ranks, block_size=1)
    tokens = layout.sorted_token_ids // layout.top_k
    parts, start = [], 0
    for rank, count in enumerate(on_host(layout.expert_counts)):
        mine = tokens[start : start + count]
        start += count
        local = Routing(shuffle_rows(factors, mine), shuffle_rows(slots, mine))
        map_, held = map_of(plan, rank, device), slice_experts(weights, plan, rank)
        rows = shuffle_rows(hidden_states, mine)
        parts.append(fused_experts(rows, local, held, expert_map=map_, **options))
    return combine_routes(torch.cat(parts), layout.route_rows, None, layout.top_k, out=None, impl="auto")


def _counts(num_tokens: int, tokens_per_rank: Sequence[int] | None, plan: Plan) -> Sequence[int]:
    """Tokens of each rank."""
    if tokens_per_rank is None:
        return [num_tokens, *[0] * (plan.ranks - 1)]
    if len(tokens_per_rank) != plan.ranks or sum(tokens_per_rank) != num_tokens:
        raise ValueError(
            f"tokens_per_rank: expected {plan.ranks} numbers that add up to {num_tokens}, got {list(tokens_per_rank)}"
        )
    for count in tokens_per_rank:
        check_int("tokens_per_rank", count, low=0)
    return tokens_per_rank
