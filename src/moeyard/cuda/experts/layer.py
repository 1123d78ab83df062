"""The launches of a layer on Hopper, prepared once per sizes: a call allocates once and fills in addresses."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from moeyard.cuda.align.launchers import prepare_align
from moeyard.cuda.experts.plan import Way
from moeyard.cuda.experts.product import TURNS, prepare_product
from moeyard.cuda.rows.launchers import permute_ready, sum_ready
from moeyard.cuda.runtime.chain import NOTHING, Chain, Step
from moeyard.cuda.runtime.ready import Ready
from moeyard.cuda.runtime.tensor_map import row_maps, weight_maps
from moeyard.dispatch.sizes import expected_routes, round_up
from moeyard.values import Activation

_LINE = 256
"""Bytes: where parts of a layer's memory begin."""


class LayerSizes(NamedTuple):
    """What the launches of a layer depend on: plain values, by which they are kept."""

    num_tokens: int
    top_k: int
    experts: int
    columns: int
    """Rows of w13."""
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    id_dtype: torch.dtype
    activation: Activation
    gated: bool
    biased: tuple[bool, bool]
    num_experts: int
    mapped: bool
    ids_aligned: bool
    """Whether ids begin at a multiple of 16 bytes."""
    out_bits: int
    """The address of the result modulo 16."""
    out_lent: bool
    """Whether the result may hold the table of experts until it is written."""
    way: Way
    device: int


class LayerLaunches(NamedTuple):
    """Launches, and where the memory between them lies: bytes from the first on.

    What the activation leaves, [routes, intermediate_size], lies at 0.
    """

    num_bytes: int
    rows: int
    """[routes, hidden_size]: rows in the order of experts where they are copied, then those of the second product."""
    slots: int
    """[routes] int32: sorted_token_ids."""
    blocks: int
    """[routes] int32: expert_ids, which nothing reads, in what the activation leaves."""
    route_rows: int
    table: int | None
    """[experts + 1] int64 first rows, [experts] int32 counts, and how many rows there are; None: in the result."""
    counts: int
    """Where counts lie in the table."""
    total: int
    """Where the number of rows lies there."""
    exchange: int
    """What blocks of an alignment tell each other."""
    chain: Chain
    up: Callable[[int], bytes]
    """The map of w13 at an address."""
    copied: Callable[[int], bytes] | None
    """That of rows in the order of experts; None where rows are gathered."""
    down: Callable[[int], bytes]
    """That of w2."""
    middle: Callable[[int], bytes]
    """That of what the activation leaves."""

    def start(
        self, ids: int, mapping: int, source: int, w13: int, w2: int, b13: int, b2: int, factors: int, memory: int,
        result: int, barrier: int,
    ) -> None:  # fmt: skip
        """Starts all on what lies at these addresses, 0 for what there is not."""
        rows = memory + self.rows
        table = result if self.table is None else memory + self.table
        up = self.up(w13)
        boxes = up if self.copied is None else self.copied(rows)  # where rows are gathered it is not read
        self.chain(
            up, boxes, self.down(w2), self.middle(memory), ids, mapping, source, b13, b2, factors, memory, rows,
            memory + self.slots, memory + self.blocks, memory + self.route_rows, table, table + self.counts,
            table + self.total, memory + self.exchange, barrier, barrier + TURNS, result,
        )  # fmt: skip


_MAPS = ("up", "boxes", "down", "boxes of middle")
_NAMES = (
    "ids", "mapping", "source", "b13", "b2", "factors", "middle", "rows", "slots", "blocks", "route rows", "offsets",
    "counts", "total", "exchange", "barrier", "turns", "result",
)  # fmt: skip
"""What a call of a layer gives, in this order."""


def layer_launches(sizes: LayerSizes) -> LayerLaunches:
    """Those of such a layer, made at its first call.

    The memory is that of the rows of both products, and beside it a word or two per route and the table. Slots lie
    where the first product, which alone reads them, writes nothing. `expert_ids`, which nothing reads, lie behind room
    for slots in what the activation leaves.
    """
    found: LayerLaunches = _READY.get(sizes) or _READY.add(sizes, _prepare(sizes))
    return found


