"""Tokens to the ranks that hold their experts, through these, and back: dispatch, local experts, combine.

Ranks take the place of experts. A layout of the ranks of each token says where its rows go, and `permute` sorts them by
rank. `combine` adds what comes back, in rank order. So no sum depends on an order of arrival.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeyard import experts
from moeyard.combine import combine_routes, moe_sum
from moeyard.dispatch.checks import check_out, check_shape, check_tensor
from moeyard.dispatch.ids import local_expert_ids, narrow_ids
from moeyard.dispatch.op import needs_gradient
from moeyard.layout import moe_align_block_size
from moeyard.parallel.connection import Connection, check_call
from moeyard.parallel.plan import ranks_of_tokens, slots_of_routes
from moeyard.parallel.pushed_gradients import bring_with_gradient, spread_with_gradient
from moeyard.parallel.weights import refuse_sharded, slots_agree
from moeyard.parallel.wire import (
    exchange,
    exchange_evenly,
    gather,
    gather_with_gradient,
    host_counts,
    pack,
    restore,
    unpack,
)
from moeyard.permute import permute, permute_to_fp8, shuffle_rows
from moeyard.values import Activation, ExpertWeights, Layout, Routing


@dataclass(frozen=True, slots=True, eq=False)
class Home:
    """What a rank keeps about its own tokens while their rows are away; of all_to_all alone."""

    given: list[int]
    """Rows that went to each rank and come back from it."""
    taken: list[int]
    """Rows that came from each rank and go back to it."""
    route_rows: Tensor
    """[num_tokens * width] int32: where a token's rows are among those that come back, -1 for none."""
    width: int
    factors: Tensor | None
    """[num_tokens, width] float32: what rows are multiplied by as they are added; None for 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Dispatched:
    """The tokens that a rank's experts are to see."""

    connection: Connection
    rows: Tensor
    """[num_received, hidden_size] of the connection's dtype: by the rank that they came from, in its order. Ways of
    fixed sizes: the tokens of all ranks, [ranks * max_tokens, hidden_size]; past the tokens of a rank they mean
    nothing, nor do pushed tokens without an expert here. symmetric and pushed: in memory that the next dispatch of the
    connection writes, and so are pushed ids and router weights."""
    routing: Routing
    """Of these rows. Ids [num_received, top_k] int32 are slots, which `connection.expert_map` maps to local experts."""
    num_tokens: int
    """Tokens of this rank."""
    home: Home | None
    """None of ways other than all_to_all."""
    routes: Layout | None = None
    """Of pushed rows and exact sums: the routes that have their expert here, in order, as those of one expert."""
    given: Routing | None = None
    """Of pushed rows that gradients flow through: the routing of this rank's own tokens."""


def dispatch(
    hidden_states: Tensor,
    routing: Routing,
    connection: Connection,
    *,
    meanwhile: Callable[[], object] | None = None,
) -> Dispatched:
    """Sends each token to the ranks that hold one of its experts, once to each; all ranks call it.

    Args:
        hidden_states: [num_tokens, hidden_size] of the connection's dtype; every rank has its own tokens, or none.
        routing: of these tokens: weights [num_tokens, top_k] float32, ids int32, int64 or uint32 of global experts. Ids
            below 0 and of num_experts and above are dropped.
        connection: made by `connect`.
        meanwhile: called once rows are under way, and before they are waited for.

    Returns `Dispatched`. Where the scheme quantises rows alike for all experts, they are sent as codes and scales; what
    arrives is quantised to just these again. Raises TypeError or ValueError naming the argument; all_to_all: on every
    rank, before rows move.
    """
    if connection.way != "all_to_all":
        _check(hidden_states, routing, connection)
        way = _gathered if connection.pushes is None else _pushed
        return way(hidden_states, routing, connection, meanwhile)
    try:
        _check(hidden_states, routing, connection)
    except (TypeError, ValueError):
        host_counts(torch.full((connection.ranks, 2), -1, device=connection.device), connection.group)
        raise
    return _all_to_all(hidden_states, routing, connection, meanwhile)


def _await(works: list[dist.Work], meanwhile: Callable[[], object] | None) -> None:
    if meanwhile is not None:
        meanwhile()
    for work in works:
        work.wait()


def _check(hidden_states: object, routing: object, connection: Connection) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    check_call(connection, hidden_states, routing.topk_weights, routing.topk_ids)


def _by_rank(ranks: Tensor, num_ranks: int) -> Layout:
    """The layout of tokens by rank, of [num_tokens, width] int32 ranks."""
    return moe_align_block_size(ranks, num_experts=num_ranks, block_size=1)


