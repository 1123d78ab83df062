"""How the experts of up to some 64 tokens with weights of 4 bits are launched: pure functions of sizes and card."""

from dataclasses import dataclass, replace
from functools import lru_cache

from moeyard.cuda.runtime.cards import RESERVED, WARP, Card
from moeyard.dispatch.sizes import expected_routes
from moeyard.quant import TILE_COLUMNS, TILE_ROWS, QuantScheme

TOGETHER = 8
"""Routes of an expert that are multiplied at once: the columns of a product of tensor cores."""
MOST_TOKENS = 64
_MOST_MEAN = 2 * TOGETHER
"""Routes that an expert has on average, at most: it is read once for every `TOGETHER`."""
_TILE_BYTES = TILE_ROWS * TILE_COLUMNS // 2


@dataclass(frozen=True)
class FourBitSizes:
    """What the kernels are compiled for, besides dtypes and activation."""

    most_routes: int
    """A power of two that is not below the routes of a call."""
    top_k: int
    num_local: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    scheme: QuantScheme
    scale_bytes: int
    """Of one scale."""


@dataclass(frozen=True)
class FourBitPlan:
    """What each warp has under way, and how many tokens' rows a block holds."""

    held_rows: int
    up_steps: int
    """Tiles of 64 columns in a slot of a warp's ring."""
    up_stages: int
    """Slots of a ring."""
    down_steps: int
    down_stages: int
    warps: int = 8

    def up_bytes(self, sizes: FourBitSizes) -> int:
        """Shared memory of a block of the first launch, as four_bits.cu counts."""
        return _fixed(sizes, sizes.hidden_size, self.up_steps, self.held_rows, self.warps) + self.up_stages * (
            self.warps * (slot_bytes(sizes, sizes.hidden_size, self.up_steps) + 8)
        )

    def down_bytes(self, sizes: FourBitSizes) -> int:
        """The same of the second."""
        return _fixed(sizes, sizes.intermediate_size, self.down_steps, self.held_rows, self.warps) + self.down_stages * (
            self.warps * (slot_bytes(sizes, sizes.intermediate_size, self.down_steps) + 8)
        )


def slot_groups(sizes: FourBitSizes, columns: int, steps: int) -> int:
    """Groups of columns that so many tiles touch at most."""
    group = sizes.scheme.block[1] or columns
    return steps * TILE_COLUMNS // group if group <= TILE_COLUMNS else (steps * TILE_COLUMNS + group - 2) // group + 1


def slot_bytes(sizes: FourBitSizes, columns: int, steps: int) -> int:
    """Codes, scales and zero points of a slot."""
    per_group = TILE_ROWS * (sizes.scale_bytes + sizes.scheme.zero_points)
    return steps * _TILE_BYTES + per_group * slot_groups(sizes, columns, steps)


def _fixed(sizes: FourBitSizes, columns: int, steps: int, held: int, warps: int) -> int:
    """Shared memory beside rings: tokens' rows, widened scales, shares of sums, routes."""
    rows = held * (2 * columns + 16 + 4 + 4 * warps)
    scales = warps * slot_groups(sizes, columns, steps) * 4 * TILE_ROWS
    routes = 4 * (4 * sizes.most_routes + 1 + sizes.num_local + 1)
    return rows + scales + warps * 2 * 4 * 4 * WARP + routes


_RING_BYTES, _LEAST_RING_BYTES = 96 << 10, 48 << 10
"""In flight of a multiprocessor: 4.5 TB/s at 1.2 us are 41 KB on 132 of them, and some of a ring is being read."""
_STEPS = (6, 5, 4, 3)
_LEAST_SLOTS, _MOST_SLOTS = 3, 16
_WARPS = 8
_BESIDE_ROUTES = 64
"""Up to so many routes a launch is short, and blocks of both launches stand beside each other on a multiprocessor."""
_LEAST_ROUTES = 4


@lru_cache(maxsize=1024)
def four_bit_plan(sizes: FourBitSizes, card: Card) -> FourBitPlan | None:
    """The launches for these sizes; None where the kernels do not take them."""
    sides = sizes.hidden_size, sizes.intermediate_size
    if not card.clusters or any(side % TILE_COLUMNS for side in sides):
        return None
    both = card.shared_limit - RESERVED
    if sizes.most_routes <= _BESIDE_ROUTES:
        plan = _cut(sizes, TOGETHER, both, _LEAST_RING_BYTES)
        if plan is not None:
            return plan
    for held in (2 * TOGETHER, TOGETHER):
        plan = _cut(sizes, held, 2 * card.shared_limit, 0)
        if plan is not None and max(plan.up_bytes(sizes), plan.down_bytes(sizes)) <= card.shared_limit:
            return plan
    return None


def _cut(sizes: FourBitSizes, held: int, room: int, least: int) -> FourBitPlan | None:
    """Rings of both launches, of `least` bytes at least, that fit `room` with all that is beside them."""
    held, sides = min(held, sizes.most_routes), (sizes.hidden_size, sizes.intermediate_size)
    for steps in _STEPS:
        plan = FourBitPlan(held, steps, 0, steps, 0, _WARPS)
        left = (room - plan.up_bytes(sizes) - plan.down_bytes(sizes)) // 2
        stages = [
            min(_MOST_SLOTS, min(left, _RING_BYTES) // (_WARPS * (slot_bytes(sizes, side, steps) + 8)))
            for side in sides
        ]
        if left >= least and min(stages) >= _LEAST_SLOTS:
            return replace(plan, up_stages=stages[0], down_stages=stages[1])
    return None


def most_routes_of(routes: int) -> int:
    """What `FourBitSizes.most_routes` is for so many."""
    return max(_LEAST_ROUTES, 1 << (routes - 1).bit_length())


def four_bits_are_few(sizes: FourBitSizes, num_tokens: int, num_experts: int, card: Card) -> str | None:
    """Why these launches are not the way for so many tokens, in words; None if they are."""
    if num_tokens > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, got {num_tokens}"
    mean = expected_routes(num_tokens * sizes.top_k, sizes.num_local, num_experts) / sizes.num_local
    if mean > _MOST_MEAN:
        return f"takes up to {_MOST_MEAN} routes per expert on average, got {mean:.0f}"
    if four_bit_plan(sizes, card) is None:
        return f"takes what fits shared memory, got {sizes.hidden_size} and {sizes.intermediate_size} columns of weights"
    return None
