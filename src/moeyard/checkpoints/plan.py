"""What a load reads, and where each part of it goes: one `Unit` per tensor, or per expert of a stacked one."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from moeyard.checkpoints.files import DTYPES, Entry, Span
from moeyard.checkpoints.layer import Layer
from moeyard.checkpoints.names import Linear
from moeyard.checkpoints.packing import Stored


class Share(NamedTuple):
    """What of a layer a rank has."""

    first_expert: int
    num_experts: int
    start: int
    """The first of its rows of gate and up, and of its columns of w2."""
    size: int
    """How many."""

    @property
    def stop(self) -> int:
        """Behind the last."""
        return self.start + self.size


class Unit(NamedTuple):
    """Bytes that are read at once, and what is done with them."""

    span: Span
    target: Tensor | None
    """Where the bytes go as they are: contiguous, uint8. None: to a buffer, and from there by `apply`."""
    apply: Callable[[Tensor], None] | None = None
    """Takes the bytes, on the device."""


class Pick(NamedTuple):
    """Rows along N that are read, and which of them go to which half of the result (0, or 1 for up)."""

    first: int
    stop: int
    halves: tuple[tuple[int, slice], ...]


class Cut(NamedTuple):
    """A part of a stored matrix of n x k values, and its place."""

    n: int
    k: int
    picks: tuple[Pick, ...]
    columns: tuple[int, int]


def blocks_in(start: int, stop: int, block: int) -> tuple[int, int]:
    """The blocks that rows or columns start to stop touch: the first, and the one behind the last."""
    return (0, 1) if not block else (start // block, -(-stop // block))


def cut_of(layer: Layer, share: Share, part: str, block: tuple[int, int], where: str) -> Cut:
    """What a rank needs of a matrix whose values each stand for a block of the weight; (1, 1): the weight."""
    hidden_size, size = layer.hidden_size, layer.intermediate_size
    every = slice(None)
    if part == "down":
        n, k = blocks_in(0, hidden_size, block[0])[1], blocks_in(0, size, block[1])[1]
        return Cut(n, k, (Pick(0, n, ((0, every),)),), blocks_in(share.start, share.stop, block[1]))
    k = blocks_in(0, hidden_size, block[1])[1]
    first, stop = blocks_in(share.start, share.stop, block[0])
    n = blocks_in(0, size, block[0])[1]
    if part != "gate_up":
        half = int(part == "up" and layer.gated)
        return Cut(n, k, (Pick(first, stop, ((half, every),)),), (0, k))
    if not block[0]:
        return Cut(1, k, (Pick(0, 1, ((0, every), (1, every))),), (0, k))
    if block[0] > 1 and (size % block[0] or layer.order == "in turn"):
        raise ValueError(
            f"{where}: expected gate and up to begin with a block of {block[0]} rows, got {size} rows of each, "
            f"{layer.order}"
        )
    if layer.order == "in turn":
        pick = Pick(2 * first, 2 * stop, ((0, slice(0, None, 2)), (1, slice(1, None, 2))))
        return Cut(2 * n, k, (pick,), (0, k))
    gate, up = (0, n) if layer.order == "gate first" else (n, 0)
    picks = Pick(gate + first, gate + stop, ((0, every),)), Pick(up + first, up + stop, ((1, every),))
    return Cut(2 * n, k, picks, (0, k))


def units_of(
    layer: Layer, share: Share, linear: Linear, entry: Entry, stored: Stored, cut: Cut, result: Tensor, most: int
) -> Iterator[Unit]:
    """The reads that fill a rank's part of a tensor.

    `result`: [experts, rows, columns], of w13 the rows of both halves. `most`: bytes that are converted at once.
    """
    check_stored_shape(entry, stored, cut, layer)
    experts = range(share.first_expert, share.first_expert + share.num_experts)
    if linear.expert is not None:
        experts = range(linear.expert, linear.expert + 1)
    row_bytes = stored.shape(cut.n, cut.k)[1] * DTYPES[entry.dtype].itemsize
    height = result.shape[1] // (2 if layer.gated and linear.part != "down" else 1)
    for expert in experts:
        mine = result[expert - share.first_expert].unflatten(0, (-1, height))
        number = expert if linear.expert is None else 0
        for pick in cut.picks:
            direct = _direct(entry, stored, cut, pick, number, mine)
            if direct is not None:
                yield direct
                continue
            for piece in _pieces(stored, cut, pick, most // row_bytes):
                yield _unit(entry, stored, cut, pick, piece, number, mine)


def check_stored_shape(entry: Entry, stored: Stored, cut: Cut, layer: Layer) -> None:
    """The shape of a tensor is that of its matrix. Axes of 1 at the end may be left out."""
    shape: tuple[int, ...] = stored.shape(cut.n, cut.k)
    if stored.last:
        shape = (shape[0], shape[1] // stored.last, stored.last)
    if layer.stacked:
        shape = (layer.num_experts, *shape)
    allowed = [shape]
    while len(allowed[-1]) > layer.stacked and allowed[-1][-1] == 1:
        allowed.append(allowed[-1][:-1])
    if entry.shape not in allowed:
        raise ValueError(
            f"{entry}: expected shape {' or '.join(map(str, allowed))} (hidden_size {layer.hidden_size}, "
            f"intermediate_size {layer.intermediate_size}), got {entry.shape}"
        )


class Piece(NamedTuple):
    """Rows and columns of values."""

    first: int
    stop: int
    left: int
    right: int


def _pieces(stored: Stored, cut: Cut, pick: Pick, items: int) -> Iterator[Piece]:
    """Parts of a pick of about so many rows of the file. They end where items, bytes and pairs of rows do."""
    left, right = cut.columns
    if stored.turned:
        for one, two in pairwise(_bounds(left, right, math.lcm(stored.per_k, stored.per_byte), items * stored.per_k)):
            yield Piece(pick.first, pick.stop, one, two)
    else:
        for one, two in pairwise(_bounds(pick.first, pick.stop, math.lcm(stored.per_n, 2), items * stored.per_n)):
            yield Piece(one, two, left, right)


def _bounds(start: int, stop: int, align: int, size: int) -> list[int]:
    size = max(1, size // align) * align
    return [start, *range((start // size + 1) * size, stop, size), stop]


def _direct(entry: Entry, stored: Stored, cut: Cut, pick: Pick, expert: int, mine: Tensor) -> Unit | None:
    """The read of a pick into the result, if its bytes are those of the file."""
    if len(pick.halves) > 1:
        return None
    place = mine[pick.halves[0][0]]
    along, across = _items(stored, Piece(pick.first, pick.stop, *cut.columns))
    span = _span(entry, stored, cut, expert, along)
    same = stored.raw or (place.dtype == DTYPES[entry.dtype] and stored.unpack is None)
    whole = across == (0, stored.shape(cut.n, cut.k)[1]) and place.nbytes == span.size and place.is_contiguous()
    return Unit(span, place.view(torch.uint8).view(-1)) if same and whole else None


def _unit(entry: Entry, stored: Stored, cut: Cut, pick: Pick, piece: Piece, expert: int, mine: Tensor) -> Unit:
    """The read of a piece into a buffer, and from there into the halves of an expert's result."""
    along, across = _items(stored, piece)
    dtype, width = DTYPES[entry.dtype], stored.shape(cut.n, cut.k)[1]
    down = piece.first - piece.first // stored.per_n * stored.per_n
    over = (piece.left - piece.left // stored.per_k * stored.per_k) // stored.per_byte
    rows, columns = piece.stop - piece.first, (piece.right - piece.left) // stored.per_byte
    left = (piece.left - cut.columns[0]) // stored.per_byte

    def apply(raw: Tensor) -> None:
        items = raw.view(dtype).view(along[1] - along[0], width)[:, across[0] : across[1]]
        values = items if stored.unpack is None else stored.unpack(items)
        values = values[down : down + rows, over : over + columns]
        for half, every in pick.halves:
            top = (piece.first - pick.first) // (every.step or 1)
            taken = values[every]
            mine[half, top : top + taken.shape[0], left : left + columns].copy_(taken)

    return Unit(_span(entry, stored, cut, expert, along), None, apply)


def _items(stored: Stored, piece: Piece) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (rows, columns) of the file that hold a piece."""
    n = piece.first // stored.per_n, -(-piece.stop // stored.per_n)
    k = piece.left // stored.per_k, -(-piece.right // stored.per_k)
    return (k, n) if stored.turned else (n, k)


def _span(entry: Entry, stored: Stored, cut: Cut, expert: int, along: tuple[int, int]) -> Span:
    rows, width = stored.shape(cut.n, cut.k)
    row_bytes = width * DTYPES[entry.dtype].itemsize
    return Span(entry.file, entry.start + (expert * rows + along[0]) * row_bytes, (along[1] - along[0]) * row_bytes)
