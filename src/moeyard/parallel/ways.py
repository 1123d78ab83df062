"""Which way rows take between ranks, and why: a function of sizes that all ranks know alike."""

from typing import NamedTuple

import torch

from moeyard.quant import QuantScheme

ORDERS = ("grouped", "exact")
"""How the rows of a token's experts are added up."""
SYNC_US = 50.0
"""What the all-to-all's exchange of counts and the wait of the host for it are taken to cost; assumed, not measured."""
WIRE_BYTES_PER_US = 300_000.0
"""What a rank is taken to send per microsecond, beyond that; assumed, not measured."""


class Sizes(NamedTuple):
    """What a way is chosen by. All ranks have the same."""

    ranks: int
    shares: int
    """Ranks over ranks that split experts among each other (`Plan`)."""
    top_k: int
    row_bytes: int
    """Bytes of a row as it is sent."""
    order: str
    max_tokens: int | None
    """The most tokens of a rank in any call; None where it is unknown."""
    training: bool
    """Whether gradients flow."""
    unpushed: str | None = None
    """Why kernels that push rows do not take them, in words."""


class WayExplanation(NamedTuple):
    """Which way calls take, and why not the other."""

    chosen: str
    reasons: dict[str, str]
    """By way."""
    rows: str
    """How rows are sent, in words."""

    def __str__(self) -> str:
        lines = [f"experts in parallel: {self.chosen}", *(f"  {way}: {why}" for way, why in self.reasons.items())]
        return "\n".join([*lines, f"  rows: {self.rows}"])


_NO_MAX_TOKENS = "needs the most tokens of a rank ahead (max_tokens)"


def _of_fixed_sizes(sizes: Sizes) -> str | None:
    if sizes.order == "exact":
        return "has one row per token and rank, order='exact' needs one per route"
    if sizes.max_tokens is None:
        return _NO_MAX_TOKENS
    return None


def _too_wasteful(sizes: Sizes) -> str | None:
    assert sizes.max_tokens is not None
    useless = (1 - 1 / sizes.shares) ** sizes.top_k * (sizes.ranks - 1) * sizes.max_tokens * sizes.row_bytes
    if useless <= SYNC_US * WIRE_BYTES_PER_US:
        return None
    return (
        f"would send {useless / 1e6:.1f} MB per rank to ranks that do not want them, which takes longer than the "
        f"{SYNC_US:.0f} us of an exchange of counts"
    )


def choose_way(sizes: Sizes, way: str, rows: str) -> WayExplanation:
    """The way of a call: one of `WAYS`, or the one of these that "auto" takes.

    pushed: a kernel writes each row into memory of the ranks that want it, which are of one host; sizes are fixed.
    symmetric: every rank copies its tokens into memory of all ranks, which are of one host; sizes are fixed.
    gathered: every rank gets all tokens of all ranks; nothing is read back, and all shapes are fixed by `max_tokens`.
    all_to_all: a token goes to the ranks that have one of its experts; the host waits for the counts of each call.
    Raises ValueError for a way that refuses.
    """
    if way not in ("auto", *WAYS):
        raise ValueError(f"way: expected one of {('auto', *WAYS)}, got {way!r}")
    fixed, untrained = _of_fixed_sizes(sizes), "has no gradients (training=True)" if sizes.training else None
    ahead = None if sizes.max_tokens is not None else _NO_MAX_TOKENS
    grouped = "has gradients of grouped sums alone" if sizes.training and sizes.order == "exact" else None
    refusals = {"pushed": ahead or grouped or sizes.unpushed, "symmetric": fixed or untrained, "gathered": fixed}
    refused = refusals.get(way)
    if refused:
        raise ValueError(f"way: {way!r} {refused}")
    if way != "auto":
        return WayExplanation(way, {name: "asked for" if name == way else "not asked for" for name in WAYS}, rows)
    reasons = {name: refusals[name] or _BY_NAME[name] for name in _BY_NAME}
    refused = fixed or _too_wasteful(sizes)
    if refused:
        return WayExplanation("all_to_all", {**reasons, "gathered": refused, "all_to_all": "chosen"}, rows)
    return WayExplanation("gathered", {**reasons, "gathered": "chosen", "all_to_all": "comes after gathered"}, rows)


WAYS = ("pushed", "symmetric", "gathered", "all_to_all")
_BY_NAME = {
    "pushed": "only chosen by name: it is for ranks of one host, and has not run on GPUs yet",
    "symmetric": "only chosen by name: it is for ranks of one host, and was not timed yet",
}


class RowFormat(NamedTuple):
    """How rows of hidden states are sent."""

    quantised: bool
    """As float8_e4m3fn with float32 scales; else in their dtype."""
    group: int
    """Columns that share a scale."""
    words: str


def format_of_rows(
    scheme: QuantScheme | None, hidden_size: int, dtype: torch.dtype, weight_on_input: bool, send_codes: bool
) -> RowFormat:
    """How rows are sent: quantised where every expert would quantise them alike, by e4m3 per row or per 128 columns."""
    name = str(dtype).removeprefix("torch.")
    if scheme is None or scheme.activations == "none":
        return RowFormat(False, hidden_size, f"as {name}, which experts take")
    if not send_codes:
        return RowFormat(False, hidden_size, f"as {name}: asked for (send_codes=False)")
    group = scheme.activation_group or hidden_size
    if scheme.activations != "e4m3" or scheme.activation_group not in (0, 128) or hidden_size % group:
        return RowFormat(False, hidden_size, f"as {name}: nothing here quantises rows by {str(scheme)!r} as they move")
    if scheme.static:
        return RowFormat(False, hidden_size, f"as {name}: every expert has a scale of its own")
    if weight_on_input:
        return RowFormat(False, hidden_size, f"as {name}: router weights multiply them before they are quantised")
    return RowFormat(True, group, f"as e4m3 with a float32 scale per {group} columns, as experts would quantise them")


def bytes_of_row(form: RowFormat, hidden_size: int, top_k: int, dtype: torch.dtype) -> int:
    """Bytes that a token takes on its way to experts: its row, its scales, its slots and router weights."""
    row = hidden_size + 4 * (hidden_size // form.group) if form.quantised else hidden_size * dtype.itemsize
    return row + 8 * top_k
