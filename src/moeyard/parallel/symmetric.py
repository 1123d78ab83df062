"""Memory of every rank that all ranks of a host write to: rows are copied into place, without a collective.

On GPUs it is torch's symmetric memory, by plain loads and stores over NVLink, never multicast. On a CPU it is a file in
memory that the processes of a host map.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moeyard.parallel.wire import gather, on_host

_ALIGNMENT = 256
_NAME_BYTES = 256
_MEMORY = "/dev/shm"  # noqa: S108 - mkstemp makes a file that nobody else has


class Peers(Protocol):
    """What torch's symmetric memory (`torch.distributed._symmetric_memory.rendezvous`) offers, as far as it is used."""

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        """Memory of a rank as a tensor that begins `storage_offset` elements behind its start."""

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """All ranks wait for each other, a GPU on its current stream; an error after a timeout that is not 0."""


class Part(NamedTuple):
    """What each rank has a place for in the memory of every rank: [max_tokens, *row] of a dtype."""

    row: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True, eq=False)
class Window:
    """The memory of one connection: parts of a dispatch, then one for what comes back.

    Dispatch and combine take turns, with a barrier each. So one buffer of each kind is enough. A rank that has passed
    the barrier of a combine knows that all experts have read what was dispatched. One that has passed the next barrier
    of a dispatch knows that all have read what came back.
    """

    peers: Peers
    rank: int
    views: list[list[Tensor]]
    """By part and rank: [ranks, max_tokens, *row] in the memory of that rank."""
    timeout_ms: int
    waiting: bool = False
    """Whether what was dispatched last has not come back yet."""

    def spread(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Copies parts [up to max_tokens, ...] to all ranks; returns those of all ranks, [ranks * max_tokens, ...].

        What is returned lies in the window until the next call. Rows that a rank has not sent are what they were.
        """
        if self.waiting:
            raise ValueError("connection: expected a combine after each dispatch, as both share memory, got a dispatch")
        for part, views in zip(parts, self.views[:-1], strict=True):
            for rank in self._in_turn():
                views[rank][self.rank, : part.shape[0]].copy_(part)
        self.peers.barrier(0, self.timeout_ms)
        self.waiting = True
        return [views[self.rank].flatten(0, 1) for views in self.views[:-1]]

    def bring(self, rows: Tensor) -> Tensor:
        """Copies `rows[r]` of rows [ranks, max_tokens, ...] to rank r; returns what each rank sent, of that shape."""
        views = self.views[-1]
        for rank in self._in_turn():
            views[rank][self.rank].copy_(rows[rank])
        self.peers.barrier(1, self.timeout_ms)
        self.waiting = False
        return views[self.rank]

    def _in_turn(self) -> list[int]:
        """The ranks behind this one first, itself last: so not all write to one at once."""
        ranks = len(self.views[0])
        return [(self.rank + step) % ranks for step in range(1, ranks + 1)]


def open_window(parts: Sequence[Part], max_tokens: int, group: dist.ProcessGroup, device: torch.device) -> Window:
    """Memory for parts of a dispatch and, as the last one, of a combine; all ranks call it with equal arguments.

    Raises RuntimeError where GPUs cannot reach each other's memory, or processes are not of one host.
    """
    ranks, offsets, total = group.size(), [], 0
    for part in parts:
        offsets.append(total)
        size = ranks * max_tokens * math.prod(part.row) * part.dtype.itemsize
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    peers = memory_of(total, group, device)
    views = [
        [
            peers.get_buffer(rank, (ranks, max_tokens, *part.row), part.dtype, offset // part.dtype.itemsize)
            for rank in range(ranks)
        ]
        for part, offset in zip(parts, offsets, strict=True)
    ]
    for own in views:
        own[group.rank()].zero_()
    timeout_ms = timeout_of(group, device)
    peers.barrier(1, timeout_ms)
    return Window(peers, group.rank(), views, timeout_ms)


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> int:
    """After how many milliseconds a rank of a group that does not answer is an error."""
    backend: Any = group._get_backend(device)
    return int(backend.options._timeout.total_seconds() * 1000)


def memory_of(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Peers:
    """So many bytes on every rank of a group, which all of them reach; all ranks call it."""
    return _card_peers(num_bytes, group, device) if device.type == "cuda" else HostPeers(num_bytes, group)


def _card_peers(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Peers:
    from torch.distributed import _symmetric_memory  # which some builds of torch have not

    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # which torch would set up, and nothing here uses
    memory = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    peers: Any = _symmetric_memory.rendezvous(memory, group.group_name)
    return CardPeers(peers, memory)


class CardPeers(NamedTuple):
    """torch's symmetric memory, and the tensor that keeps it."""

    handle: Any
    memory: Tensor

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        """As in `Peers`."""
        buffer: Tensor = self.handle.get_buffer(rank, tuple(sizes), dtype, storage_offset)
        return buffer

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """As in `Peers`: flags in the memory of the GPUs."""
        self.handle.barrier(channel, timeout_ms)


class HostPeers:
    """Files in memory of the processes of one host."""

    def __init__(self, num_bytes: int, group: dist.ProcessGroup) -> None:
        """Makes a file of this rank, and maps those of all."""
        self._group = group
        place = _MEMORY if Path(_MEMORY).is_dir() else None
        number, name = tempfile.mkstemp(prefix=f"moeyard-{os.getpid()}-", dir=place)
        os.truncate(number, num_bytes)
        os.close(number)
        mine = torch.zeros(_NAME_BYTES, dtype=torch.uint8)
        mine[: len(name)] = torch.tensor(list(name.encode()), dtype=torch.uint8)
        try:
            rows = on_host(gather(mine, group.size(), group).view(-1, _NAME_BYTES))
            names = [bytes(row).rstrip(b"\0").decode() for row in rows]
            self._memory = [torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8) for name in names]
            self.barrier()
        finally:
            Path(name).unlink()

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        """As in `Peers`."""
        first = storage_offset * dtype.itemsize
        return self._memory[rank][first : first + math.prod(sizes) * dtype.itemsize].view(dtype).view(*sizes)

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:  # noqa: ARG002 - the group has a timeout
        """As in `Peers`."""
        dist.barrier(group=self._group)
