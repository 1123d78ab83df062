"""How a product is cut into tiles: pure functions of sizes and card, with nothing tuned and nothing measured."""

from functools import cache
from typing import NamedTuple

from moeyard.dispatch.sizes import power


class Card(NamedTuple):
    """What a plan needs to know of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    """The most shared memory that a block may have."""


PINNED_ROWS = 64
"""Of a tile where results are batch-invariant. Other heights were not timed."""


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
    num_rows: int,
    experts: int,
    columns: int,
    size: int,
    *,
    gated: bool,
    itemsize: int,
    card: Card,
    pinned: bool = False,
) -> Tile:
    """The tile for `num_rows` rows on `experts` experts; `columns` of the result, `size` elements a sum.

    `pinned` asks for a tile that does not depend on `num_rows`, so that one compiled kernel makes every sum of a
    batch-invariant result.

    - Rows: the smallest power of two that holds an expert's mean rows and two standard deviations of a random
      routing. So one row tile reads most weights. 16 to 128 is what the matrix instructions are good for.
    - Up to 64 rows a product is bytes over bandwidth. Tiles are then as narrow as it takes to leave every
      multiprocessor two programs, one of which loads while the other starts or ends; the narrowest, as it takes to
      leave it one. On compute capability 9.0 the weights are the long side, 64, of wgmma; for less than 64 of gate
      or up, and on other cards, mma.sync takes 16 rows at a time.
    - 128 rows are arithmetic. 256 columns (128 each of gate and up) need less traffic through shared memory. But
      they leave a multiprocessor one program, whose start and end nothing hides. They are taken for long sums, and
      where every multiprocessor still has two programs, one after the other.
    - float32 is multiplied without matrix instructions, in tiles whose sums fit into registers.

    Of the result, `rows` depends on `num_rows`, `experts` and `itemsize` alone: one list of tiles serves both products.
    """
    mean = num_rows / experts
    wanted = mean + 2 * mean**0.5
    rows = next((some for some in (16, 32, 64) if wanted <= some), 64 if itemsize > 2 else 128)
    if pinned:
        rows = PINNED_ROWS
    row_tiles = min(num_rows, experts) if mean < rows else num_rows // rows
    halves = 2 if gated else 1
    hopper = card.capability[0] == 9

    def enough(width: int, programs: int = 2) -> bool:
        return row_tiles * -(-columns * halves // width) >= programs * card.multiprocessors

    def tile(width: int, depth: int, warps: int, swapped: bool) -> Tile:
        stages = _stages((rows + width) * depth * itemsize, card.shared_bytes)
        return Tile(rows, width // halves, depth, warps, stages, swapped)

    if itemsize > 2:
        return tile(64, 32, 4, False)
    if rows == 128:
        wide = hopper and size >= 1024 and (pinned or enough(256))
        return tile(256 if wide else 128, 64, 8, False)
    if pinned or rows == 64 or enough(128):
        return tile(128, 64, 4, hopper)
    width = 64 if enough(64, 1) else 32
    return tile(width, 128 if size % 128 == 0 else 64, 4, hopper and width // halves == 64)


@cache
def coded_tile(
    num_rows: int,
    experts: int,
    columns: int,
    size: int,
    *,
    gated: bool,
    stepwise: bool,
    native: bool,
    wide: bool,
    card: Card,
    pinned: bool = False,
) -> Tile:
    """The tile of weights of 8-bit codes: as of 16-bit weights, but 128 codes a step, which is a block of scales.

    `wide` rows are float32, which no matrix instruction multiplies: their tiles are those of float32 weights.

    Sums are at most 128 columns wide, gate and up together. Tall tiles are half as wide where scales count step by
    step, which needs a second sum beside the first. Without wgmma operands lie in registers, too: so are tiles of 64
    rows then, and tiles whose codes are widened before they are multiplied (`native` is False), 64 at a time.
    """
    itemsize = 4 if wide else 2
    like = product_tile(num_rows, experts, columns, size, gated=gated, itemsize=itemsize, card=card, pinned=pinned)
    if wide:
        return like
    hopper = card.capability[0] == 9
    full = (like.rows >= 64 and not hopper and (stepwise or not native)) or (like.rows == 128 and stepwise)
    width = min(like.columns * (2 if gated else 1), 64 if full else 128)
    depth = 64 if full and not stepwise else 128
    stages = _stages((like.rows + width) * depth, card.shared_bytes)
    own = width // 2 if gated else width
    return Tile(like.rows, own, depth, like.warps, stages, like.swapped and own >= 64)


@cache
def four_bit_tile(
    num_rows: int, experts: int, columns: int, size: int, *, gated: bool, scaled: bool, itemsize: int, card: Card,
    widened: bool = False,
) -> Tile:  # fmt: skip
    """The tile of weights of 4 bits: as of 16-bit weights, but 64 columns a step.

    At most 128 weight rows, gate and up together. Tall tiles have half as many where both operands lie in registers,
    and tiles of 32 rows where codes of these are `widened` there. On compute capability 9.0 weights are the long side
    of wgmma, which takes that from registers, where they are widened: 256 rows then, unless a group's sums stand beside
    the others since weights are not `scaled`.
    """
    like = product_tile(num_rows, experts, columns, size, gated=gated, itemsize=itemsize, card=card)
    hopper = card.capability[0] == 9 and itemsize == 2
    most = 64 if like.rows >= (32 if widened else 64) and not hopper else 256 if hopper and scaled else 128
    width = min(like.columns * (2 if gated else 1), most)
    stages = _stages((2 * like.rows * itemsize + width) * 32, card.shared_bytes)
    own = width // 2 if gated else width
    return Tile(like.rows, own, 64, like.warps, stages, hopper and own >= 64)


class OuterTile(NamedTuple):
    """What one program of a sum of outer products computes, and with what."""

    columns: int
    """Columns of the first operand: rows of the result."""
    sizes: int
    """Columns of the second operand."""
    depth: int
    """Rows of an expert at a time."""
    warps: int
    stages: int
    """Of Triton's pipeline."""