def _all_to_all(
    hidden_states: Tensor, routing: Routing, connection: Connection, meanwhile: Callable[[], object] | None
) -> Dispatched:
    plan, tables, num_ranks = connection.plan, connection.tables, connection.ranks
    slots = slots_of_routes(narrow_ids(routing.topk_ids), tables, connection.rank)
    tokens = _by_rank(ranks_of_tokens(slots, tables, plan), num_ranks)
    back, factors = tokens, None
    if connection.order == "exact":
        ranks = torch.where(slots >= 0, tables.shares[slots.clamp(min=0).long()], -1)
        back = _by_rank(ranks.int(), num_ranks)
        factors = None if weighted_there(connection) else routing.topk_weights
    counts = torch.stack((tokens.expert_counts, back.expert_counts), 1).long()
    to_ranks, from_ranks = host_counts(counts, connection.group)
    for rank, row in enumerate(from_ranks):
        if min(row) < 0:
            raise ValueError(f"rank {rank} of the group refuses its arguments of this call")
    given, taken = [row[0] for row in to_ranks], [row[0] for row in from_ranks]
    group, training = connection.group, connection.training
    works: list[dist.Work] = []
    moved = permute(pack(slots, routing.topk_weights), tokens).rows
    packed = exchange(moved, given, taken, group, works=works)
    if connection.rows.quantised:
        parts = [exchange(p, given, taken, group, works=works) for p in _quantised(hidden_states, tokens, connection)]
    else:
        rows = permute(hidden_states, tokens).rows
        parts = [exchange(rows, given, taken, group, training=training, works=works)]
    _await(works, meanwhile)
    theirs, weights = unpack(packed)
    rows = restore(parts[0], parts[1], connection.dtype) if connection.rows.quantised else parts[0]
    if training and torch.is_grad_enabled():  # bits carry no gradient
        sent = permute(routing.topk_weights, tokens).rows
        weights = exchange(sent, given, taken, group, training=True)
    home = Home(
        [row[1] for row in to_ranks], [row[1] for row in from_ranks], back.route_rows, back.top_k, factors
    )  # fmt: skip
    return Dispatched(connection, rows, Routing(weights, theirs), hidden_states.shape[0], home)


