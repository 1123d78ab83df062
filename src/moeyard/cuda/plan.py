"""How an alignment is launched: a pure function of sizes and of what the card has."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from moeyard.dispatch.sizes import MOST_FUSED_TOKENS

WARP = 32
MAX_THREADS = 1024
MAX_ROUNDS = 8
"""Routes that a lane holds in registers at most."""
_REGISTERS, _REGISTERS_A_THREAD = 65536, 64
"""Of a multiprocessor, and what __launch_bounds__ allows cooperative kernels."""
_RESERVED = 1024
"""Bytes of shared memory that the system keeps of every block's."""
_PARTITIONS = 12
"""Clusters do not span the partitions (GPCs) of a card, of which no card has more: each may leave places empty."""
CLUSTER = 8
"""Blocks of a cluster: the most that every card with clusters can launch."""


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
def plan(num_routes: int, num_local_experts: int, capacity: int, card: Card) -> Plan:
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


def fits(plan: Plan, experts: int, card: Card) -> bool:
    """Whether the card can launch a plan: shared memory, and for cooperative ones that all blocks run at once."""
    shared = plan.shared_bytes(experts)
    if shared > card.shared_limit:
        return False
    if not plan.cooperative:
        return True
    by_shared = (card.shared_limit + _RESERVED) // (shared + _RESERVED)
    together = card.processors * min(_REGISTERS // (plan.threads * _REGISTERS_A_THREAD), by_shared)
    return plan.grid <= together - (_PARTITIONS * (plan.cluster - 1) if plan.cluster > 1 else 0)


def _candidates(num_routes: int, experts: int, capacity: int, card: Card) -> Iterator[Plan]:
    """Plans from the best on; those that do not fit or have too few places are passed over."""
    if num_routes <= WARP:
        pieces = -(-experts // WARP) + -(-capacity // WARP) + 1
        yield Plan("TINY", min(-(-pieces // 4), 64), 1, 128, 1, 1)
    elif num_routes <= 4096:
        grid, threads = (32, 256) if num_routes <= 2048 else (64, 512)
        yield _sized("ALONE", num_routes, grid, 1, threads, experts)
        yield _sized("ALONE", num_routes, 128, 1, threads, experts, most_warps=1)
    elif num_routes <= 131072 and card.clusters:
        threads = 256 if num_routes <= 16384 else 512
        yield _sized("CLUSTER", num_routes, 64, CLUSTER, threads, experts)
    if card.clusters:
        if experts <= 32:
            yield _sized("GRID", num_routes, 256, CLUSTER, 256, experts)
        yield _sized("GRID", num_routes, 128, CLUSTER, 256, experts)
        yield _sized("GRID", num_routes, 128, CLUSTER, 512, experts, most_warps=16)
    elif num_routes <= 1 << 19:
        yield _sized("GRID", num_routes, card.processors, 1, 512, experts, most_warps=16)
    for warps in (16, 8, 4, 2, 1):  # fewer tables where they are long
        for grid, threads in ((2 * card.processors, 512), (card.processors, MAX_THREADS)):
            tiles = -(-max(num_routes, 1) // (grid * warps * WARP * MAX_ROUNDS))
            yield Plan("LONG", grid, 1, _threads_for(experts, threads), warps, MAX_ROUNDS, tiles)


def _sized(
    exchange: str, num_routes: int, grid: int, cluster: int, threads: int, experts: int, most_warps: int = 8
) -> Plan:
    """As few rounds as that many warps allow, then as few warps.

    Warps are a power of two, so that few kernels are compiled, unless tables are long and each warp's takes time.
    """
    batches = -(-num_routes // (grid * WARP))
    rounds = warps = 1
    while rounds < MAX_ROUNDS and batches > rounds * most_warps:
        rounds *= 2
    while warps < most_warps and batches > rounds * warps:
        warps = 2 * warps if experts <= 256 else warps + 1
    return Plan(exchange, grid, cluster, _threads_for(experts, threads), warps, rounds)


def _threads_for(experts: int, least: int) -> int:
    """At least a thread an expert, as far as a block has them."""
    return min(max(least, -(-experts // WARP) * WARP), MAX_THREADS)


def division(divisor: int) -> tuple[int, int]:
    """(magic, shift) such that x // divisor == x * magic >> shift for every x in [0, 2^31), with magic in 32 bits."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift


@dataclass(frozen=True)
class BatchedPlan:
    """Grid, block and shared memory of one launch of batched.cu, and what it needs to know of the sizes."""

    grid: int
    threads: int
    shared_bytes: int
    pieces: int
    """Pieces of 4 * threads rows that an expert's padded rows take at most."""
    capacity: int


def batched_plan(num_experts: int, max_num_tokens: int, block_size: int, card: Card) -> BatchedPlan:
    """The launch for batches of `max_num_tokens` rows: a piece of one expert's rows a block, as far as blocks go."""
    threads = _threads_for(num_experts, 128)
    rows = -(-max_num_tokens // block_size) * block_size
    pieces = max(1, -(-rows // (4 * threads)))
    grid = min(num_experts * pieces, 2 * card.processors)
    return BatchedPlan(grid, threads, 4 * (WARP + 2 * num_experts + 1), pieces, num_experts * rows)


@dataclass(frozen=True)
class RowPlan:
    """How rows are cut for one launch of send.cu, sum.cu or quantize.cu."""

    loads: int
    """Words of a row that a lane has in flight."""
    threads: int
    """Of a block."""
    store: str = "__stcs"
    """How results are written."""
    team: int = WARP
    """Threads that share a row of quantize.cu, where a row has one scale."""


def row_plan(rows: int, words: int, rows_at_once: int) -> RowPlan:
    """A warp a piece: pieces as long as leaves enough warps, `rows_at_once` words of each lane's being in flight."""
    loads = 8
    while loads > 1 and (loads * rows_at_once > 8 or loads * WARP >= 2 * words or rows * words < loads * _ENOUGH_WORDS):
        loads //= 2
    if loads == 8:
        return RowPlan(loads, 1024)
    return RowPlan(loads, 256 if rows * words >= 4 * _ENOUGH_WORDS else 128)


def whole_row_plan(rows: int, words: int) -> RowPlan:
    """A team of threads a row, all of it in registers as far as they go; blocks of several small teams."""
    team = WARP
    while team < 512 and 4 * team < words:
        team *= 2
    loads = min(-(-words // team), 4)
    return RowPlan(loads, max(team, 128 if rows * words >= 4 * _ENOUGH_WORDS else 0), team=team)


_ENOUGH_WORDS = 1 << 16
"""Words of a row each lane of which keeps 2048 warps busy."""


@dataclass(frozen=True)
class RouterPlan:
    """How the lanes of a warp share the experts of a token (route.cu)."""

    lanes_a_group: int
    """A power of two."""
    experts_a_lane: int
    full: bool
    """Whether every lane has as many."""


def router_plan(num_experts: int, num_groups: int) -> RouterPlan | None:
    """The lanes of a warp for so many experts and groups; None if a warp does not hold them."""
    if num_groups > WARP:
        return None
    lanes = WARP
    while lanes * num_groups > WARP:
        lanes //= 2
    group = num_experts // num_groups
    experts = -(-group // lanes)
    if experts > _MOST_EXPERTS_A_LANE:
        return None
    return RouterPlan(lanes, experts, lanes * num_groups == WARP and experts * lanes == group)


_MOST_EXPERTS_A_LANE = 32


@dataclass(frozen=True)
class DecodePlan:
    """How router and alignment share a launch (route_align.cu)."""

    align: Plan
    """How its blocks align."""
    peers: int
    """Blocks that route a part each and post it to the others (a cluster); 1 if every block routes all tokens."""

    @property
    def grid(self) -> int:
        """Blocks of the launch: where each routes all tokens, one more than align, for the weights."""
        return self.align.grid + (self.peers == 1)


def decode_plan(num_tokens: int, top_k: int, num_local_experts: int, capacity: int, card: Card) -> DecodePlan | None:
    """One launch for router and alignment; None where two are to be made."""
    num_routes = num_tokens * top_k
    if not num_routes or top_k > WARP:
        return None
    if num_routes <= WARP and num_tokens <= 2:
        return DecodePlan(plan(num_routes, num_local_experts, capacity, card), 1)
    peers, grid, threads = 1, 32, 256 if num_tokens <= 8 else 512
    if num_tokens > 16:
        peers, grid = CLUSTER, CLUSTER
    if num_tokens > MOST_FUSED_TOKENS or (peers > 1 and not card.clusters):
        return None
    aligning = _sized("ALONE", num_routes, grid, 1, threads, num_local_experts)
    if (
        aligning.places < num_routes
        or aligning.shared_bytes(num_local_experts) + 4 * num_routes > card.shared_limit // 2
    ):
        return None
    return DecodePlan(aligning, peers)
