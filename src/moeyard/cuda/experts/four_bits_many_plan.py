"""How products of many rows with weights of 4 bits in tiles are launched: pure functions of sizes and card."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from moeyard.cuda.experts.plan import ProductPlan, most_tiles, touched
from moeyard.cuda.runtime.cards import RESERVED, Card
from moeyard.dispatch.sizes import round_up
from moeyard.quant import TILE_COLUMNS, TILE_ROWS, QuantScheme

_SHAPES = {16: (2, 2, 2), 32: (2, 2, 2), 48: (2, 2, 2), 64: (2, 1, 2), 128: (2, 2, 1), 160: (2, 2, 1)}
"""Of a tile's rows: warpgroups that multiply, products of 64 weight rows of each, blocks that share a multiprocessor.

Two blocks have 104 registers for a thread that multiplies, one has 232: for sums and values of two batches."""
_SHAPES_OF_SCALED_SUMS = {16: (2, 2, 2), 32: (2, 1, 2), 48: (2, 1, 2), 64: (2, 2, 1), 128: (2, 2, 1)}
"""The same where a group's products have sums of their own."""
_WEIGHT_ROWS = 64
_STAGE_ALIGNMENT = 1024
_BARRIER_BYTES = 16
"""Of a stage."""
_MOST_STAGES = 12
_STREAMED_ROWS = 32
"""Up to so many rows of a tile an expert's weights are read once, and leave the L2 cache first."""


class Tile(NamedTuple):
    """What a plan leaves open: `many_plan` answers what is 0, unless benchmarks and tests do."""

    rows: int = 0
    """Of a tile at most."""
    tall: int = 0
    """Products of 64 weight rows of a warpgroup."""
    blocks: int = 0
    """That share a multiprocessor."""


PLANNED = Tile()


@dataclass(frozen=True)
class Operand:
    """A matrix per expert as a product reads it: what tiles, scales and rows are."""

    experts: int
    columns: int
    """Of results: half of the weight rows where there is a gate."""
    size: int
    """What is summed over."""
    gated: bool
    scheme: QuantScheme
    scale_bytes: int
    """Of one scale."""
    dtype: torch.dtype
    """Of the rows that are multiplied."""

    @property
    def parts(self) -> int:
        """Groups of a step of 64 columns."""
        width = self.scheme.block[1]
        return TILE_COLUMNS // width if 0 < width < TILE_COLUMNS else 1

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.size // (self.scheme.block[1] or self.size))

    @property
    def scales_weights(self) -> bool:
        """Whether weights are scaled, as a code times its scale is a value of the dtype; else sums of groups are."""
        fits = self.scheme.scales == "e4m3" or (self.scheme.scales == "e8m0" and self.dtype == torch.bfloat16)
        return self.scheme.weights == "e2m1" and fits

    @property
    def tiles(self) -> int:
        """Rows of tiles of an expert."""
        return self.columns * (1 + self.gated) // TILE_ROWS


@lru_cache(maxsize=4096)
def many_plan(
    operand: Operand, num_rows: int, expected: int, routed: bool, card: Card, tile: Tile = PLANNED
) -> ProductPlan:
    """The launch for at most `num_rows` rows, of which `expected` are likely to come.

    As `product_plan`: a tile holds the rows of most experts. The smallest has 16: products of 8 rows take no less. Up
    to 64 rows reading and widening codes are the limit. There two blocks share a multiprocessor, so that four warps per
    scheduler widen. From 128 rows on products are, and sums of 160 rows are what registers hold beside values.
    """
    mean = expected / max(1.0, touched(expected, operand.experts))
    wanted = max(mean + 2 * math.sqrt(mean), 1)
    shapes = _SHAPES if operand.scales_weights else _SHAPES_OF_SCALED_SUMS
    rows = tile.rows or next((size for size in shapes if wanted <= size), max(shapes))
    groups, tall, blocks = shapes[rows]
    tall, blocks = tile.tall or tall, tile.blocks or blocks
    entries = min(operand.experts, num_rows) + 1
    fixed = many_shared_bytes(operand, rows, groups, tall, 0, entries, routed)
    room = (card.shared_limit + RESERVED) // blocks - RESERVED
    stage = many_stage_bytes(operand, rows, groups, tall) + _BARRIER_BYTES
    stages = min(_MOST_STAGES, (room - fixed) // stage)
    if stages < 2:
        raise ValueError(f"experts: expected so few that their table fits {room} bytes, got {operand.experts}")
    columns_a_tile = groups * tall * (_WEIGHT_ROWS // 2 if operand.gated else _WEIGHT_ROWS)
    grid = card.processors * blocks
    grid = max(1, min(grid, most_tiles(num_rows, operand.experts, rows) * -(-operand.columns // columns_a_tile)))
    return ProductPlan(rows, groups, tall, stages, blocks, grid, fixed + stages * stage, "tiles")


def many_stage_bytes(operand: Operand, rows: int, groups: int, tall: int) -> int:
    """Codes, scales and zero points of a tile's weight rows, and 128 bytes of each of its rows."""
    weight_rows = groups * tall * _WEIGHT_ROWS
    scales = operand.parts * (operand.scale_bytes + operand.scheme.zero_points)
    return round_up(weight_rows * (TILE_COLUMNS // 2 + scales), _STAGE_ALIGNMENT) + rows * 2 * TILE_COLUMNS


def many_shared_bytes(
    operand: Operand, rows: int, groups: int, tall: int, stages: int, entries: int, routed: bool
) -> int:
    """Shared memory of a block, as experts.cu divides it."""
    chunk = 16 if rows % (32 // tall) else 32 // tall
    chunk *= (tall * _WEIGHT_ROWS + 16) * operand.gated
    fixed = groups * 2 * chunk + 16 + 256 + groups * rows * 4 * routed + entries * 4
    return fixed + stages * (many_stage_bytes(operand, rows, groups, tall) + _BARRIER_BYTES)


def streams(plan: ProductPlan) -> bool:
    """Whether weights leave the L2 cache first."""
    return plan.rows <= _STREAMED_ROWS
