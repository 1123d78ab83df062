"""How an alignment is launched: a pure function of sizes and of what the card has."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from moeyard.cuda.runtime.cards import RESERVED, WARP, Card
from moeyard.cuda.runtime.few import FEW_KERNELS

MAX_THREADS = 1024
MAX_ROUNDS = 8
"""Routes that a lane holds in registers at most."""
_REGISTERS, _REGISTERS_A_THREAD = 65536, 64
"""Of a multiprocessor, and what __launch_bounds__ allows cooperative kernels."""
_PARTITIONS = 12
"""Clusters do not span the partitions (GPCs) of a card, of which no card has more: each may leave places empty."""
_MOST_IN_FEW = 262144
"""Routes that 128 blocks place at once."""
CLUSTER = 8
"""Blocks of a cluster: the most that every card with clusters can launch."""


@dataclass(frozen=True)
class AlignPlan:
    """Grid, block and shared memory of one launch of align.cu."""

    exchange: str
    """TINY, ALONE, CLUSTER, GRID or LONG: how blocks learn the counts of routes that they did not count (align.cu)."""
    grid: int
    cluster: int
    threads: int
    warps: int
    """Warps of a block that place routes."""
    rounds: int
    """Routes that each of their lanes holds at a time."""
    tiles: int = 1
    """Times that a block places 32 * warps * rounds routes: 1 unless the exchange is LONG."""

    @property
    def cooperative(self) -> bool:
        """Whether blocks wait for all others, so that they must run at the same time."""
        return self.exchange in ("GRID", "LONG")

    @property
    def tile(self) -> int:
        """Routes that a block places at a time."""
        return WARP * self.warps * self.rounds

    @property
    def places(self) -> int:
        """Routes that the whole grid can place."""
        return self.grid * self.tile * self.tiles

    def shared_bytes(self, experts: int) -> int:
        """Shared memory of a block, as align.cu divides it."""
        if self.exchange == "TINY":
            return 0
        words = 4 + 2 * WARP + (5 + self.warps) * experts + 1 + -(-self.warps * experts // 2)
        if self.cluster > 1:
            words += (self.cluster + 2 * self.cooperative) * experts
        if self.cooperative:
            words += 2 * self.tile
        return -(-4 * words // 16) * 16


@lru_cache(maxsize=4096)
def align_plan(num_routes: int, num_local_experts: int, capacity: int, card: Card) -> AlignPlan:
    """The launch for these sizes. Raises ValueError if the tables of so many experts do not fit the card's blocks.

    The thresholds are the best of what was tried on an H200 at the sizes of bench/workloads/align.toml.
    """
    experts = num_local_experts
    for candidate in _candidates(num_routes, experts, capacity, card):
        if candidate.places >= num_routes and fits(candidate, experts, card):
            return candidate
    raise ValueError(
        f"num_local_experts: expected so few that tables fit {card.shared_limit} bytes of shared memory, got {experts}"
    )


def fits(plan: AlignPlan, experts: int, card: Card) -> bool:
    """Whether the card can launch a plan: shared memory, and for cooperative ones that all blocks run at once."""
    shared = plan.shared_bytes(experts)
    if shared > card.shared_limit:
        return False
    if not plan.cooperative:
        return True
    by_shared = (card.shared_limit + RESERVED) // (shared + RESERVED)
    together = card.processors * min(_REGISTERS // (plan.threads * _REGISTERS_A_THREAD), by_shared)
    return plan.grid <= together - (_PARTITIONS * (plan.cluster - 1) if plan.cluster > 1 else 0)


def _candidates(num_routes: int, experts: int, capacity: int, card: Card) -> Iterator[AlignPlan]:
    """Plans from the best on; those that do not fit or have too few places are passed over."""
    if num_routes <= WARP:
        pieces = -(-experts // WARP) + -(-capacity // WARP) + 1
        yield AlignPlan("TINY", min(-(-pieces // 4), 64), 1, 128, 1, 1)
    elif "align" in FEW_KERNELS and num_routes <= _MOST_IN_FEW:
        yield _in_few(num_routes, experts, card.clusters)
    elif num_routes <= 4096:
        grid, threads = (32, 256) if num_routes <= 2048 else (64, 512)
        yield sized("ALONE", num_routes, grid, 1, threads, experts)
        yield sized("ALONE", num_routes, 128, 1, threads, experts, most_warps=1)
    elif num_routes <= 131072 and card.clusters:
        threads = 256 if num_routes <= 16384 else 512
        yield sized("CLUSTER", num_routes, 64, CLUSTER, threads, experts)
    if card.clusters:
        if experts <= 32:
            yield sized("GRID", num_routes, 256, CLUSTER, 256, experts)
        yield sized("GRID", num_routes, 128, CLUSTER, 256, experts)
        yield sized("GRID", num_routes, 128, CLUSTER, 512, experts, most_warps=16)
    elif num_routes <= 1 << 19:
        yield sized("GRID", num_routes, card.processors, 1, 512, experts, most_warps=16)
    for warps in (16, 8, 4, 2, 1):  # fewer tables where they are long
        for grid, threads in ((2 * card.processors, 512), (card.processors, MAX_THREADS)):
            tiles = -(-max(num_routes, 1) // (grid * warps * WARP * MAX_ROUNDS))
            yield AlignPlan("LONG", grid, 1, _threads_for(experts, threads), warps, MAX_ROUNDS, tiles)


def _in_few(num_routes: int, experts: int, clusters: bool) -> AlignPlan:
    """One of three plans for all routes beyond a warp's that need no barrier of the grid."""
    threads = _threads_for(experts, 512)
    if num_routes <= 4096 or not clusters:
        return AlignPlan("ALONE", 64, 1, threads, 2, 1)
    grid = 64 if num_routes <= 131072 else 128
    return AlignPlan("CLUSTER", grid, CLUSTER, threads, 8, 1 if num_routes <= 16384 else MAX_ROUNDS)


def sized(
    exchange: str, num_routes: int, grid: int, cluster: int, threads: int, experts: int, most_warps: int = 8
) -> AlignPlan:
    """As few rounds as that many warps allow, then as few warps: powers of two, so that few kernels are compiled."""
    batches = -(-num_routes // (grid * WARP))
    rounds = warps = 1
    while rounds < MAX_ROUNDS and batches > rounds * most_warps:
        rounds *= 2
    while warps < most_warps and batches > rounds * warps:
        warps *= 2
    return AlignPlan(exchange, grid, cluster, _threads_for(experts, threads), warps, rounds)


def _threads_for(experts: int, least: int) -> int:
    """At least a thread an expert, as far as a block has them."""
    return min(max(least, -(-experts // WARP) * WARP), MAX_THREADS)


@dataclass(frozen=True)
class BatchedAlignPlan:
    """Grid, block and shared memory of one launch of batched.cu, and what it needs to know of the sizes."""

    grid: int
    threads: int
    shared_bytes: int
    pieces: int
    """Pieces of 4 * threads rows that an expert's padded rows take at most."""
    capacity: int


def batched_align_plan(num_experts: int, max_num_tokens: int, block_size: int, card: Card) -> BatchedAlignPlan:
    """The launch for batches of `max_num_tokens` rows; a block takes pieces, each of one expert's rows."""
    threads = _threads_for(num_experts, 128)
    rows = -(-max_num_tokens // block_size) * block_size
    pieces = max(1, -(-rows // (4 * threads)))
    grid = min(num_experts * pieces, 2 * card.processors)
    return BatchedAlignPlan(grid, threads, 4 * (WARP + 2 * num_experts + 1), pieces, num_experts * rows)
