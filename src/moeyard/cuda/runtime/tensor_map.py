"""Tensor maps: what the copy engine of Hopper has to know of a tensor, 128 bytes that a kernel takes as a parameter."""

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from moeyard.cuda.runtime.launch import MAP_BYTES
from moeyard.cuda.runtime.planning import current_plan

STEP_BYTES = 128
"""Of a row that a box has: what the swizzle spans."""
_ALIGNMENT = 64
Boxes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Sizes, strides in bytes of all but the first, and a box, the fastest dimension first."""


@lru_cache(maxsize=4096)
def weight_map(
    address: int, experts: int, rows: int, size: int, dtype: torch.dtype, box: int, turn: str, ahead: bool
) -> bytes:
    """Of contiguous weights [experts, rows, size] of 16-bit floats or 8-bit codes; a box is 128 bytes of `box` rows of
    an expert.

    `ahead` lets the L2 cache bring the next 128 bytes of a row with them.
    """
    return _encode(address, dtype, *weight_boxes(experts, rows, size, dtype.itemsize, box, turn), ahead)


@lru_cache(maxsize=4096)
def turned_map(address: int, boxes: Boxes, dtype: torch.dtype, ahead: bool) -> bytes:
    """Of weights that lie transposed, in boxes of `turned_boxes`."""
    return _encode(address, dtype, *boxes, ahead)


@lru_cache(maxsize=256)
def weight_maps(
    experts: int, rows: int, size: int, dtype: torch.dtype, box: int, turn: str, ahead: bool
) -> Callable[[int], bytes]:
    """`weight_map` by address alone: of the layers of a model, whose weights have equal sizes."""
    return lru_cache(maxsize=1024)(lambda address: weight_map(address, experts, rows, size, dtype, box, turn, ahead))


def row_maps(rows: int, size: int, dtype: torch.dtype, box: int) -> Callable[[int], bytes]:
    """`row_map` by address alone: memory comes back to few places."""
    return lru_cache(maxsize=16)(lambda address: row_map(address, rows, size, dtype, box))


def turned_boxes(weight: Tensor, box: int) -> Boxes:
    """As `weight_boxes`, of [experts, rows, size] whose rows, a multiple of 64, lie side by side.

    The dimensions are 64 rows, size, blocks of 64 rows, expert, and one more of 1.
    """
    experts, rows, size = weight.shape
    item, side = weight.element_size(), STEP_BYTES // weight.element_size()
    strides = (weight.stride(2) * item, STEP_BYTES, weight.stride(0) * item, weight.stride(0) * item)
    return (side, size, rows // side, experts, 1), strides, (side, side, box // side, 1, 1)


@lru_cache(maxsize=4096)
def tile_map(address: int, boxes: Boxes, dtype: torch.dtype, ahead: bool) -> bytes:
    """Of weights of 4 bits in tiles, their scales or zero points, in boxes of `tile_boxes`, which are not swizzled."""
    return _encode(address, dtype, *boxes, ahead, swizzled=False)


def tile_boxes(experts: int, tiles: int, row_bytes: int, item: int, brought: int, box: int) -> Boxes:
    """As `weight_boxes`, of `tiles` rows of tiles per expert, `row_bytes` each: `brought` bytes of `box` of them.

    The dimensions are elements of `item` bytes, rows of tiles, expert, and two more of 1.
    """
    strides = (row_bytes, tiles * row_bytes, experts * tiles * row_bytes, experts * tiles * row_bytes)
    return (row_bytes // item, tiles, experts, 1, 1), strides, (brought // item, box, 1, 1, 1)


@lru_cache(maxsize=4096)
def row_map(address: int, rows: int, size: int, dtype: torch.dtype, box: int) -> bytes:
    """Of contiguous rows [rows, size] of 16-bit floats or 8-bit codes; a box is 128 bytes of `box` rows."""
    values = STEP_BYTES // dtype.itemsize
    return _encode(address, dtype, (size, rows), (size * dtype.itemsize,), (values, box), True)


def weight_boxes(experts: int, rows: int, size: int, item: int, box: int, turn: str) -> Boxes:
    """The boxes of weights.

    The rows of a box come by `turn`: 8 of the gate half and the same 8 of the up half ("halves"), or 8 even and 8 odd
    ones ("pairs"). The dimensions are size, 8 rows, which of the two, groups of 16, expert.
    """
    pitch, half = size * item, rows // 2
    strides = {
        "halves": (pitch, half * pitch, 8 * pitch, rows * pitch),
        "pairs": (2 * pitch, pitch, 16 * pitch, rows * pitch),
    }[turn]
    return (size, 8, 2, half // 8, experts), strides, (STEP_BYTES // item, 8, 2, box // 16, 1)


def _encode(
    address: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    ahead: bool,
    swizzled: bool = True,
) -> bytes:
    """A map whose boxes land in the 128-byte swizzle, if asked, zeros where they reach out of the tensor.

    The driver is called without its binding, whose maps lie at addresses that are no multiples of 64 as the driver
    wants them. A plan, whose tensors have no address, has no use for one.
    """
    if current_plan() is not None:
        return bytes(MAP_BYTES)
    from cuda.bindings import driver

    kinds: Any = driver.CUtensorMapDataType
    promotions: Any = driver.CUtensorMapL2promotion
    kind = {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.int32: kinds.CU_TENSOR_MAP_DATA_TYPE_INT32,
    }.get(dtype, kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8)
    swizzles: Any = driver.CUtensorMapSwizzle
    swizzle = swizzles.CU_TENSOR_MAP_SWIZZLE_128B if swizzled else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE
    rank = len(sizes)
    room = (ctypes.c_uint8 * (MAP_BYTES + _ALIGNMENT))()
    made = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(made),
        ctypes.c_int(int(kind)),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        ctypes.c_int(int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE)),
        ctypes.c_int(int(swizzle)),
        ctypes.c_int(
            int(promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_256B if ahead else promotions.CU_TENSOR_MAP_L2_PROMOTION_NONE)
        ),
        ctypes.c_int(int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)),
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled: status {status}, with {sizes}, {strides} (sizes, strides), {box}")
    return ctypes.string_at(made, MAP_BYTES)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
