"""Which rank holds which experts, and a placement of them from recorded load.

The placement follows DeepSeek's expert parallelism load balancer (EPLB, github.com/deepseek-ai/EPLB). Replicas go to
the experts with the largest load per replica. Then the heaviest replica goes to the lightest rank that has room.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moeyard.dispatch.checks import check_int
from moeyard.parallel.wire import on_host
from moeyard.values import MAX_EXPERTS


@dataclass(frozen=True, slots=True)
class Plan:
    """Which experts each rank of a process group holds.

    A *slot* is a place for the weights of one expert. Slots are numbered share by share. Without tensor parallelism a
    share is a rank. With it `tensor` neighbouring ranks are one share: each has a slice of all its experts.
    """

    num_experts: int
    """Global number of experts."""
    experts: tuple[tuple[int, ...], ...]
    """By share, the global expert of each slot. Every expert has a slot at least; one with several is replicated."""
    tensor: int = 1
    """Ranks that split the intermediate size of the experts of a share."""

    def __post_init__(self) -> None:
        """Refuses a placement that leaves an expert out, names one that is not there, or has an empty share."""
        check_int("num_experts", self.num_experts, low=1, high=MAX_EXPERTS)
        check_int("tensor", self.tensor, low=1)
        if not isinstance(self.experts, tuple) or not all(isinstance(part, tuple) for part in self.experts):
            raise TypeError("experts: expected a tuple of tuples of expert numbers, one per share")
        if not self.experts or not all(self.experts):
            raise ValueError("experts: expected at least one share, and one expert per share")
        for part in self.experts:
            for expert in part:
                check_int("experts", expert, low=0, high=self.num_experts - 1)
        check_int("num_slots", self.num_slots, low=1, high=MAX_EXPERTS)
        missing = sorted(set(range(self.num_experts)).difference(*self.experts))
        if missing:
            raise ValueError(f"experts: expected a slot for every expert, got none for {missing[:8]}")

    @property
    def num_slots(self) -> int:
        """Slots of all shares."""
        return sum(map(len, self.experts))

    @property
    def ranks(self) -> int:
        """Ranks of the process group."""
        return len(self.experts) * self.tensor

    @property
    def replicas(self) -> tuple[int, ...]:
        """Slots of each expert."""
        counts = [0] * self.num_experts
        for part in self.experts:
            for expert in part:
                counts[expert] += 1
        return tuple(counts)

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """The global experts of a rank, in the order of its weights."""
        check_int("rank", rank, low=0, high=self.ranks - 1)
        return self.experts[rank // self.tensor]

    def loads(self, load: Sequence[float] | Tensor) -> tuple[float, ...]:
        """The load of each share where replicas take equal parts of the load [num_experts] of their expert."""
        counts, numbers = self.replicas, _numbers(load, self.num_experts)
        return tuple(sum(numbers[expert] / counts[expert] for expert in part) for part in self.experts)


def _numbers(load: Sequence[float] | Tensor, num_experts: int | None = None) -> list[float]:
    if isinstance(load, Tensor):
        if load.dim() != 1:
            raise ValueError(f"load: expected a 1-D tensor, got shape {tuple(load.shape)}")
        load = on_host(load.double())
    numbers = [float(number) for number in load]
    if not numbers or (num_experts is not None and len(numbers) != num_experts):
        raise ValueError(f"load: expected one number per expert, got {len(numbers)} numbers")
    if not all(0 <= number < float("inf") for number in numbers):
        raise ValueError("load: expected finite numbers of 0 and above")
    return numbers


def contiguous_plan(num_experts: int, ranks: int, *, tensor: int = 1) -> Plan:
    """The plain placement: neighbouring experts share a rank, the first ranks have one more where it does not divide.

    Args:
        num_experts: global number of experts, at least one per share.
        ranks: of the process group, a multiple of `tensor`.
        tensor: as in `Plan`.
    """
    shares = _shares(ranks, tensor)
    check_int("num_experts", num_experts, low=shares, high=MAX_EXPERTS)
    return Plan(num_experts, _contiguous(num_experts, _default_slots(num_experts, shares)), tensor)


def _shares(ranks: int, tensor: int) -> int:
    check_int("tensor", tensor, low=1)
    check_int("ranks", ranks, low=tensor)
    if ranks % tensor:
        raise ValueError(f"ranks: expected a multiple of tensor={tensor}, got {ranks}")
    return ranks // tensor


def _default_slots(num_experts: int, shares: int) -> list[int]:
    return [num_experts // shares + (share < num_experts % shares) for share in range(shares)]


def _contiguous(num_experts: int, room: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Neighbouring experts side by side, as evenly as the slots of each share allow."""
    counts, left = [0] * len(room), num_experts
    while left:
        for share, slots in enumerate(room):
            if left and counts[share] < slots:
                counts[share] += 1
                left -= 1
    ends = [sum(counts[: share + 1]) for share in range(len(room))]
    return tuple(tuple(range(end - count, end)) for count, end in zip(counts, ends, strict=True))


def plan_experts(
    load: Sequence[float] | Tensor, ranks: int, *, slots: int | Sequence[int] | None = None, tensor: int = 1
) -> Plan:
    """Places and replicates experts by their recorded load, so that the busiest rank has as little as possible.

    Args:
        load: [num_experts] numbers of 0 and above: routes per expert (`moeyard trace` records their ids).
        ranks: of the process group, a multiple of `tensor`.
        slots: the most slots of each share, one number or one per share. Slots beyond `num_experts` hold replicas.
            Unless given, as few as hold every expert, the first shares one more where it does not divide.
        tensor: as in `Plan`.

    Returns a `Plan` in which every expert has a slot. No share has two replicas of one expert unless nothing else fits.
    The largest load of a share is at most that of the contiguous placement without replicas. That placement is returned
    where it is better. The same arguments give the same plan. Raises TypeError or ValueError naming the argument.
    Follows DeepSeek's EPLB (github.com/deepseek-ai/EPLB), its global policy.
    """
    numbers, shares = _numbers(load), _shares(ranks, tensor)
    num_experts = len(numbers)
    if slots is None:
        check_int("ranks", ranks, low=tensor, high=num_experts * tensor)
        room = _default_slots(num_experts, shares)
    else:
        room = [slots] * shares if isinstance(slots, int) else list(slots)
    if len(room) != shares:
        raise ValueError(f"slots: expected one number per share ({shares}), got {len(room)}")
    for most in room:
        check_int("slots", most, low=1, high=MAX_EXPERTS)
    total = sum(room)
    if total < num_experts:
        raise ValueError(f"slots: expected at least {num_experts} slots (one per expert), got {total}")
    counts = _replicate(numbers, min(total, num_experts * shares), shares)
    packed = Plan(num_experts, _pack(numbers, counts, room), tensor)
    if num_experts < shares:
        return packed
    plain = Plan(num_experts, _contiguous(num_experts, room), tensor)
    return packed if max(packed.loads(numbers)) <= max(plain.loads(numbers)) else plain


def _replicate(load: list[float], total: int, most: int) -> list[int]:
    """Slots of each expert: each further one goes where load per replica is largest, ties to the lower expert."""
    counts = [1] * len(load)
    for _ in range(total - len(load)):
        open_experts = [expert for expert, count in enumerate(counts) if count < most]
        counts[max(open_experts, key=lambda expert: (load[expert] / counts[expert], -expert))] += 1
    return counts


