"""Experts of 4 bits in tiles of 16 rows, the layout that GPU kernels read, and back. Every bit is kept.

A tile is 16 rows by 64 columns, 512 bytes: what the 32 lanes of a warp multiply in four products of 16 x 16 (mma). Of
w13 of gated experts it holds 8 gate rows, then the 8 up rows beside them; of other matrices 16 rows. Lane 4g + t has 16
bytes: of row g, then of row g + 8, four words of 16 bits each. Word p holds four codes, those of columns 16s + 4t + p
for s = 0, 1, 2, 3. Codes of int4 lie in a word one after the other, the lowest bits first. Of e2m1, s = 0 and 1 have
sign, exponent and mantissa where a shift by 0 and 3 puts them into a float16; the signs of 2 and 3 lie apart:

    bit   15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    s      0  2  3  1  0  0  0  1  1  1  2  2  2  3  3  3     (0 to 3 at 15 to 12 are signs)

Tiles of 16 rows follow each other by columns, then by rows. Scales and zero points of 16 rows lie by groups of columns:
[rows / 16, groups, 8, 2], of rows g and g + 8 side by side.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moeyard.dispatch.checks import check_experts, check_flag, check_tiles
from moeyard.quant import TILE_COLUMNS, TILE_ROWS, groups_fit_tiles, meets_tiles
from moeyard.values import ExpertWeights

_HALF = TILE_ROWS // 2


def pack_experts(weights: ExpertWeights, *, in_place: bool = False) -> ExpertWeights:
    """Puts the codes of experts of 4 bits into the tiles that GPU kernels read; `unpack_experts` is the inverse.

    Args:
        weights: of a scheme of 4 bits, one scale per row and 16, 32, 64, a multiple of 64, or all columns, beside rows
            as they are or of e4m3 with one dynamic scale each. hidden_size and intermediate_size are multiples of 64,
            `block_start` is 0.
        in_place: whether to overwrite the memory of w13, w2, scales and zero points, one expert at a time. Then
            `weights` mean nothing any more. Otherwise results have memory of their own.

    Returns weights of the same shapes and dtypes whose scheme is `tiled`. Biases and global scales are the ones given.
    Raises TypeError or ValueError naming the argument.
    """
    _check(weights, in_place, tiled=False)
    return _moved(weights, in_place, tiled=True)


def unpack_experts(weights: ExpertWeights, *, in_place: bool = False) -> ExpertWeights:
    """Gives back the rows of codes that `pack_experts` has put into tiles, bit by bit; arguments as there."""
    _check(weights, in_place, tiled=True)
    return _moved(weights, in_place, tiled=False)


def _check(weights: object, in_place: object, *, tiled: bool) -> None:
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights: expected ExpertWeights, got {type(weights).__name__}")
    check_flag("in_place", in_place)
    scheme, scales = weights.scheme, weights.scales
    if scheme is None or scales is None or not meets_tiles(scheme):
        raise ValueError(
            "weights.scheme: expected weights of 4 bits, and rows as they are or of e4m3 with one dynamic scale each, "
            f"got {scheme}"
        )
    if scheme.tiled != tiled:
        raise ValueError(f"weights.scheme: expected one {'in tiles' if tiled else 'in rows'}, got {scheme}")
    if not groups_fit_tiles(scheme.block):
        raise ValueError(
            f"weights.scheme: expected one scale per row and 16, 32, 64, a multiple of 64, or all columns, got {scheme}"
        )
    bias = weights.w13_bias if weights.w13_bias is not None else weights.w2_bias
    rows = weights.w13.new_empty((0, 2 * weights.w13.shape[-1]), dtype=torch.float32 if bias is None else bias.dtype)
    check_experts(weights, rows)
    check_tiles(scheme, weights.hidden_size, weights.intermediate_size, scales.block_start)


def _moved(weights: ExpertWeights, in_place: bool, *, tiled: bool) -> ExpertWeights:
    scheme, scales = weights.scheme, weights.scales
    assert scheme is not None and scales is not None
    codes = (_tiles_of_rows if tiled else _rows_of_tiles), (_scales_of_rows if tiled else _rows_of_scales)
    e2m1 = scheme.weights == "e2m1"

    def matrix(given: Tensor | None, halves: int, stored: bool) -> Tensor | None:
        if given is None:
            return None
        out = given if in_place else torch.empty(given.shape, dtype=given.dtype, device=given.device)
        for source, target in zip(given, out, strict=True):  # an expert at a time
            moved = codes[0](source, halves, e2m1) if stored else codes[1](_bits(source), halves)
            _bits(target).copy_(_bits(moved))
        return out

    first = 2 if weights.gated else 1
    w13, w2 = matrix(weights.w13, first, True), matrix(weights.w2, 1, True)
    s13, s2 = matrix(scales.w13, first, False), matrix(scales.w2, 1, False)
    z13, z2 = matrix(scales.w13_zero_points, first, False), matrix(scales.w2_zero_points, 1, False)
    assert w13 is not None and w2 is not None and s13 is not None and s2 is not None
    moved = replace(scales, w13=s13, w2=s2, w13_zero_points=z13, w2_zero_points=z2)
    return replace(weights, w13=w13, w2=w2, scheme=replace(scheme, tiled=tiled), scales=moved)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _bits(tensor: Tensor) -> Tensor:
    """As integers of their size, of which every bit is copied."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def _by_tiles(rows: Tensor, halves: int) -> Tensor:
    """[R, ...] -> [R / 16, 2, 8, ...]: of two halves 8 rows of each, else 16 rows."""
    tiles: Tensor = rows.unflatten(0, (2, -1, _HALF) if halves == 2 else (-1, 2, _HALF))
    return tiles.transpose(0, 1) if halves == 2 else tiles


