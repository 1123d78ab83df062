"""Where things lie in the memory of a rank, and how tokens are cut in tiles: functions of what all ranks agree on."""

from typing import NamedTuple

from moeyard.cuda.runtime.cards import WARP, Card


class Cut(NamedTuple):
    """How rows are cut for blocks, lanes and flags. All ranks have the same."""

    threads: int = 256
    """Of a block."""
    word: int = 16
    """Bytes of a store."""
    loads: int = 4
    """Words of a row that a lane sends at a time."""
    part: int = 256
    """Bytes, at a multiple of which each part of the memory begins."""
    tiles: int = 128
    """The most tiles of what a rank dispatches: as many blocks as a card has multiprocessors, or nearly."""
    tiles_back: int = 512
    """The same of one row per token and rank that comes back: so many that sums hide behind rows that are under way."""
    tiles_of_routes: int = 4096
    """The same of a row per route."""
    blocks_beside: int = 48
    """Of a dispatch that leaves multiprocessors to other work: 16 KB on their way in each."""


CUT = Cut()


class PushSizes(NamedTuple):
    """What all ranks have alike."""

    ranks: int
    max_tokens: int
    """Of a rank, in any call."""
    top_k: int
    sent_bytes: int
    """Of a row as it is dispatched, a multiple of 16."""
    scales: int
    """float32 scales beside it."""
    row_bytes: int
    """Of a row as it comes back, a multiple of 16."""
    exact: bool
    """Whether a row per route comes back, else one per token and rank."""


class Places(NamedTuple):
    """Bytes from the beginning of a rank's memory, and tiles. Parts are indexed by source rank and token there."""

    rows: int
    """[ranks, max_tokens, sent_bytes]."""
    scales: int
    """[ranks, max_tokens, scales] float32."""
    slots: int
    """[ranks, max_tokens, top_k] int32, -1 for none."""
    factors: int
    """[ranks, max_tokens, top_k] float32: router weights."""
    back: int
    """Rows that came back: grouped [ranks, max_tokens, row_bytes], by the rank of the experts; exact [max_tokens,
    top_k, row_bytes]."""
    masks: int
    """[max_tokens] int32: the ranks of each of this rank's own tokens, as bits."""
    flags: int
    """[ranks, tiles] int32: epochs of tiles that were dispatched."""
    flags_back: int
    """[ranks, tiles_back] int32."""
    epoch: int
    """One int32: the last dispatch."""
    epoch_back: int
    """Two int32: the last combine, and how many blocks of the current one have ended."""
    total: int
    tile: int
    """Tokens of a tile that is dispatched."""
    tiles: int
    tile_back: int
    tiles_back: int


def places_of(sizes: PushSizes, cut: Cut = CUT) -> Places:
    """Where everything lies, the same on every rank."""
    ranks, tokens, top_k, sent, scales, row, exact = sizes
    tile, tile_back = (-(-tokens // n) for n in (cut.tiles, cut.tiles_of_routes if exact else cut.tiles_back))
    tiles, tiles_back = -(-tokens // tile), -(-tokens // tile_back)
    all_tokens = ranks * tokens
    parts = (
        all_tokens * sent, 4 * all_tokens * scales, 4 * all_tokens * top_k, 4 * all_tokens * top_k,
        (tokens * top_k if exact else all_tokens) * row, 4 * tokens, 4 * ranks * tiles, 4 * ranks * tiles_back, 4, 8,
    )  # fmt: skip
    offsets, total = [], 0
    for size in parts:
        offsets.append(total)
        total += -(-size // cut.part) * cut.part
    return Places(*(*offsets, total, tile, tiles, tile_back, tiles_back))


def push_grid(places: Places, beside: bool) -> int:
    """Blocks of a dispatch: one per tile, as none waits but the first; fewer `beside` other work."""
    return min(places.tiles, CUT.blocks_beside) if beside else places.tiles


def push_shared_bytes(places: Places) -> int:
    """Shared memory of a block: addresses of ranks, then ranks of a tile's tokens."""
    return 8 * WARP + 4 * places.tile


def back_grid(sizes: PushSizes, places: Places, card: Card) -> tuple[int, int]:
    """Blocks of a combine that send, and blocks that add. All are at work at once, two per multiprocessor."""
    return (
        min(max(1, (sizes.ranks - 1) * places.tiles_back), card.processors),
        min(places.tiles_back, card.processors),
    )


def back_shared_bytes(sizes: PushSizes, places: Places) -> int:
    """Shared memory of a block: addresses of ranks, then the row of each place of a tile."""
    return 8 * WARP + 4 * places.tile_back * (sizes.top_k if sizes.exact else 1)


def refusal_of_sizes(sizes: PushSizes) -> str | None:
    """Why kernels do not take such sizes, in words. A rank is a bit of 32, a route a lane of a warp."""
    if sizes.ranks > WARP:
        return f"takes at most {WARP} ranks, got {sizes.ranks}"
    if sizes.top_k > WARP:
        return f"takes at most {WARP} routes of a token, got {sizes.top_k}"
    if sizes.sent_bytes % CUT.word or sizes.row_bytes % CUT.word:
        return f"moves whole words of {CUT.word} bytes, got rows of {sizes.sent_bytes} and {sizes.row_bytes} bytes"
    return None