def _pack(load: list[float], counts: list[int], room: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The heaviest replica first, each to the lightest share with room that does not hold its expert yet."""
    replicas = [(load[expert] / count, expert) for expert, count in enumerate(counts) for _ in range(count)]
    held: list[list[int]] = [[] for _ in room]
    sums = [0.0] * len(room)
    left = len(replicas)
    for weight, expert in sorted(replicas, key=lambda replica: (-replica[0], replica[1])):
        empty = [share for share, part in enumerate(held) if not part]
        with_room = empty if len(empty) == left else [s for s, part in enumerate(held) if len(part) < room[s]]
        new = [share for share in with_room if expert not in held[share]]
        share = min(new or with_room, key=lambda share: (sums[share], share))
        held[share].append(expert)
        sums[share] += weight
        left -= 1
    return tuple(tuple(sorted(part)) for part in held)


class Tables(NamedTuple):
    """A plan on a device: where the routes of an expert go."""

    slots: Tensor
    """[num_experts, most replicas] int32: the slot of each replica; past an expert's replicas, of its first one."""
    replicas: Tensor
    """[num_experts] int64."""
    shares: Tensor
    """[num_slots] int64: the share of each slot."""

    identity: bool
    """Whether slots are numbered as experts are."""

    @property
    def replicated(self) -> bool:
        """Whether an expert has more than one slot."""
        return self.slots.shape[1] > 1


def tables_of(plan: Plan, device: torch.device) -> Tables:
    """The tables of a plan."""
    found: list[list[int]] = [[] for _ in range(plan.num_experts)]
    shares: list[int] = []
    for share, part in enumerate(plan.experts):
        for expert in part:
            found[expert].append(len(shares))
            shares.append(share)
    most = max(map(len, found))
    rows = [slots + slots[:1] * (most - len(slots)) for slots in found]
    counts = torch.tensor(plan.replicas, device=device)
    slots = torch.tensor(rows, dtype=torch.int32, device=device)
    identity = rows == [[slot] for slot in range(plan.num_experts)]
    return Tables(slots, counts, torch.tensor(shares, device=device), identity)


def map_of(plan: Plan, rank: int, device: torch.device) -> Tensor:
    """[num_slots] int32: the local expert of each slot on a rank, -1 for slots of others; an `expert_map`."""
    share = rank // plan.tensor
    first, count = sum(map(len, plan.experts[:share])), len(plan.experts[share])
    local = [slot - first if first <= slot < first + count else -1 for slot in range(plan.num_slots)]
    return torch.tensor(local, dtype=torch.int32, device=device)


def slots_of_routes(topk_ids: Tensor, tables: Tables, source: int | Tensor) -> Tensor:
    """The slot of each route, [num_tokens, top_k] int32, -1 where ids [num_tokens, top_k] int32 or int64 are dropped.

    Token t of rank `source` goes to replica (source + t) modulo the number of replicas. `source` may also be a tensor,
    [num_tokens], which then is that sum.
    """
    num_experts = tables.replicas.shape[0]
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    ids = torch.where(valid, topk_ids, 0).long()
    if not tables.replicated:
        return torch.where(valid, tables.slots[:, 0][ids], -1)
    if isinstance(source, int):
        source = torch.arange(source, source + ids.shape[0], device=ids.device)
    return torch.where(valid, tables.slots[ids, source.unsqueeze(1) % tables.replicas[ids]], -1)


def ranks_of_tokens(slots: Tensor, tables: Tables, plan: Plan) -> Tensor:
    """The ranks that each token goes to, ascending and each once: [num_tokens, width] int32, -1 fills up.

    Width is `plan.tensor` times the smaller of shares and top_k.
    """
    num_shares, top_k = len(plan.experts), slots.shape[1]
    shares = torch.where(slots >= 0, tables.shares[slots.clamp(min=0).long()], num_shares)
    if num_shares <= top_k:
        there = slots.new_zeros((slots.shape[0], num_shares + 1), dtype=torch.bool).scatter_(1, shares, True)
        found = torch.where(there[:, :-1], torch.arange(num_shares, device=slots.device), -1)
    else:
        found = shares.sort(1).values
        again = torch.nn.functional.pad(found[:, 1:] == found[:, :-1], (1, 0))
        found = torch.where(again | (found == num_shares), -1, found)
    if plan.tensor > 1:
        inner = torch.arange(plan.tensor, device=slots.device)
        found = torch.where(found.unsqueeze(2) >= 0, found.unsqueeze(2) * plan.tensor + inner, -1).flatten(1)
    return found.int()
