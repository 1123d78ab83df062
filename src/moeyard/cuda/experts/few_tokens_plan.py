"""How the experts of a few tokens are launched: pure functions of sizes and of the card."""

from dataclasses import dataclass, replace
from functools import lru_cache

from moeyard.cuda.runtime.cards import RESERVED, WARP, Card
from moeyard.quant import QuantScheme, blocks_of

WORD = 8
"""Values in what a lane reads of a row at once: 16 bytes of 16-bit weights, 8 of codes."""
_COPY_BYTES = 16
"""Copies are of so many bytes, or a multiple."""


@dataclass(frozen=True)
class ExpertSizes:
    """What the kernels are compiled for, besides dtypes and activation."""

    num_tokens: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    scheme: QuantScheme | None = None
    """How weights are quantised, in 8 bits; None: they have 16."""
    block_start: int = 0
    """Where in a block of a larger matrix rows of w13 and columns of w2 begin (`ExpertScales.block_start`)."""

    @property
    def num_routes(self) -> int:
        """Routes of the batch, dropped ones included."""
        return self.num_tokens * self.top_k

    @property
    def weight_bytes(self) -> int:
        """What all routes read, each its own expert's weights."""
        return self.num_routes * self.expert_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert's weights."""
        return self.itemsize * (2 + self.gated) * self.hidden_size * self.intermediate_size

    @property
    def rows_are_whole(self) -> bool:
        """Whether copies can bring rows of weights."""
        return not any(size * self.itemsize % _COPY_BYTES for size in (self.hidden_size, self.intermediate_size))

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 2 if self.scheme is None else 1

    @property
    def word_bytes(self) -> int:
        """Bytes of `WORD` weights."""
        return WORD * self.itemsize


