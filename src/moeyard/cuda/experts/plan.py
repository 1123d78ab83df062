"""How products of experts, and the experts of a few tokens, are launched: pure functions of sizes and of the card."""

import math
from dataclasses import dataclass
from functools import lru_cache

from moeyard.cuda.runtime.cards import RESERVED, WARP, Card
from moeyard.cuda.runtime.tensor_map import STEP_VALUES

WARPGROUP = 128
_WEIGHT_ROWS = 64
"""Weight rows of a warpgroup's product."""
_SHAPES = {8: (1, 1, 2), 16: (1, 1, 2), 32: (2, 1, 2), 64: (2, 2, 1), 128: (2, 2, 1), 192: (2, 2, 1)}
"""Of a tile's rows: warpgroups that multiply, products of each, blocks that share a multiprocessor at most."""
_ROWS = tuple(_SHAPES)
_TABLE_BITS = 32
"""Of an entry of the table of tiles: the expert, and above it the number of its first tile."""
_ENTRY_BYTES = 4
"""Bytes of an expert in the table of tiles."""
_MOST_STAGES = 12


@dataclass(frozen=True)
class Way:
    """What the products of a layer leave open: `way_of` answers, unless benchmarks and tests do."""

    copied: bool = False
    """Whether rows are put into the order of experts by a launch before the first product, not gathered by cp.async for
    every tile."""
    rows: int = 0
    """Of a tile at most; 0: as many as most experts have."""


@dataclass(frozen=True)
class ProductPlan:
    """Tile, stages and grid of one launch of experts.cu."""

    rows: int
    """Rows of a tile at most."""
    groups: int
    """Warpgroups that multiply."""
    tall: int
    """Products of 64 weight rows that each of them has under way."""
    stages: int
    blocks: int
    """Blocks that share a multiprocessor."""
    grid: int
    shared_bytes: int
    turn: str
    """How weight rows lie in a stage (`weight_boxes` in tensor_map.py)."""

    @property
    def threads(self) -> int:
        """One more warpgroup loads."""
        return WARPGROUP * (1 + self.groups)

    @property
    def weight_rows(self) -> int:
        """Weight rows of a tile."""
        return _WEIGHT_ROWS * self.groups * self.tall

    @property
    def box(self) -> int:
        """Rows of a box."""
        return self.rows if self.rows <= 16 else 16 if self.rows <= 64 else 32

    @property
    def streams(self) -> bool:
        """Whether weights are read so little at a time that it matters how the L2 cache takes them.

        Weights may leave the cache first, and no more than the 128 bytes of a row that are asked for are brought. With
        that, blocks of one multiplying warpgroup read up to 3 % quicker, and blocks of two up to 3 % slower.
        """
        return self.groups == 1


