"""Rows pushed into the memory of the ranks that want them: kernels of `cuda/push` on GPUs, plain copies on a CPU.

Memory is that of `symmetric.py`: fixed, made once, reached by all ranks of a host. Token t of rank s has one place on
every rank. So nothing is counted or read back, and a graph holds all of it. Rows cross to ranks that have an expert of
their token; slots and router weights cross to all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moeyard.cuda.push.plan import Places, PushSizes, places_of, refusal_of_sizes
from moeyard.parallel.plan import Plan, Tables, map_of, ranks_of_tokens, slots_of_routes
from moeyard.parallel.symmetric import Peers, memory_of, timeout_of
from moeyard.parallel.ways import RowFormat


class Arrived(NamedTuple):
    """What a dispatch brought: views of the memory, valid until the next one."""

    rows: Tensor
    """[ranks * max_tokens, hidden_size] of the dtype, or of uint8 codes. Rows of tokens without an expert here mean
    nothing."""
    scales: Tensor | None
    """[ranks * max_tokens, groups] float32."""
    slots: Tensor
    """[ranks * max_tokens, top_k] int32, -1 for none."""
    factors: Tensor
    """[ranks * max_tokens, top_k] float32."""

    def copied(self) -> "Arrived":
        """Slots and router weights in memory of their own."""
        return self._replace(slots=self.slots.clone(), factors=self.factors.clone())


@dataclass(slots=True, eq=False, weakref_slot=True)
class Pushes:
    """The memory of one connection. Dispatch and combine take turns, each ends when those of all ranks are here.

    So one buffer of each kind is enough. A rank that has ended a combine knows that all experts have read what was
    dispatched, and one that has ended the next dispatch knows that all have read what came back.
    """

    peers: Peers
    memory: list[Tensor]
    """By rank, [total] uint8."""
    sizes: PushSizes
    places: Places
    plan: Plan
    tables: Tables
    rank: int
    rows_dtype: torch.dtype
    """Of what is dispatched."""
    launches: Any
    """`PushTables` of a GPU; None on a CPU."""
    side: Any
    """A stream of a GPU; None on a CPU."""
    here: Tensor
    """[num_slots] int32: 0 for slots of this rank, -1 for others."""
    timeout_ms: int
    waiting: bool = False
    """Whether what was dispatched last has not come back yet."""
    sent: int = 0
    """Where the ids of the last dispatch lie that gradients flow through."""

    def spread(
        self,
        rows: Tensor,
        scales: Tensor | None,
        topk_ids: Tensor,
        topk_weights: Tensor,
        meanwhile: Callable[[], object] | None = None,
    ) -> Arrived:
        """Sends this rank's tokens: rows [num_tokens, ...], their scales, int32 or int64 ids and router weights.

        `meanwhile` is called once they are under way, on a stream of their own, and before they are waited for.
        Raises ValueError where a combine is due, RuntimeError where a rank did not answer an earlier call.
        """
        if self.waiting:
            raise ValueError("connection: expected a combine after each dispatch, as both share memory, got a dispatch")
        if self.launches is None:
            self._spread_on_host(rows, scales, topk_ids, topk_weights)
            if meanwhile is not None:
                meanwhile()
        else:
            from moeyard.cuda.push.launchers import push_launch

            given = (rows.detach(), scales, topk_ids, topk_weights.detach(), self.sizes, self.launches)
            if meanwhile is None:
                self._launch(push_launch, *given)
            else:
                stream = torch.cuda.current_stream(rows.device)
                self.side.wait_stream(stream)
                with torch.cuda.stream(self.side):
                    self._launch(push_launch, *given, beside=True)
                meanwhile()
                stream.wait_stream(self.side)
        self.waiting = True
        return self.arrived()

    def arrived(self) -> Arrived:
        """What the last dispatch brought."""
        return Arrived(
            self._part(self.rank, self.places.rows, self.rows_dtype, self.sizes.sent_bytes).flatten(0, 1),
            self._part(self.rank, self.places.scales, torch.float32, 4 * self.sizes.scales).flatten(0, 1)
            if self.sizes.scales else None,
            self._part(self.rank, self.places.slots, torch.int32, 4 * self.sizes.top_k).flatten(0, 1),
            self._part(self.rank, self.places.factors, torch.float32, 4 * self.sizes.top_k).flatten(0, 1),
        )  # fmt: skip

    def bring(self, rows: Tensor, route_rows: Tensor | None, *, weighted: bool, out: Tensor) -> None:
        """Sends rows home and adds up those that come: into `out` [num_tokens, hidden_size].

        Args:
            rows: grouped [ranks * max_tokens, hidden_size]; exact: the row of each route that has its expert here.
            route_rows: exact: [ranks * max_tokens * top_k] int32: where the row of each route is, -1 for none.
            weighted: exact: whether router weights multiply rows as they are added.
            out: to overwrite.

        Raises RuntimeError where a rank did not answer an earlier call.
        """
        if self.launches is None:
            self._bring_on_host(rows, route_rows, weighted, out)
        else:
            from moeyard.cuda.push.launchers import push_back_launch

            self._launch(push_back_launch, rows, route_rows, self.sizes, self.launches, weighted=weighted, out=out)
        self.waiting = False

    def _launch(self, launch: Any, *given: Any, **options: Any) -> None:
        """A launch, unless a rank has not answered an earlier one: that error is told in words."""
        from moeyard.cuda.push.launchers import lost_rank

        try:
            lost = lost_rank(self.launches)
            if lost is None:
                launch(*given, **options)
                return
        except RuntimeError as error:
            lost = lost_rank(self.launches)
            if lost is None:
                raise
            raise RuntimeError(lost) from error
        raise RuntimeError(lost)

    def _part(self, rank: int, offset: int, dtype: torch.dtype, row_bytes: int) -> Tensor:
        """[ranks, max_tokens, ...] of a rank's memory."""
        ranks, tokens = self.sizes.ranks, self.sizes.max_tokens
        part = self.memory[rank][offset : offset + ranks * tokens * row_bytes]
        return part.view(dtype).view(ranks, tokens, row_bytes // dtype.itemsize)

    def _back(self, rank: int, dtype: torch.dtype) -> Tensor:
        """[entries, hidden_size]: rows that come back to a rank."""
        ranks, tokens, top_k, row = self.sizes.ranks, self.sizes.max_tokens, self.sizes.top_k, self.sizes.row_bytes
        entries = tokens * top_k if self.sizes.exact else ranks * tokens
        return self.memory[rank][self.places.back : self.places.back + entries * row].view(dtype).view(entries, -1)

    def _spread_on_host(self, rows: Tensor, scales: Tensor | None, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """What push.cu does."""
        count, top_k, ranks, me = rows.shape[0], self.sizes.top_k, self.sizes.ranks, self.rank
        slots = torch.full((self.sizes.max_tokens, top_k), -1, dtype=torch.int32)
        slots[:count] = slots_of_routes(topk_ids, self.tables, me)
        factors = torch.zeros(slots.shape)
        factors[:count] = topk_weights
        wanted = ranks_of_tokens(slots, self.tables, self.plan)
        for rank in range(ranks):
            self._part(rank, self.places.slots, torch.int32, 4 * top_k)[me] = slots
            self._part(rank, self.places.factors, torch.float32, 4 * top_k)[me] = factors
            if scales is not None:
                self._part(rank, self.places.scales, torch.float32, 4 * self.sizes.scales)[me, :count] = scales
            there = (wanted == rank).any(1)[:count]
            self._part(rank, self.places.rows, rows.dtype, self.sizes.sent_bytes)[me, :count][there] = rows[there]
        bits = torch.where(wanted >= 0, 1 << wanted.clamp(min=0), 0).sum(1)
        masks = self.memory[me][self.places.masks :][: 4 * self.sizes.max_tokens].view(torch.int32)
        masks.copy_(bits)
        self.peers.barrier(0, self.timeout_ms)

    def _bring_on_host(self, rows: Tensor, route_rows: Tensor | None, weighted: bool, out: Tensor) -> None:
        """What push_back.cu does."""
        ranks, tokens, top_k, me = self.sizes.ranks, self.sizes.max_tokens, self.sizes.top_k, self.rank
        slots = self._part(me, self.places.slots, torch.int32, 4 * top_k)
        mine = (self.here[slots.clamp(min=0).long()] >= 0) & (slots >= 0)
        where = torch.arange(ranks * tokens).view(ranks, tokens) if route_rows is None else route_rows.view(ranks, -1)
        sent = mine.any(2) if route_rows is None else where >= 0
        for rank in range(ranks):
            back = self._back(rank, rows.dtype)
            back = back if route_rows is not None else back.view(ranks, tokens, -1)[me]
            back[sent[rank]] = rows[where[rank][sent[rank]].long()]
        self.peers.barrier(1, self.timeout_ms)
        count, back = out.shape[0], self._back(me, rows.dtype)
        masks = self.memory[me][self.places.masks :][: 4 * tokens].view(torch.int32)[:count]
        total = torch.zeros(out.shape)
        if route_rows is None:
            for rank in range(ranks):
                there = (masks >> rank & 1).bool().unsqueeze(1)
                total += torch.where(there, back.view(ranks, tokens, -1)[rank, :count].float(), 0)
        else:
            factors = self._part(me, self.places.factors, torch.float32, 4 * top_k)[me]
            for k in range(top_k):
                row = back.view(tokens, top_k, -1)[:count, k].float()
                row = row * factors[:count, k : k + 1] if weighted else row
                total += torch.where(slots[me, :count, k : k + 1] >= 0, row, 0)
        out.copy_(total)


def refusal_of_pushes(
    ranks: int, top_k: int, hidden_size: int, dtype: torch.dtype, form: RowFormat, max_tokens: int | None
) -> str | None:
    """Why rows of a connection are not pushed, in words."""
    if dtype == torch.float64:
        return "adds in float32, not float64"
    return refusal_of_sizes(push_sizes(ranks, top_k, hidden_size, dtype, form, max_tokens or 1, "grouped"))


def push_sizes(
    ranks: int, top_k: int, hidden_size: int, dtype: torch.dtype, form: RowFormat, max_tokens: int, order: str
) -> PushSizes:
    """What ranks have alike."""
    row = hidden_size * dtype.itemsize
    sent, scales = (hidden_size, hidden_size // form.group) if form.quantised else (row, 0)
    return PushSizes(ranks, max_tokens, top_k, sent, scales, row, order == "exact")


def open_pushes(
    sizes: PushSizes,
    plan: Plan,
    tables: Tables,
    rows_dtype: torch.dtype,
    group: dist.ProcessGroup,
    device: torch.device,
) -> Pushes:
    """The memory of a connection; all ranks call it with equal arguments.

    Raises RuntimeError where GPUs cannot reach each other's memory, or processes are not of one host.
    """
    places, rank, timeout_ms = places_of(sizes), group.rank(), timeout_of(group, device)
    peers = memory_of(places.total, group, device)
    memory = [peers.get_buffer(r, (places.total,), torch.uint8) for r in range(sizes.ranks)]
    memory[rank].zero_()
    here = torch.where(map_of(plan, rank, device) >= 0, 0, -1).int()
    launches = side = None
    if device.type == "cuda":
        launches, side = launch_tables(memory, plan, rank, timeout_ms, device), torch.cuda.Stream(device, priority=-1)
    peers.barrier(1, timeout_ms)
    return Pushes(peers, memory, sizes, places, plan, tables, rank, rows_dtype, launches, side, here, timeout_ms)


def packed_places(plan: Plan) -> tuple[list[list[int]], list[int]]:
    """Of each expert slot and, in the upper 8 bits, share of its replicas, as many for all; and how many there are."""
    found: list[list[int]] = [[] for _ in range(plan.num_experts)]
    number = 0
    for share, part in enumerate(plan.experts):
        for expert in part:
            found[expert].append(number | share << 24)
            number += 1
    most = max(map(len, found))
    return [slots + slots[:1] * (most - len(slots)) for slots in found], list(map(len, found))


def launch_tables(memory: list[Tensor], plan: Plan, rank: int, timeout_ms: int, device: torch.device) -> Any:
    """What launches of a rank on a GPU read beside rows; `memory` is that of all ranks, in their order."""
    from moeyard.cuda.push.launchers import PushTables

    rows, counts = packed_places(plan)
    share = rank // plan.tensor
    return PushTables(
        torch.tensor([part.data_ptr() for part in memory], dtype=torch.int64, device=device), memory[rank].data_ptr(),
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(counts, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, pin_memory=True), rank, plan.tensor,
        sum(map(len, plan.experts[:share])), len(plan.experts[share]), timeout_ms * 10**6,
    )  # fmt: skip