@dataclass(frozen=True)
class FewTokensPlan:
    """How units are shared among warps, and what each warp has under way."""

    warps: int
    """Of a block; a block a multiprocessor."""
    up_segment: int
    """Words of a row of w13 (gated: of gate and up each) that one slot of a warp's ring holds."""
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

    def up_bytes(self, sizes: ExpertSizes, card: Card) -> int:
        """Shared memory of a block of the first launch, as few_tokens.cu counts: rings, tokens, routes, scales."""
        ring = self.warps * self.up_stages * _up_slot(self.up_segment, sizes)
        fixed = _up_vectors(sizes, card) + _ROUTES_BYTES + _up_scale_bytes(sizes, card, self.warps)
        return ring + fixed + 8 * (self.warps * self.up_stages + 1)

    def down_bytes(self, sizes: ExpertSizes, card: Card) -> int:
        """The same of the second."""
        ring = self.warps * self.down_stages * sizes.word_bytes * self.down_rows * self.down_segment
        fixed = _down_vectors(sizes, card, self.down_rows) + _ROUTES_BYTES
        fixed += _down_scale_bytes(sizes, card, self.warps, self.down_rows)
        return ring + fixed + 8 * (self.warps * self.down_stages + sizes.num_routes)


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
"""Words of 16 bytes of a copy at most, as far as copies are not whole rows anyway."""
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

    They take rows of whole 16 bytes and at most 32 routes. Both launches stand beside each other on a multiprocessor
    and need shared memory there for rings, tokens [T, H] and activations [T * K, I]. `segment` counts 16 bytes.
    """
    sides = (sizes.hidden_size, sizes.intermediate_size)
    if (
        not 1 <= sizes.num_routes <= WARP
        or not sizes.rows_are_whole
        or not 1 <= min(sides) <= max(sides) <= _MOST_VALUES
    ):
        return None
    if not card.clusters or sizes.block_start % WORD:
        return None
    little = share * sizes.weight_bytes <= _LITTLE_BYTES * card.processors
    warps = warps or _WARPS[little]
    ring_bytes = ring_bytes or (_LEAST_RING_BYTES if little else _RING_BYTES)
    words = segment * _COPY_BYTES // sizes.word_bytes
    made = [_cut(sizes, card, warps, most, ring_bytes) for most in (words, words // 2)]
    for fewest in (3, 2):
        for cut in made:
            if min(cut[1], cut[3]) >= fewest:
                return FewTokensPlan(warps, *cut, trigger, evict_first)
    return None


def _cut(sizes: ExpertSizes, card: Card, warps: int, segment: int, ring_bytes: int) -> tuple[int, int, int, int, int]:
    """Segments of at most so many words and slots of a warp, of both launches; rows of a slot of the second."""
    both = card.shared_limit - RESERVED - 2 * (_ROUTES_BYTES + _BARRIER_BYTES)
    rows = _down_rows(sizes, card, warps, segment)
    left = both - _up_vectors(sizes, card) - _down_vectors(sizes, card, rows)
    left -= _up_scale_bytes(sizes, card, warps) + _down_scale_bytes(sizes, card, warps, rows)
    up_segment = segment_of(sizes.hidden_size // WORD, segment)
    up_step = warps * _up_slot(up_segment, sizes)
    up_stages = _slots(min(ring_bytes, left - min(left // 2, _ENOUGH_RING_BYTES)), up_step)
    down_segment = segment_of(sizes.intermediate_size // WORD, segment)
    down_step = warps * sizes.word_bytes * rows * down_segment
    return up_segment, up_stages, down_segment, _slots(min(ring_bytes, left - up_stages * up_step), down_step), rows


def _down_rows(sizes: ExpertSizes, card: Card, warps: int, segment: int) -> int:
    """Rows of a slot of the second launch: short ones come several at a time."""
    whole, rows = sizes.intermediate_size // WORD, 1
    while whole <= segment and sizes.word_bytes * whole * rows < _LEAST_COPY_BYTES and rows < _MOST_ROWS:
        units = sizes.num_tokens * sizes.hidden_size // (2 * rows)
        if units < card.processors * (warps - 1):  # as long as every warp has one
            break
        rows *= 2
    return rows


def _slots(room: int, step: int) -> int:
    """Slots of every warp that fit."""
    return max(0, min(_MOST_SLOTS, room // step))


def segment_of(words: int, most: int) -> int:
    """Words of a segment: as many as make the fewest, equal ones; but for a whole row, whole lines of 128 bytes."""
    pieces = -(-words // most)
    return words if pieces == 1 else min(most, -(-words // (pieces * WORD)) * WORD)


def _up_slot(segment: int, sizes: ExpertSizes) -> int:
    return sizes.word_bytes * segment * (1 + sizes.gated)


def _up_vectors(sizes: ExpertSizes, card: Card) -> int:
    return 2 * _up_held(sizes, card) * sizes.hidden_size


def _down_vectors(sizes: ExpertSizes, card: Card, rows: int) -> int:
    return 2 * _down_held(sizes, card, rows) * sizes.intermediate_size


def _up_held(sizes: ExpertSizes, card: Card) -> int:
    """Rows that a block of the first launch holds: all, or those of its own routes, which may differ in scales."""
    return sizes.num_tokens if sizes.scheme is None else _up_units(sizes, card)[1]


def _up_units(sizes: ExpertSizes, card: Card) -> tuple[int, int]:
    """Units of a block of the first launch at most, and the routes that they belong to."""
    units = -(-sizes.num_routes * sizes.intermediate_size // card.processors)
    return units, _touched(units, sizes.intermediate_size, sizes.num_routes)


def _down_units(sizes: ExpertSizes, card: Card, rows: int) -> tuple[int, int]:
    """The same of the second: units of so many rows, and the tokens."""
    units_a_token = sizes.hidden_size // rows
    units = -(-sizes.num_tokens * units_a_token // card.processors)
    return units, _touched(units, units_a_token, sizes.num_tokens)


def _touched(units: int, run: int, runs: int) -> int:
    """Runs of `run` units that so many neighbours touch at most."""
    return min(runs, (units + run - 2) // run + 1)


def _down_held(sizes: ExpertSizes, card: Card, rows: int) -> int:
    return sizes.num_routes if sizes.scheme is None else _down_units(sizes, card, rows)[1] * sizes.top_k


def _up_scale_bytes(sizes: ExpertSizes, card: Card, warps: int) -> int:
    """Scales of weights and rows, and the largest magnitude that each warp finds of each row."""
    if sizes.scheme is None:
        return 0
    columns = blocks_of(sizes.hidden_size, sizes.scheme.block[1])
    weights = _scale_rows(sizes.scheme, *_up_units(sizes, card)) * (1 + sizes.gated) * columns
    groups = blocks_of(sizes.hidden_size, sizes.scheme.activation_group)
    return 4 * (weights + _up_held(sizes, card) * (groups + warps))


def _down_scale_bytes(sizes: ExpertSizes, card: Card, warps: int, rows: int) -> int:
    if sizes.scheme is None:
        return 0
    units, tokens = _down_units(sizes, card, rows)
    columns = blocks_of(sizes.intermediate_size, sizes.scheme.block[1], sizes.block_start)
    weights = _scale_rows(sizes.scheme, units * rows, tokens) * sizes.top_k * columns
    groups = blocks_of(sizes.intermediate_size, sizes.scheme.activation_group, sizes.block_start)
    return 4 * (weights + _down_held(sizes, card, rows) * (groups + warps))


def _scale_rows(scheme: QuantScheme, rows: int, matrices: int) -> int:
    """Rows of scales that so many neighbouring weight rows of so many matrices touch at most."""
    share = scheme.block[0]
    return matrices if share == 0 else rows if share == 1 else rows // share + 2 * matrices


def few_tokens_are_quicker(sizes: ExpertSizes, num_experts: int, card: Card, share: float = 1.0) -> bool:
    """Whether these two launches are the quicker way: a pure function of sizes and card.

    A route reads its expert's weights whether or not another route of the batch has read them: at one token that is
    the least possible. With more it costs the bytes of experts that tokens share, on average over even routings. That
    must be less than what a layout, a combination and tiles that are mostly empty take. Only routes to experts that
    are here read weights: the `share` of `num_experts`.
    """
    if few_tokens_plan(sizes, card, share) is None or sizes.top_k > num_experts:
        return False
    missed = (1 - sizes.top_k / num_experts) ** sizes.num_tokens
    repeated = sizes.num_routes - num_experts * (1 - missed)
    return share * repeated * sizes.expert_bytes <= _MOST_REPEATED_BYTES * card.processors


@lru_cache(maxsize=1024)
def most_tokens(sizes: ExpertSizes, num_experts: int, card: Card, share: float) -> int:
    """The most tokens of such sizes for which these launches are the quicker way."""
    counts = range(1, WARP // sizes.top_k + 1)
    return max(
        (n for n in counts if few_tokens_are_quicker(replace(sizes, num_tokens=n), num_experts, card, share)), default=0
    )


_MOST_REPEATED_BYTES = 90_000
"""A multiprocessor: 12 MB on 132, some 3 us."""


def down_room(plan: FewTokensPlan, sizes: ExpertSizes, card: Card) -> int:
    """Shared memory that a block of the second launch asks for.

    Where there is room, more than half of what a multiprocessor has: two of its blocks on one, beside a block of the
    first launch that is about to end, would leave another multiprocessor without.
    """
    needed, whole = plan.down_bytes(sizes, card), card.shared_limit + RESERVED
    spread = -(-(whole // 2 - RESERVED + 1) // 128) * 128
    fits = spread + plan.up_bytes(sizes, card) + 2 * RESERVED <= whole
    return max(needed, spread) if fits else needed