def _by_rows(tiles: Tensor, halves: int) -> Tensor:
    """The inverse."""
    return (tiles.transpose(0, 1) if halves == 2 else tiles).flatten(0, 2)


def _tiles_of_rows(stored: Tensor, halves: int, e2m1: bool) -> Tensor:
    """[R, C / 2] uint8, two columns per byte -> the same bytes in tiles, of the same shape."""
    codes = torch.stack((stored & 15, stored >> 4), -1).flatten(-2).to(torch.int32)  # [R, C]
    tiles = _by_tiles(codes, halves).unflatten(3, (-1, 4, 4, 4))  # [tiles, h, g, c, s, t, p]
    words = _word(tiles.permute(4, 0, 3, 2, 5, 1, 6), e2m1)  # [tiles, c, g, t, h, p]
    low, high = words & 255, words >> 8
    return torch.stack((low, high), -1).to(torch.uint8).view(stored.shape)


def _rows_of_tiles(stored: Tensor, halves: int, e2m1: bool) -> Tensor:
    """The inverse."""
    bytes_ = stored.reshape(-1, stored.shape[1] * 2 // TILE_COLUMNS, 8, 4, 2, 4, 2).to(torch.int32)
    codes = _codes(bytes_[..., 0] | bytes_[..., 1] << 8, e2m1)  # [s, tiles, c, g, t, h, p]
    rows = _by_rows(codes.permute(1, 5, 3, 2, 0, 4, 6), halves).flatten(1)
    return (rows[:, ::2] | rows[:, 1::2] << 4).to(torch.uint8)


_SIGNS, _SIZES = (15, 12, 14, 13), (9, 6, 3, 0)
"""Where the sign and the lower three bits of a code of e2m1 lie in a word, by s."""


def _word(codes: Tensor, e2m1: bool) -> Tensor:
    """[4, ...] codes -> [...] words."""
    each: Callable[[int], Tensor] = lambda s: (  # noqa: E731
        (codes[s] >> 3) << _SIGNS[s] | (codes[s] & 7) << _SIZES[s] if e2m1 else codes[s] << 4 * s
    )
    return each(0) | each(1) | each(2) | each(3)


def _codes(words: Tensor, e2m1: bool) -> Tensor:
    """The inverse."""
    return torch.stack(
        [(words >> _SIGNS[s] & 1) << 3 | words >> _SIZES[s] & 7 if e2m1 else words >> 4 * s & 15 for s in range(4)]
    )


def _scales_of_rows(scales: Tensor, halves: int) -> Tensor:
    """[R, groups] -> the same in the order [R / 16, groups, 8, 2], of the same shape."""
    return _by_tiles(scales, halves).permute(0, 3, 2, 1).reshape(scales.shape)


def _rows_of_scales(scales: Tensor, halves: int) -> Tensor:
    """The inverse."""
    tiles: Tensor = scales.reshape(-1, scales.shape[1], _HALF, 2).permute(0, 3, 2, 1)
    return _by_rows(tiles, halves).reshape(scales.shape)