@lru_cache(maxsize=4096)
def product_plan(
    num_rows: int,
    experts: int,
    columns: int,
    gated: bool,
    routed: bool,
    card: Card,
    way: Way | None = None,
    expected_rows: int | None = None,
) -> ProductPlan:
    """The launch for so many rows, spread over so many experts, each with weights of so many columns of results.

    `num_rows` come at most, and `expected_rows` are likely to, all unless given: of the routes of all ranks an
    expert-parallel rank has its share. `routed` says that blocks keep the routes of a tile's rows.

    How many rows an expert has is not known on the host. A tile holds the rows of most experts if they are spread
    evenly at random, mean plus two standard deviations: then weights are read once. More than that costs nothing but
    stages, since a tile multiplies only rows that are there. Less has weights read again, from the L2 cache as a rule.
    The smallest tiles have to hold four deviations: 16 rows take next to no longer, and less where routing is skewed.

    Up to 16 rows the limit is the reading of weights: blocks are small, two to a multiprocessor, so that one reads
    while the other writes results, and the last round leaves little undone. With more rows it is also what rows take
    of the L2 cache's bandwidth: a tile reads all its rows for every 64 values of its weight rows. So tiles get
    taller, 128 weight rows for 32 rows and 256 from 64 rows on. At 192 rows the sums of two warpgroups fill the
    registers: 56 KiB per stage for 1536 cycles of products.
    """
    way = way or Way()
    likely = num_rows if expected_rows is None else expected_rows
    mean = likely / max(1.0, _touched(likely, experts))
    deviation = math.sqrt(mean)
    wanted = max(mean + 2 * deviation, min(mean + 4 * deviation, _ROWS[1]))
    rows = way.rows or next((size for size in _ROWS if wanted <= size), _ROWS[-1])
    entries = min(experts, num_rows) + 1
    while True:
        groups, tall, most_blocks = _SHAPES[rows]
        for blocks in range(most_blocks, 0, -1):
            room = (card.shared_limit + RESERVED) // blocks - RESERVED
            fixed = shared_bytes(rows, groups, tall, 0, entries, gated, routed)
            stages = min(_MOST_STAGES, (room - fixed) // (stage_bytes(rows, groups, tall) + 16))
            if stages >= 3 or (blocks == 1 and stages == 2):
                used = shared_bytes(rows, groups, tall, stages, entries, gated, routed)
                columns_a_tile = groups * tall * (_WEIGHT_ROWS // 2 if gated else _WEIGHT_ROWS)
                row_tiles = _most_tiles(num_rows, experts, rows)
                if row_tiles >= 1 << _TABLE_BITS - max(1, (experts - 1).bit_length()):
                    raise ValueError(f"rows: expected fewer, or fewer experts, got {num_rows} for {experts} experts")
                grid = max(1, min(card.processors * blocks, row_tiles * -(-columns // columns_a_tile)))
                return ProductPlan(rows, groups, tall, stages, blocks, grid, used, "halves" if gated else "pairs")
        if rows == _ROWS[0]:
            raise ValueError(f"experts: expected so few that their table fits {card.shared_limit} bytes, got {experts}")
        rows = max(size for size in _ROWS if size < rows)


@lru_cache(maxsize=4096)
def way_of(num_rows: int, experts: int, columns: int, layer: bool = True) -> Way:
    """The way of a layer, or of one product, with so many columns of weights in the first; `num_rows` are expected.

    Where products are the limit, gathering by `cp.async` takes 5 to 10 % of their time, which grows with the columns of
    the weights; copying costs a row's bytes written and read once. Where reading weights is the limit gathering costs
    nothing. benchmarks/results/h200/prefill_ways.json has both for five models. A product alone, `layer` false, also
    pays for finding where its rows come from.
    """
    rows = num_rows / max(1.0, _touched(num_rows, experts))
    enough = rows >= _COPIED_ROWS and columns >= _COPIED_COLUMNS[layer]
    return Way(copied=enough and rows * columns >= _COPIED_RESULTS)


_COPIED_ROWS, _COPIED_RESULTS = 128, 300_000
"""From how many rows of an expert on, and of how many results of it, rows are copied,"""
_COPIED_COLUMNS = {False: 2048, True: 1280}
"""and from how many columns: of a product alone, or of a layer's first."""


def stage_bytes(rows: int, groups: int, tall: int) -> int:
    """64 values of the weight rows and of the rows of a tile."""
    return (groups * tall * _WEIGHT_ROWS + rows) * STEP_VALUES * 2


def shared_bytes(rows: int, groups: int, tall: int, stages: int, entries: int, gated: bool, routed: bool) -> int:
    """Shared memory of a block, as experts.cu divides it."""
    chunk = min(rows, 32 // tall) * (tall * 64 + 16) if gated and rows <= 128 else 0
    fixed = groups * 2 * chunk + 16 + 256 + (groups * rows * 4 if routed else 0) + entries * _ENTRY_BYTES
    return fixed + stages * (stage_bytes(rows, groups, tall) + 16)


def _touched(num_rows: int, experts: int) -> float:
    """How many experts have rows, if each row's is drawn evenly."""
    return -experts * math.expm1(-num_rows / experts) if experts else 0.0


def _most_tiles(num_rows: int, experts: int, rows: int) -> int:
    """Tiles of rows that these can be at most, whatever expert they have."""
    return min(num_rows, num_rows // rows + min(experts, num_rows))


# A few tokens

WORD = 8
"""Values of 16 bits in what a lane reads at once."""


@dataclass(frozen=True)
class ExpertSizes:
    """What the kernels are compiled for, besides dtypes and activation."""

    num_tokens: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool

    @property
    def num_routes(self) -> int:
        """Routes of the batch, dropped ones included."""
        return self.num_tokens * self.top_k

    @property
    def weight_bytes(self) -> int:
        """What all routes read, each its own expert's weights."""
        return 2 * self.num_routes * (2 + self.gated) * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class FewTokensPlan:
    """How units are shared among warps, and what each warp has under way."""

    warps: int
    """Of a block; a block a multiprocessor."""
    up_segment: int
    """Words of 16 bytes of a row of w13 (gated: of gate and up each) that one slot of a warp's ring holds."""
    up_stages: int
    """Slots of a ring."""
    down_segment: int
    """The same for w2."""
    down_stages: int
    down_rows: int
    """Consecutive rows of w2 that a slot holds; above 1 only whole ones."""
    trigger: int = 6
    """Copies that a warp has yet to make when it lets the second launch be placed."""
    evict_first: bool = True
    """Whether weights may leave the L2 cache first."""

    def up_bytes(self, sizes: ExpertSizes) -> int:
        """Shared memory of a block of the first launch, as few_tokens.cu counts: rings, tokens, routes."""
        ring = self.warps * self.up_stages * _up_slot(self.up_segment, sizes)
        return ring + _up_vectors(sizes) + _ROUTES_BYTES + 8 * (self.warps * self.up_stages + 1)

    def down_bytes(self, sizes: ExpertSizes) -> int:
        """The same of the second."""
        ring = self.warps * self.down_stages * 16 * self.down_rows * self.down_segment
        return ring + _down_vectors(sizes) + _ROUTES_BYTES + 8 * (self.warps * self.down_stages + sizes.num_routes)


_ROUTES_BYTES = 4 * (3 * WARP + 34)
_BARRIER_BYTES = 8 * (16 * 16 + WARP)
_RING_BYTES = 96 << 10
"""In flight of a multiprocessor: 4.5 TB/s at 1.2 us are 41 KB on 132 of them, and some of a ring is being read."""
_ENOUGH_RING_BYTES = 56 << 10
_LEAST_RING_BYTES = 32 << 10
_LITTLE_BYTES = 192 << 10
"""Of weights that a multiprocessor reads: two rings."""
_WARPS = (8, 4)
"""Of a block; where it reads little."""
_MOST_SLOTS = 16
_SEGMENT_WORDS = 128
"""Words of a copy at most, as far as copies are not whole rows anyway."""
_LEAST_COPY_BYTES, _MOST_ROWS = 1024, 4
_MOST_VALUES = 1 << 16
"""Of a row: counts of units times blocks stay within 32 bits."""


@lru_cache(maxsize=1024)
def few_tokens_plan(
    sizes: ExpertSizes,
    card: Card,
    share: float = 1.0,
    *,
    warps: int | None = None,
    segment: int = _SEGMENT_WORDS,
    ring_bytes: int | None = None,
    trigger: int = 6,
    evict_first: bool = True,
) -> FewTokensPlan | None:
    """The launches for these sizes; None where the kernels do not take them.

    Where a multiprocessor reads little altogether (a tensor-parallel shard at one token) filling and draining rings is
    most of the time: few warps with short rings then take 9.3 us instead of 12.8. Elsewhere short rings cost up to
    a third (benchmarks/results/h200/decode_plans.json, which `trigger` comes from as well). `share` is that of all
    experts which are here, and so of all routes.

    They take rows of whole words (16 bytes) and at most 32 routes. Both launches stand beside each other on a
    multiprocessor and need shared memory there for rings, tokens [T, H] and activations [T * K, I].
    """
    sides = (sizes.hidden_size, sizes.intermediate_size)
    if not 1 <= sizes.num_routes <= WARP or any(s < WORD or s % WORD or s > _MOST_VALUES for s in sides):
        return None
    if not card.clusters:
        return None
    little = share * sizes.weight_bytes <= _LITTLE_BYTES * card.processors
    warps = warps or _WARPS[little]
    ring_bytes = ring_bytes or (_LEAST_RING_BYTES if little else _RING_BYTES)
    made = [_cut(sizes, card, warps, words, ring_bytes) for words in (segment, segment // 2)]
    for fewest in (3, 2):
        for cut in made:
            if min(cut[1], cut[3]) >= fewest:
                return FewTokensPlan(warps, *cut, trigger, evict_first)
    return None


def _cut(sizes: ExpertSizes, card: Card, warps: int, segment: int, ring_bytes: int) -> tuple[int, int, int, int, int]:
    """Segments of at most so many words and slots of a warp, of both launches; rows of a slot of the second."""
    both = card.shared_limit - RESERVED - 2 * (_ROUTES_BYTES + _BARRIER_BYTES)
    left = both - _up_vectors(sizes) - _down_vectors(sizes)
    up_segment = segment_of(sizes.hidden_size // WORD, segment)
    up_step = warps * _up_slot(up_segment, sizes)
    up_stages = _slots(min(ring_bytes, left - min(left // 2, _ENOUGH_RING_BYTES)), up_step)
    whole = sizes.intermediate_size // WORD
    down_segment = segment_of(whole, segment)
    rows = 1
    while down_segment == whole and 16 * whole * rows < _LEAST_COPY_BYTES and rows < _MOST_ROWS:
        units = sizes.num_tokens * sizes.hidden_size // (2 * rows)
        if units < card.processors * (warps - 1):  # as long as every warp has one
            break
        rows *= 2
    down_step = warps * 16 * rows * down_segment
    return up_segment, up_stages, down_segment, _slots(min(ring_bytes, left - up_stages * up_step), down_step), rows


def _slots(room: int, step: int) -> int:
    """Slots of every warp that fit."""
    return max(0, min(_MOST_SLOTS, room // step))


def segment_of(words: int, most: int) -> int:
    """Words of a segment: as many as make the fewest, equal ones; but for a whole row, whole lines of 128 bytes."""
    pieces = -(-words // most)
    return words if pieces == 1 else min(most, -(-words // (pieces * WORD)) * WORD)


def _up_slot(segment: int, sizes: ExpertSizes) -> int:
    return 16 * segment * (1 + sizes.gated)


def _up_vectors(sizes: ExpertSizes) -> int:
    return 2 * sizes.num_tokens * sizes.hidden_size


def _down_vectors(sizes: ExpertSizes) -> int:
    return 2 * sizes.num_routes * sizes.intermediate_size


def few_tokens_are_quicker(sizes: ExpertSizes, num_experts: int, card: Card, share: float = 1.0) -> bool:
    """Whether these two launches are the quicker way for 16-bit weights: a pure function of sizes and card.

    A route reads its expert's weights whether or not another route of the batch has read them: at one token that is
    the least possible. With more it costs the bytes of experts that tokens share, on average over even routings. That
    must be less than what a layout, a combination and tiles that are mostly empty take. Only routes to experts that
    are here read weights: the `share` of `num_experts`.
    """
    if few_tokens_plan(sizes, card, share) is None or sizes.top_k > num_experts:
        return False
    missed = (1 - sizes.top_k / num_experts) ** sizes.num_tokens
    repeated = sizes.num_routes - num_experts * (1 - missed)
    expert_bytes = 2 * (2 + sizes.gated) * sizes.hidden_size * sizes.intermediate_size
    return share * repeated * expert_bytes <= _MOST_REPEATED_BYTES * card.processors


_MOST_REPEATED_BYTES = 90_000
"""A multiprocessor: 12 MB on 132, some 3 us."""


def down_room(plan: FewTokensPlan, sizes: ExpertSizes, card: Card) -> int:
    """Shared memory that a block of the second launch asks for.

    Where there is room, more than half of what a multiprocessor has: two of its blocks on one, beside a block of the
    first launch that is about to end, would leave another multiprocessor without.
    """
    needed, whole = plan.down_bytes(sizes), card.shared_limit + RESERVED
    spread = -(-(whole // 2 - RESERVED + 1) // 128) * 128
    fits = spread + plan.up_bytes(sizes) + 2 * RESERVED <= whole
    return max(needed, spread) if fits else needed