_READY = Ready(1024)


def _prepare(sizes: LayerSizes) -> LayerLaunches:
    n, dtype, item = sizes.num_tokens * sizes.top_k, sizes.dtype, sizes.dtype.itemsize
    way, device, weighs = sizes.way, sizes.device, dtype == torch.float16
    expected = expected_routes(n, sizes.experts, sizes.num_experts)
    launch, shape, words = prepare_align(
        n, sizes.num_experts, sizes.experts, n, 1, sizes.id_dtype, not sizes.mapped, sizes.ids_aligned, False, device,
        None, True,
    )  # fmt: skip
    ends = [0]

    def place(num_bytes: int) -> int:
        begin = ends[0]
        ends[0] = round_up(begin + num_bytes, _LINE)
        return begin

    middle, rows = place(n * sizes.intermediate_size * item), place(n * sizes.hidden_size * item)
    slots = place(4 * n) if weighs else middle if way.copied else rows
    route_rows = place(4 * n)
    counts = 8 * (sizes.experts + 1)
    total = counts + 4 * sizes.experts
    needed = total + 4
    lent = sizes.out_lent and needed <= sizes.num_tokens * sizes.hidden_size * item
    table, exchange = None if lent else place(needed), place(4 * words)
    row_bytes = sizes.hidden_size * item
    common = (way, expected, device, dtype, ("UNSCALED", False), False, False)
    first, first_shape, plan = prepare_product(
        (n, sizes.intermediate_size), sizes.experts, sizes.hidden_size, dtype, not way.copied,
        1 if way.copied else sizes.top_k, True, False, sizes.activation, sizes.gated, not sizes.biased[0], way.copied,
        *common,
    )  # fmt: skip
    second, second_shape, other = prepare_product(
        (n, sizes.hidden_size), sizes.experts, sizes.intermediate_size, dtype, False, 1, not weighs, False, None,
        False, not sizes.biased[1], True, *common,
    )  # fmt: skip
    adding = sum_ready(
        "MAPPED", "int", weighs, 0, sizes.top_k, (0, row_bytes), sizes.num_tokens, row_bytes, sizes.out_bits, dtype,
        device, True,
    )  # fmt: skip
    factors = "factors" if weighs else NOTHING
    steps = [
        Step(launch, shape, (
            "ids", "mapping", "slots", "blocks", "total", "offsets", "counts", "route rows", "exchange", "barrier"
        )),
        Step(first, first_shape, (
            "rows" if way.copied else "source", "b13", NOTHING, NOTHING if way.copied else "slots", "offsets", "counts",
            "middle", "turns",
        ), ("up", "boxes")),
        Step(second, second_shape, (
            "middle", "b2", factors, "slots" if weighs else NOTHING, "offsets", "counts", "rows", "turns"
        ), ("down", "boxes of middle")),
        Step(*adding, ("rows", "route rows", NOTHING if weighs else "factors", NOTHING, "result")),
    ]  # fmt: skip
    copied = None
    if way.copied:
        permute = permute_ready(sizes.num_tokens, sizes.top_k, row_bytes, row_bytes, 0, device, True)
        steps.insert(1, Step(*permute, ("source", "route rows", "rows", NOTHING, NOTHING)))
        copied = row_maps(n, sizes.hidden_size, dtype, plan.box)
    w13 = (sizes.experts, sizes.columns, sizes.hidden_size, dtype, plan.weight_rows, plan.turn, not plan.streams)
    w2 = (sizes.experts, sizes.hidden_size, sizes.intermediate_size, dtype, other.weight_rows, other.turn)
    return LayerLaunches(
        ends[0], rows, slots, 4 * n, route_rows, table, counts, total, exchange,
        Chain(device, _MAPS, _NAMES, steps), weight_maps(*w13), copied, weight_maps(*w2, not other.streams),
        row_maps(n, sizes.intermediate_size, dtype, other.box),
    )  # fmt: skip
