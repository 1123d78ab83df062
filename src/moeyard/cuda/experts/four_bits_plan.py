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
        return self._bytes(sizes, sizes.hidden_size, self.up_steps, self.up_stages)

    def down_bytes(self, sizes: FourBitSizes) -> int:
        """The same of the second."""
        return self._bytes(sizes, sizes.intermediate_size, self.down_steps, self.down_stages)

    def _bytes(self, sizes: FourBitSizes, columns: int, steps: int, stages: int) -> int:
        ring = stages * self.warps * (slot_bytes(sizes, columns, steps) + 8)
        return ring + _fixed(sizes, columns, steps, self.held_rows, self.warps)


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


_RING_BYTES, _LEAST_RING_BYTES = 128 << 10, 48 << 10
"""In flight of a multiprocessor: 4.5 TB/s at 1.2 us are 41 KB on 132 of them, and some of a ring is being read."""
_STEPS = (8, 6, 5, 4, 3)
"""Tiles of a slot: the more, the fewer instructions its copies and scales take per code."""
_LEAST_SLOTS, _MOST_SLOTS = 3, 16
_WARPS = 8
_BESIDE_ROUTES = 16
"""Up to so many routes a launch is short, and blocks of both launches stand beside each other on a multiprocessor."""
_LEAST_ROUTES = 4


@lru_cache(maxsize=1024)
def four_bit_plan(sizes: FourBitSizes, card: Card) -> FourBitPlan | None:
    """The launches for these sizes; None where the kernels do not take them."""
    sides = sizes.hidden_size, sizes.intermediate_size
    if not card.clusters or any(side % TILE_COLUMNS for side in sides):
        return None
    ways = [(TOGETHER, True)] if sizes.most_routes <= _BESIDE_ROUTES else []
    ways += [(2 * TOGETHER, False), (TOGETHER, False)]
    plans = (_cut(sizes, held, card, beside=beside) for held, beside in ways)
    return next((plan for plan in plans if plan is not None), None)


def _cut(sizes: FourBitSizes, held: int, card: Card, *, beside: bool) -> FourBitPlan | None:
    """Rings that fit with all that is in shared memory with them; None for less than three slots of three steps.

    Blocks `beside` each other share the memory of a multiprocessor, and have rings of 48 KB at least.
    """
    held, sides = min(held, sizes.most_routes), (sizes.hidden_size, sizes.intermediate_size)
    for steps in _STEPS:
        plan = FourBitPlan(held, steps, 0, steps, 0, _WARPS)
        fixed = plan.up_bytes(sizes), plan.down_bytes(sizes)
        left = [card.shared_limit - some for some in fixed]
        if beside:
            left = [(card.shared_limit - RESERVED - sum(fixed)) // 2] * 2
        stages = [
            min(_MOST_SLOTS, min(room, _RING_BYTES) // (_WARPS * (slot_bytes(sizes, side, steps) + 8)))
            for room, side in zip(left, sides, strict=True)
        ]
        if min(left) >= (_LEAST_RING_BYTES if beside else 0) and min(stages) >= _LEAST_SLOTS:
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
        return (
            f"takes what fits shared memory, got {sizes.hidden_size} and {sizes.intermediate_size} columns of weights"
        )
    return None
