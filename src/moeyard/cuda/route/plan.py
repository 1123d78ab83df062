"""How routers are launched, alone or with the alignment of few tokens: pure functions of sizes and of the card."""

from dataclasses import dataclass

from moeyard.cuda.align.plan import CLUSTER, AlignPlan, align_plan, sized
from moeyard.cuda.runtime.cards import WARP, Card
from moeyard.cuda.runtime.few import FEW_KERNELS
from moeyard.dispatch.sizes import MOST_FUSED_TOKENS


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
class RouteAlignPlan:
    """How router and alignment share a launch (route_align.cu)."""

    align: AlignPlan
    """How its blocks align."""
    peers: int
    """Blocks that route a part each and post it to the others (a cluster); 1 if every block routes all tokens."""

    @property
    def grid(self) -> int:
        """Blocks of the launch: where each routes all tokens, one more than align, for the weights."""
        return self.align.grid + (self.peers == 1)


def route_align_plan(
    num_tokens: int, top_k: int, num_local_experts: int, capacity: int, card: Card
) -> RouteAlignPlan | None:
    """One launch for router and alignment; None where two are to be made."""
    num_routes = num_tokens * top_k
    if not num_routes or top_k > WARP:
        return None
    if num_routes <= WARP and num_tokens <= 2:
        return RouteAlignPlan(align_plan(num_routes, num_local_experts, capacity, card), 1)
    peers, grid, threads, sized_for = 1, 32, 256 if num_tokens <= 8 else 512, num_routes
    few = "route" in FEW_KERNELS
    if num_tokens > 16 or (few and card.clusters):
        peers, grid = CLUSTER, CLUSTER
    if few:
        threads, sized_for = 512, MOST_FUSED_TOKENS * top_k
    if num_tokens > MOST_FUSED_TOKENS or (peers > 1 and not card.clusters):
        return None
    aligning = sized("ALONE", sized_for, grid, 1, threads, num_local_experts)
    if (
        aligning.places < num_routes
        or aligning.shared_bytes(num_local_experts) + 4 * num_routes > card.shared_limit // 2
    ):
        return None
    return RouteAlignPlan(aligning, peers)
