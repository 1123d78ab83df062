"""How products of experts are launched: pure functions of sizes and of the card."""

import math
from dataclasses import dataclass
from functools import lru_cache

from moeyard.cuda.runtime.cards import RESERVED, Card
from moeyard.cuda.runtime.few import FEW_KERNELS
from moeyard.cuda.runtime.tensor_map import STEP_BYTES

WARPGROUP = 128
_WEIGHT_ROWS = 64
"""Weight rows of a warpgroup's product."""
_SHAPES = {8: (1, 1, 2), 16: (1, 1, 2), 32: (2, 1, 2), 64: (2, 2, 1), 128: (2, 2, 1), 192: (2, 2, 1)}
"""Of a tile's rows: warpgroups that multiply, products of each, blocks that share a multiprocessor at most."""
_ROWS = tuple(_SHAPES)
_MOST_ROWS_IN_BLOCKS = 128
"""Of a tile of codes in blocks: a step's products have sums of their own (multiply_blocks in experts.cu)."""
_TABLE_BITS = 32
"""Of an entry of the table of tiles: the expert, and above it the number of its first tile."""
_ENTRY_BYTES = 4
"""Bytes of an expert in the table of tiles."""
_MOST_STAGES = 12
_ENTRIES_OF_FEW = 512
"""With few kernels tables have room for so many experts, so that stages do not depend on how many there are."""


@dataclass(frozen=True)
class Way:
    """What the products of a layer leave open: `way_of` answers, unless benchmarks and tests do."""

    copied: bool = False
    """Whether rows are put into the order of experts by a launch before the first product, not gathered by cp.async for
    every tile."""
    rows: int = 0
    """Of a tile at most; 0: as many as most experts have."""
    fine: int = 0
    """What multiplied rows of tiles of 128 and more are a multiple of: 16, or 32 where asked. With 32 the compiler
    takes about half the time, and a tile multiplies up to 31 rows that are not there.
    """


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
    fine: int = 0
    """As `Way` says."""

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
    scaled: str = "UNSCALED",
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
    mean = likely / max(1.0, touched(likely, experts))
    deviation = math.sqrt(mean)
    wanted = max(mean + 2 * deviation, min(mean + 4 * deviation, _ROWS[1]))
    few = "experts" in FEW_KERNELS
    heights = (16, 64, 192) if few else _ROWS
    if scaled == "BY_BLOCKS":
        heights = tuple(min(size, _MOST_ROWS_IN_BLOCKS) for size in heights)
    rows = way.rows or next((size for size in heights if wanted <= size), heights[-1])
    entries = (max(experts, _ENTRIES_OF_FEW) if few else min(experts, num_rows)) + 1
    while True:
        groups, tall, most_blocks = _SHAPES[rows]
        for blocks in range(most_blocks, 0, -1):
            room = (card.shared_limit + RESERVED) // blocks - RESERVED
            fixed = shared_bytes(rows, groups, tall, 0, entries, gated, routed, scaled)
            stages = min(_MOST_STAGES, (room - fixed) // (stage_bytes(rows, groups, tall, scaled) + 16))
            if stages >= 3 or (blocks == 1 and stages == 2):
                used = shared_bytes(rows, groups, tall, stages, entries, gated, routed, scaled)
                columns_a_tile = groups * tall * (_WEIGHT_ROWS // 2 if gated else _WEIGHT_ROWS)
                row_tiles = most_tiles(num_rows, experts, rows)
                if row_tiles >= 1 << _TABLE_BITS - max(1, (experts - 1).bit_length()):
                    raise ValueError(f"rows: expected fewer, or fewer experts, got {num_rows} for {experts} experts")
                grid = max(1, min(card.processors * blocks, row_tiles * -(-columns // columns_a_tile)))
                return ProductPlan(
                    rows, groups, tall, stages, blocks, grid, used, "halves" if gated else "pairs", way.fine
                )
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
    rows = num_rows / max(1.0, touched(num_rows, experts))
    enough = rows >= _COPIED_ROWS and columns >= _COPIED_COLUMNS[layer]
    return Way(copied=enough and rows * columns >= _COPIED_RESULTS)


def way_of_codes(num_rows: int, experts: int, columns: int) -> Way:
    """The way of a layer of 8-bit codes. Rows of codes are half as long, and tokens fit the L2 cache: gathering costs 2
    to 3 % less than copying for 1536 and 4096 columns of w13, and 4 % more for 28672 (an H100; the run was not kept).
    """
    rows = num_rows / max(1.0, touched(num_rows, experts))
    return Way(copied=rows >= _COPIED_ROWS and columns >= _COPIED_CODE_COLUMNS)


_COPIED_CODE_COLUMNS = 8192
_COPIED_ROWS, _COPIED_RESULTS = 128, 300_000
"""From how many rows of an expert on, and of how many results of it, rows are copied,"""
_COPIED_COLUMNS = {False: 2048, True: 1280}
"""and from how many columns: of a product alone, or of a layer's first."""


def stage_bytes(rows: int, groups: int, tall: int, scaled: str = "UNSCALED") -> int:
    """128 bytes of the weight rows and of the rows of a tile; with scales of blocks those of the rows."""
    of_scales = 8 * rows if scaled == "BY_BLOCKS" else 0
    return (groups * tall * _WEIGHT_ROWS + rows) * STEP_BYTES + of_scales


def shared_bytes(
    rows: int, groups: int, tall: int, stages: int, entries: int, gated: bool, routed: bool, scaled: str = "UNSCALED"
) -> int:
    """Shared memory of a block, as experts.cu divides it."""
    chunk = min(rows, 32 // tall) * (tall * 64 + 16) if gated and rows <= 128 else 0
    of_rows = groups * rows * 4 * (routed + (scaled == "BY_ROWS"))
    fixed = groups * 2 * chunk + 16 + 256 + of_rows + entries * _ENTRY_BYTES
    return fixed + stages * (stage_bytes(rows, groups, tall, scaled) + 16)


def touched(num_rows: int, experts: int) -> float:
    """How many experts have rows, if each row's is drawn evenly."""
    return -experts * math.expm1(-num_rows / experts) if experts else 0.0


def most_tiles(num_rows: int, experts: int, rows: int) -> int:
    """Tiles of rows that these can be at most, whatever expert they have."""
    return min(num_rows, num_rows // rows + min(experts, num_rows))
