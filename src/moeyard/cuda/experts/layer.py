"""The launches of a layer on Hopper, prepared once per sizes: a call allocates once and fills in addresses."""

from typing import Any, NamedTuple

import torch

from moeyard.cuda.align.launchers import prepare_align
from moeyard.cuda.experts.plan import ProductPlan, Way
from moeyard.cuda.experts.product import prepare_product
from moeyard.cuda.rows.launchers import permute_ready, sum_ready
from moeyard.cuda.runtime.ready import Ready
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
    """Launches, each with its shape, and where the memory between them lies: bytes from the first on.

    What the activation leaves, [routes, intermediate_size], lies at 0.
    """

    num_bytes: int
    rows: int
    """[routes, hidden_size]: rows in the order of experts where they are copied, then those of the second product."""
    slots: int
    """[routes] int32: sorted_token_ids."""
    route_rows: int
    table: int | None
    """[experts + 1] int64 first rows, [experts] int32 counts, and how many rows there are; None: in the result."""
    exchange: int
    """What blocks of an alignment tell each other."""
    align: tuple[Any, Any]
    permute: tuple[Any, Any] | None
    first: tuple[Any, Any, ProductPlan]
    second: tuple[Any, Any, ProductPlan]
    sum: tuple[Any, Any]


def layer_launches(sizes: LayerSizes) -> LayerLaunches:
    """Those of such a layer, made at its first call.

    The memory is that of the rows of both products, and beside it a word or two per route and the table. Slots lie
    where the first product, which alone reads them, writes nothing. `expert_ids`, which nothing reads, lie in what the
    activation leaves (`blocks_of`).
    """
    found: LayerLaunches = _READY.get(sizes) or _READY.add(sizes, _prepare(sizes))
    return found


_READY = Ready(1024)


def table_bytes(experts: int) -> tuple[int, int, int]:
    """Where counts and the number of rows lie in the table, and its bytes."""
    counts = 8 * (experts + 1)
    return counts, counts + 4 * experts, counts + 4 * experts + 4


def blocks_of(num_routes: int) -> int:
    """Where `expert_ids` lie: behind room for slots."""
    return 4 * num_routes


def _prepare(sizes: LayerSizes) -> LayerLaunches:
    n, item = sizes.num_tokens * sizes.top_k, sizes.dtype.itemsize
    way, device, weighs = sizes.way, sizes.device, sizes.dtype == torch.float16
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
    needed = table_bytes(sizes.experts)[2]
    lent = sizes.out_lent and needed <= sizes.num_tokens * sizes.hidden_size * item
    table, exchange = None if lent else place(needed), place(4 * words)
    row_bytes = sizes.hidden_size * item
    common = (way, expected, device, sizes.dtype, ("UNSCALED", False), False, False)
    first = prepare_product(
        (n, sizes.intermediate_size), sizes.experts, sizes.hidden_size, sizes.dtype, not way.copied,
        1 if way.copied else sizes.top_k, True, False, sizes.activation, sizes.gated, not sizes.biased[0], way.copied,
        *common,
    )  # fmt: skip
    second = prepare_product(
        (n, sizes.hidden_size), sizes.experts, sizes.intermediate_size, sizes.dtype, False, 1, not weighs, False, None,
        False, not sizes.biased[1], True, *common,
    )  # fmt: skip
    permute = None
    if way.copied:
        permute = permute_ready(sizes.num_tokens, sizes.top_k, row_bytes, row_bytes, 0, device, True)
    total = sum_ready(
        "MAPPED", "int", weighs, 0, sizes.top_k, (0, row_bytes), sizes.num_tokens, row_bytes, sizes.out_bits,
        sizes.dtype, device, True,
    )  # fmt: skip
    return LayerLaunches(
        ends[0], rows, slots, route_rows, table, exchange, (launch, shape), permute, first, second, total
    )