_BUFFERS = 4
"""Steps of outer products whose rows are on their way or in use."""
_LARGE = 128 * 128
"""Results of a tile whose sums take the registers of two warpgroups."""


@cache
def outer_tile(experts: int, columns: int, size: int, *, itemsize: int, gathered: bool, card: Card) -> OuterTile:
    """The tile for `experts` sums of [columns, size]; `gathered` rows are found through slots.

    - On compute capability 9.0 128 x 256, whose operands pass shared memory least often, where every multiprocessor
      has two programs, one after the other; else 128 x 128. Other cards hold operands in registers, too: 64 x 128.
    - Narrow results, of biases, have tiles as narrow.
    - float32 is multiplied without matrix instructions, in tiles whose sums fit into registers.

    Triton's pipeline counts a stage for the slots and one for the rows that they lead to: so gathered rows take twice
    as many for as many buffers.
    """
    hopper = card.capability[0] == 9
    tall, wide, depth = (64, 64, 32) if itemsize > 2 else (128 if hopper else 64, 128, 64)
    programs = experts * -(-columns // tall) * -(-size // (2 * wide))
    if hopper and itemsize == 2 and size > wide and programs >= 2 * card.multiprocessors:
        wide *= 2
    wide = min(wide, power(size, 16))
    if columns < tall:
        tall = power(columns, 64 if itemsize == 2 else 16)
    warps = 8 if tall * wide >= _LARGE else 4
    buffers = max(2, min(_BUFFERS, (card.shared_bytes - 4096) // ((tall + wide) * depth * itemsize)))
    return OuterTile(tall, wide, depth, warps, 2 * buffers - 1 if gathered else buffers)


def _stages(step_bytes: int, shared_bytes: int) -> int:
    """Steps in shared memory: one in use, one just used, and 32 KB or two of those on their way, as far as they fit.

    An H200 keeps its memory busy with some 30 KB on their way to each multiprocessor.
    """
    wanted = 2 + max(2, -(-32768 // step_bytes))
    return max(2, min(wanted, (shared_bytes - 1024) // step_bytes))


def most_row_tiles(num_rows: int, experts: int, rows: int) -> int:
    """Row tiles that `num_rows` rows on `experts` experts need at most: one per expert, more by full tiles."""
    touched = min(num_rows, experts)
    return touched + (num_rows - touched) // rows
