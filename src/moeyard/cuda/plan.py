"""How an alignment is launched: a pure function of sizes and of what the card has."""

from dataclasses import dataclass
from functools import lru_cache

WARP = 32
ROUNDS = 4
"""As in align.cu: times 32 routes that a warp keeps in registers."""
MAX_THREADS = 1024


@dataclass(frozen=True)
class Card:
    """What a plan depends on."""

    processors: int
    """Multiprocessors."""
    shared_limit: int
    """Bytes of shared memory that a block can have."""
    clusters: bool
    """Whether thread-block clusters can be launched (compute capability 9.0 and later)."""


@dataclass(frozen=True)
class Plan:
    """Grid, block and shared memory of one launch of align.cu."""

    exchange: str
    """SMALL, ALONE, CLUSTER or GRID: how blocks learn the counts of routes that they did not count (align.cu)."""
    grid: int
    cluster: int
    threads: int
    warps: int
    """Warps of a block that place routes."""
    warp_span: int
    """Routes that each of them places: a multiple of 32, at most 32 * ROUNDS unless the exchange is GRID."""

    @property
    def owners(self) -> int:
        """Blocks that write what belongs to one expert."""
        return 1 << (self.grid.bit_length() - 1)

    @property
    def places(self) -> int:
        """Routes that the whole grid can place."""
        return self.grid * self.warps * self.warp_span

    def shared_bytes(self, experts: int) -> int:
        """Shared memory of a block: its warps' tables, six vectors and the warps' sums."""
        words = self.warps * experts + 6 * experts + 1 + WARP
        return -(-4 * words // 16) * 16


@lru_cache(maxsize=4096)
def plan(num_routes: int, num_local_experts: int, capacity: int, card: Card) -> Plan:
    """The launch for these sizes. Raises ValueError if the tables of so many experts do not fit the card's blocks.

    The thresholds are the best of what was tried on an H200 at the sizes of bench/workloads/align.toml.
    """
    experts = num_local_experts
    candidates = []
    if num_routes <= WARP and capacity <= 512:  # one block fills no more slots than that fast enough
        candidates.append(Plan("SMALL", 1, 1, _threads_for(experts, 256), 1, WARP))
    elif num_routes <= 4096:
        grid, threads = (16, 256) if num_routes <= 512 else (32, 256) if num_routes <= 2048 else (64, 512)
        candidates.append(_redundant("ALONE", num_routes, grid, 1, _threads_for(experts, threads)))
    elif num_routes <= 131072 and card.clusters:
        threads = 256 if num_routes <= 16384 else 512
        candidates.append(_redundant("CLUSTER", num_routes, 64, 8, _threads_for(experts, threads)))
    few = experts <= 32 or num_routes >= 1 << 22
    grid, threads = min(128 if few else 64, card.processors), 512 if few else MAX_THREADS
    for warps in (threads // WARP, 8, 4, 2, 1):  # fewer tables where they are long
        span = -(-max(num_routes, 1) // (grid * warps * WARP)) * WARP
        candidates.append(Plan("GRID", grid, 1, _threads_for(experts, threads), warps, span))
    for candidate in candidates:
        if _valid(candidate, experts, card):
            return candidate
    raise ValueError(
        f"num_local_experts: expected so few that tables fit {card.shared_limit} bytes of shared memory, got {experts}"
    )


def _redundant(exchange: str, num_routes: int, grid: int, cluster: int, threads: int) -> Plan:
    """Blocks that count more routes than they place."""
    rounds = -(-num_routes // (grid * WARP))
    warps = min(rounds, 8)
    if rounds > 8 * ROUNDS:
        warps = 16
    return Plan(exchange, grid, cluster, threads, warps, WARP * -(-rounds // warps))


def _threads_for(experts: int, least: int) -> int:
    """At least a thread an expert, as far as a block has them."""
    return min(max(least, -(-experts // WARP) * WARP), MAX_THREADS)


def _valid(candidate: Plan, experts: int, card: Card) -> bool:
    short = candidate.exchange == "GRID" or candidate.warp_span <= WARP * ROUNDS
    return short and candidate.shared_bytes(experts) <= card.shared_limit


def division(divisor: int) -> tuple[int, int]:
    """(magic, shift) such that x // divisor == x * magic >> shift for every x in [0, 2^31), with magic in 32 bits."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift
