"""How a product is cut into tiles: pure functions of sizes and card, with nothing tuned and nothing measured."""

from functools import cache
from typing import NamedTuple


class Card(NamedTuple):
    """What a plan needs to know of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    """The most shared memory that a block may have."""


class Tile(NamedTuple):
    """What one program of the product computes, and with what."""

    rows: int
    """Rows of one expert."""
    columns: int
    """Columns of the result. A gated product computes as many of the gate and of the up half."""
    depth: int
    """Elements along the sum at a time."""
    warps: int
    stages: int
    """Steps along the sum whose loads are on their way or in use."""
    swapped: bool
    """Whether columns are the long side of the matrix instruction (wgmma: 64) and rows the short one."""


@cache
def product_tile(
    num_rows: int, experts: int, columns: int, size: int, *, gated: bool, itemsize: int, card: Card
) -> Tile:
    """The tile for `num_rows` rows on `experts` experts; `columns` of the result, `size` elements a sum.

    - Rows: the smallest power of two that holds the mean rows of an expert and two standard deviations (of a random
      routing), so that an expert's weights are mostly read by one row tile; at least 16, which the matrix
      instructions need, at most 128.
    - Few rows are bytes over bandwidth. Columns are then as many as leave every multiprocessor two programs, since
      one program's start and end are hidden by another's loads; a step along the sum loads 16 KB or more, three
      steps ahead. On compute capability 9 the weights are the 64 rows of wgmma; below 64 of them, and
      on other cards, mma.sync takes 16 rows of tokens.
    - 128 rows are arithmetic. 256 columns (128 of gate and of up) halve the traffic from shared memory that 128
      have; they are taken where that still leaves two rounds of programs.
    """
    mean = num_rows / experts
    wanted = mean + 2 * mean**0.5
    rows = next((size for size in (16, 32, 64) if wanted <= size), 128)
    row_tiles = max(1, min(num_rows, experts) if mean < rows else num_rows // rows)
    halves = 2 if gated else 1
    if itemsize > 2:  # products of float32 are sums of plain multiplications
        rows = min(rows, 64)
        return Tile(rows, 64 // halves, 32, 4, _stages(rows, 64, 32, itemsize, card, 3), False)
    enough = 2 * card.multiprocessors

    def programs(width: int) -> int:
        return row_tiles * -(-columns // (width // halves))

    if rows == 128:
        wide = programs(256) >= enough and card.capability[0] >= 9
        width = 256 if wide else 128
        return Tile(rows, width // halves, 64, 8, _stages(rows, width, 64, itemsize, card, 4 if wide else 3), False)
    width = next((width for width in (128, 64) if programs(width) >= enough), 64)
    depth = 128 if width == 64 and size % 128 == 0 else 64
    swapped = card.capability[0] == 9 and width // halves >= 64
    if rows == 64 and not swapped:
        width, depth = 128, 64
        swapped = card.capability[0] == 9
    return Tile(rows, width // halves, depth, 4, _stages(rows, width, depth, itemsize, card, 4), swapped)


def _stages(rows: int, width: int, depth: int, itemsize: int, card: Card, most: int) -> int:
    """As many steps as fit into shared memory, `most` at most; 2 at least."""
    return max(2, min(most, (card.shared_bytes - 2048) // ((rows + width) * depth * itemsize)))


def most_row_tiles(num_rows: int, experts: int, rows: int) -> int:
    """Row tiles that `num_rows` rows on `experts` experts need at most: one an expert touched, more by full tiles."""
    touched = min(num_rows, experts)
    return touched + (num_rows - touched) // rows