def _quantised(hidden_states: Tensor, tokens: Layout, connection: Connection) -> tuple[Tensor, Tensor]:
    """Codes [slots, hidden_size] and scales [slots, groups]."""
    group = connection.rows.group
    grouped = None if group == connection.hidden_size and group != 128 else group
    moved = permute_to_fp8(hidden_states, tokens, group_size=grouped)
    assert moved.scales is not None
    return moved.rows, moved.scales.view(moved.rows.shape[0], connection.hidden_size // group)


def _gathered(
    hidden_states: Tensor, routing: Routing, connection: Connection, meanwhile: Callable[[], object] | None
) -> Dispatched:
    most, window, ids = connection.max_tokens, connection.window, narrow_ids(routing.topk_ids)
    assert most is not None
    as_they_are = connection.tables.identity and ids.dtype == torch.int32  # experts drop what is out of range
    slots = ids if as_they_are else slots_of_routes(ids, connection.tables, connection.rank)
    parts = [hidden_states.detach()]
    if connection.rows.quantised:
        codes, scales = _quantised(hidden_states, _by_rank(torch.zeros_like(slots[:, :1]), 1), connection)
        parts = [codes.view(torch.uint8), scales]
    packed = _filled(pack(slots, routing.topk_weights), most, -1)
    works: list[dist.Work] = []
    if window is not None:
        *parts, packed = window.spread([*parts, packed])
    elif connection.training and torch.is_grad_enabled():
        parts = [gather_with_gradient(_filled(hidden_states, most, 0), connection.ranks, connection.group)]
        packed = gather(packed, connection.ranks, connection.group, works)
    else:
        filled = (*(_filled(part, most, 0) for part in parts), packed)
        *parts, packed = (gather(part, connection.ranks, connection.group, works) for part in filled)
    _await(works, meanwhile)
    rows = parts[0]
    if connection.rows.quantised:
        rows = restore(rows.view(torch.float8_e4m3fn), parts[1], connection.dtype)
    theirs, weights = unpack(packed)
    if connection.training and torch.is_grad_enabled():  # bits carry no gradient
        factors = _filled(routing.topk_weights, most, 0)
        weights = gather_with_gradient(factors, connection.ranks, connection.group)
    return Dispatched(connection, rows, Routing(weights, theirs), hidden_states.shape[0], None)


def _pushed(
    hidden_states: Tensor, routing: Routing, connection: Connection, meanwhile: Callable[[], object] | None
) -> Dispatched:
    pushes, ids = connection.pushes, narrow_ids(routing.topk_ids)
    assert pushes is not None
    if connection.training and torch.is_grad_enabled():
        assert connection.max_tokens is not None
        given = Routing(routing.topk_weights, ids)
        there = spread_with_gradient(pushes, hidden_states, given)
        _await([], meanwhile)
        factors = _filled(routing.topk_weights, connection.max_tokens, 0)
        factors = gather_with_gradient(factors, connection.ranks, connection.group)
        own = Routing(factors, there.slots)
        return Dispatched(connection, there.rows, own, hidden_states.shape[0], None, None, given)
    rows, scales = hidden_states, None
    if connection.rows.quantised:
        codes, scales = _quantised(hidden_states, _by_rank(torch.zeros_like(ids[:, :1]), 1), connection)
        rows = codes.view(torch.uint8)
    got = pushes.spread(rows, scales, ids, routing.topk_weights, meanwhile)
    rows = got.rows
    if got.scales is not None:
        rows = restore(rows.view(torch.float8_e4m3fn), got.scales, connection.dtype)
    routes = None
    if connection.order == "exact":
        slots = connection.plan.num_slots
        routes = moe_align_block_size(
            got.slots, num_experts=slots, block_size=1, expert_map=pushes.here, num_local_experts=1
        )
    return Dispatched(connection, rows, Routing(got.factors, got.slots), hidden_states.shape[0], None, routes)


def _filled(rows: Tensor, length: int, value: float) -> Tensor:
    """Contiguous rows, as many as `length`."""
    if rows.shape[0] == length:
        return rows.contiguous()
    return torch.cat((rows, rows.new_full((length - rows.shape[0], *rows.shape[1:]), value)))


def weighted_there(connection: Connection) -> bool:
    """Whether exact rows are weighted before they come back: before their experts, or as float16, to stay finite."""
    return connection.weight_on_input or connection.dtype == torch.float16


def local_experts(
    sent: Dispatched,
    weights: ExpertWeights,
    *,
    activation: Activation | None = None,
    save: str = "product",
    impl: str = "auto",
) -> Tensor:
    """The experts of this rank on what was dispatched to it.

    Args:
        sent: what `dispatch` returned.
        weights: of this rank, as in `connect`.
        activation, save, impl: as in `fused_experts`.

    Returns grouped: [num_received, hidden_size], the sum of a token's experts on this rank. exact: one row per route
    that has its expert here, by token and k; pushed: [num_received * top_k, hidden_size], these and then zeros.
    Raises TypeError or ValueError naming the argument.
    """
    connection = sent.connection
    refuse_sharded(weights)
    disagreement = slots_agree(weights, connection.plan.experts_of(connection.rank))
    if disagreement:
        raise ValueError(disagreement)
    if weights.scheme != connection.scheme:
        raise ValueError(f"weights.scheme: expected {connection.scheme}, as the ranks agreed, got {weights.scheme}")
    tensors = (weights.w13, weights.w2, weights.w13_bias, weights.w2_bias)
    if needs_gradient(*tensors) and not connection.training:
        raise ValueError("training: expected a connection with training=True where gradients are wanted, got False")
    options: dict[str, Any] = {
        "activation": activation, "num_experts": connection.plan.num_slots, "expert_map": connection.expert_map,
        "apply_router_weight_on_input": connection.weight_on_input, "save": save, "impl": impl,
    }  # fmt: skip
    if connection.order == "grouped":
        return experts.fused_experts(sent.rows, sent.routing, weights, **options)
    if sent.routes is not None:
        routes, count = sent.routes, sent.routes.capacity
    else:
        assert sent.home is not None
        here = local_expert_ids(sent.routing.topk_ids, connection.expert_map).int()
        routes, count = routes_of(torch.where(here >= 0, 0, here)), sum(sent.home.taken)
    return rows_of_routes(sent.rows, sent.routing, routes, count, weights, weighted_there(connection), options)


def routes_of(here: Tensor) -> Layout:
    """The routes of [num_tokens, top_k] int32 that are 0, and not -1, in their order."""
    return moe_align_block_size(here, num_experts=1, block_size=1)


def rows_of_routes(
    rows: Tensor, routing: Routing, apart: Layout, count: int, weights: ExpertWeights, weighted: bool, options: Any
) -> Tensor:
    """[count, hidden_size]: what the expert of each route makes of its token, by token and k, rounded to the dtype.

    Args:
        rows: [num_tokens, hidden_size].
        routing: of these tokens.
        apart: the routes that count, as those of one expert.
        count: how many rows are wanted; those past the last route are zeros.
        weights, options: of `fused_experts`.
        weighted: whether router weights multiply.
    """
    routes = apart.sorted_token_ids[:count].long()  # past the last one their number, which no token has
    taken = shuffle_rows(rows, routes // apart.top_k)
    ids, factors = routing.topk_ids.reshape(-1), routing.topk_weights.reshape(-1)
    ids = torch.cat((ids, ids.new_full((1,), -1)))[routes].unsqueeze(1)
    factors = torch.cat((factors, factors.new_zeros(1)))[routes].unsqueeze(1)
    if not weighted:
        factors = torch.ones_like(factors)
    return experts.fused_experts(taken, Routing(factors, ids), weights, **options)


def combine(rows: Tensor, sent: Dispatched, *, out: Tensor | None = None) -> Tensor:
    """Brings what experts made of tokens back to the ranks of these, and adds it up; all ranks call it.

    Args:
        rows: what `local_experts` returned for `sent`.
        sent: what `dispatch` returned.
        out: [num_tokens, hidden_size], to overwrite.

    Returns [num_tokens, hidden_size] of the connection's dtype, summed in float32 (float64 rows: in float64) in the
    order of the connection, rounded once. A token without experts gets zeros. Raises TypeError or ValueError naming the
    argument, on this rank alone: the others then wait until the timeout of the group.
    """
    if not isinstance(sent, Dispatched):
        raise TypeError(f"sent: expected what dispatch returned, got {type(sent).__name__}")
    connection, home = sent.connection, sent.home
    check_tensor("rows", rows, dtypes=(connection.dtype,), ndim=(2,), device=connection.device)
    received = sent.rows.shape[0] if sent.routes is None else sent.routes.capacity
    count = received if home is None else sum(home.taken)
    check_shape("rows", rows, (count, connection.hidden_size), "what local_experts returns")
    if out is not None:
        check_out("out", out, (sent.num_tokens, connection.hidden_size), connection.dtype, connection.device)
    if connection.pushes is not None and sent.given is not None:
        total = bring_with_gradient(connection.pushes, rows, sent.given)
        return total if out is None else out.copy_(total)
    if connection.pushes is not None:
        out = rows.new_empty((sent.num_tokens, connection.hidden_size)) if out is None else out
        places = None if sent.routes is None else sent.routes.route_rows
        connection.pushes.bring(rows.detach(), places, weighted=not weighted_there(connection), out=out)
        return out
    if home is None:
        assert connection.max_tokens is not None
        shape, window = (connection.ranks, connection.max_tokens, connection.hidden_size), connection.window
        if connection.training:
            even = [connection.max_tokens] * connection.ranks
            theirs = exchange(rows, even, even, connection.group, training=True).view(shape)
        elif window is not None:
            theirs = window.bring(rows.detach().view(shape))
        else:
            theirs = exchange_evenly(rows.detach().view(shape), connection.group)
        return moe_sum(theirs[:, : sent.num_tokens].transpose(0, 1), out=out)
    theirs = exchange(rows, home.taken, home.given, connection.group, training=connection.training)
    return combine_routes(theirs, home.route_rows, home.factors, home.width, out=out, impl="auto")


def fused_experts(
    hidden_states: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    connection: Connection,
    *,
    activation: Activation | None = None,
    meanwhile: Callable[[], Tensor] | None = None,
    save: str = "product",
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`fused_experts` whose experts are spread over the ranks of a group: dispatch, local experts, combine.

    Args:
        hidden_states, routing: of this rank's own tokens, as in `dispatch`.
        weights: of this rank, as in `connect`.
        connection: made by `connect`.
        activation, save, out, impl: as in `moeyard.fused_experts`.
        meanwhile: computes [num_tokens, hidden_size] while rows are under way (shared experts), which the result is
            added to.

    Returns [num_tokens, hidden_size]. The sum has the order of the connection; `experts_in_order` gives the same on one
    device. Gradients flow where the connection is for training. All ranks call it; one that does not ends in an error
    on the others after the timeout of the group. Raises TypeError or ValueError naming the argument.
    """
    beside: list[Tensor] = []
    call = None if meanwhile is None else lambda: beside.append(meanwhile())
    sent = dispatch(hidden_states, routing, connection, meanwhile=call)
    rows = local_experts(sent, weights, activation=activation, save=save, impl=impl)
    result = combine(rows, sent, out=out)
    return result.add_(beside[0]) if beside else result
