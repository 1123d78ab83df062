"""Sums of outer products on Hopper, the gradients of expert weights: launches of outer.cu."""

import torch
from torch import Tensor

from moeyard.cuda.experts.plan import WARPGROUP
from moeyard.cuda.runtime.cards import Card, card_of
from moeyard.cuda.runtime.launch import Launch, Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import KINDS
from moeyard.cuda.runtime.planning import Noted
from moeyard.cuda.runtime.ready import Ready
from moeyard.dispatch.call import Call
from moeyard.values import Segments

_PIECE = 8
"""Columns of both operands are a multiple of these: 16 bytes, which a copy brings."""
_TALL = 256
"""Columns of grads of a tile, BM in outer.cu."""
_WIDTHS = (192, 128, 64)
"""Columns of rows that a tile may have."""
_STAGES = 4
_STAGE_ROWS = 64
_BARRIERS_BYTES = 16
"""Of a stage."""


def unfit(call: Call) -> str | None:
    """Why `grouped_outer_launch` does not take such a call, in words; None if it does."""
    if call.weights is None:
        return None
    for name, size in (("grads", call.weights.columns), ("rows", call.weights.size)):
        if size % _PIECE or not size:
            return f"{name}: expected columns that are a positive multiple of {_PIECE}, got {size}"
    return None


def grouped_outer_launch(grads: Tensor, rows: Tensor, segments: Segments, row_divisor: int, *, out: Tensor) -> None:
    """One launch: blocks sum tiles of the experts' matrices over all rows of an expert, in the order of slots."""
    if not grads.shape[0] or not rows.shape[0]:
        out.zero_()
        return
    grads, rows = _in_place(grads), _in_place(rows)
    first_rows, row_counts, slots, divisor, *_ = segments
    slots = None if slots is None else slots.contiguous()
    key = (
        tuple(out.shape), grads.dtype, out.dtype, grads.stride(0), rows.stride(0), divisor, row_divisor,
        grads.get_device(),
    )  # fmt: skip
    launch, shape = _READY.get(key) or _READY.add(key, _prepare(*key))
    launch(
        shape, grads.data_ptr(), rows.data_ptr(), 0 if slots is None else slots.data_ptr(),
        first_rows.contiguous().data_ptr(), row_counts.contiguous().data_ptr(), out.data_ptr(),
    )  # fmt: skip


def _in_place(rows: Tensor) -> Tensor:
    """These rows, or a copy of them where 16 bytes cannot be copied at a time."""
    pieces = rows.stride(0) % _PIECE == 0 and rows.stride(1) == 1 and not rows.data_ptr() % (2 * _PIECE)
    return rows if pieces else rows.clone(memory_format=torch.contiguous_format)


_READY = Ready()


def _prepare(
    out_shape: tuple[int, ...], dtype: torch.dtype, out_dtype: torch.dtype, grad_stride: int, row_stride: int,
    divisor: int, row_divisor: int, device: int,
) -> tuple[Launch | Noted, Shape]:  # fmt: skip
    experts, columns, size = out_shape
    width, grid, shared_bytes = outer_plan(experts, columns, size, card_of(device))
    sizes = (experts, columns, size, 2 * grad_stride, 2 * row_stride, divisor, row_divisor)
    defines = outer_defines(width, dtype, out_dtype)
    recipe = Recipe("outer.cu", "outer_kernel", defines, 3 * WARPGROUP, 6 + len(sizes), suffix="a")
    return launch_of(recipe, device), Shape(grid, shared_bytes, sizes)


def outer_plan(experts: int, columns: int, size: int, card: Card) -> tuple[int, int, int]:
    """Columns of rows of a tile, blocks, and bytes of shared memory of each.

    The width is what takes least for a matrix: a tile's time is that of its columns, and some for each tile.
    """
    width = min(_WIDTHS, key=lambda width: -(-size // width) * (width + 32))
    tiles = experts * -(-columns // _TALL) * -(-size // width)
    stage = (_TALL + width) * 2 * _STAGE_ROWS + _BARRIERS_BYTES
    return width, max(1, min(card.processors, tiles)), _STAGES * stage


def outer_defines(width: int, dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """What a sum is compiled for."""
    return (
        ("COLUMNS_A_TILE", str(width)),
        ("STAGES", str(_STAGES)),
        ("ROW_KIND", KINDS[dtype]),
        ("ELEMENT", "bf16" if dtype == torch.bfloat16 else "f16"),
        ("VALUE_BYTES", "2"),
        ("WIDE_RESULTS", "false" if out_dtype == dtype else "true"),
    )
