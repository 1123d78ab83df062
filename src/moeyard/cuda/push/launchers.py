"""Pushes over the memory of several GPUs: one launch of push.cu or push_back.cu, straight from Python."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from moeyard.cuda.push.plan import (
    CUT,
    Cut,
    Places,
    PushSizes,
    back_grid,
    back_shared_bytes,
    places_of,
    push_grid,
    push_shared_bytes,
)
from moeyard.cuda.runtime.cards import card_of
from moeyard.cuda.runtime.launch import Launch, Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import KINDS, id_type
from moeyard.cuda.runtime.planning import Noted
from moeyard.cuda.runtime.ready import Ready


class PushTables(NamedTuple):
    """What a rank's launches read beside rows: addresses, and where the routes of an expert go."""

    bases: Tensor
    """[ranks] int64: where the memory of each rank begins."""
    here: int
    """Where that of this rank does."""
    places: Tensor
    """[num_experts, most replicas] int32: slot and, in the upper 8 bits, share of each replica."""
    replicas: Tensor
    """[num_experts] int32."""
    trouble: Tensor
    """[1] int64 of pinned host memory: 0, or who did not answer."""
    rank: int
    tensor: int
    """Ranks of a share."""
    first_slot: int
    """Of this rank."""
    num_slots: int
    """Of this rank."""
    timeout_ns: int


_OPERATIONS = ("dispatch", "combine")


def lost_rank(tables: PushTables) -> str | None:
    """Who did not answer, in words; None while all is well. Nothing is waited for."""
    told = ctypes.c_uint64.from_address(tables.trouble.data_ptr()).value
    if not told:
        return None
    operation, rank = _OPERATIONS[told >> 32], (told & 0xFFFFFFFF) - 1
    return (
        f"rank {rank} of the group did not answer a {operation} of rank {tables.rank} within the group's timeout, "
        f"{tables.timeout_ns / 1e9:.0f} s"
    )


def push_launch(
    rows: Tensor,
    scales: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    sizes: PushSizes,
    tables: PushTables,
    *,
    beside: bool = False,
) -> None:
    """Sends this rank's tokens to the ranks of their experts; ends when those of all ranks are here.

    Args:
        rows: [num_tokens, ...] of `sizes.sent_bytes` bytes each.
        scales: [num_tokens, sizes.scales] float32.
        topk_ids: [num_tokens, top_k] int32 or int64, of global experts.
        topk_weights: [num_tokens, top_k] float32.
        sizes, tables: of the connection.
        beside: whether multiprocessors are left to other work.
    """
    device = tables.bases.get_device()
    num_tokens = topk_ids.shape[0]
    if (
        rows.data_ptr() % CUT.word
        or (num_tokens > 1 and rows.stride(0) * rows.element_size() % CUT.word)
        or rows.stride(-1) != 1
    ):
        rows = rows.clone(memory_format=torch.contiguous_format)
    stride = rows.stride(0) * rows.element_size()
    ids, factors = topk_ids.contiguous(), topk_weights.contiguous()
    key = ("push", sizes, tables.rank, ids.dtype, beside, device)
    launch, places, grid, shared = _READY.get(key) or _push_ready(sizes, tables, ids.dtype, beside, device)
    sized = numbers_of_push(sizes, places, tables, num_tokens, stride)
    launch(
        Shape(grid, shared, sized), tables.bases.data_ptr(), tables.here, rows.data_ptr(),
        0 if scales is None else scales.contiguous().data_ptr(), ids.data_ptr(), factors.data_ptr(),
        tables.places.data_ptr(), tables.replicas.data_ptr(), tables.trouble.data_ptr(),
    )  # fmt: skip


def push_back_launch(
    rows: Tensor, route_rows: Tensor | None, sizes: PushSizes, tables: PushTables, *, weighted: bool, out: Tensor
) -> None:
    """Sends what this rank's experts made of tokens to the ranks of these, and adds up what comes for its own.

    Args:
        rows: grouped [ranks * max_tokens, hidden_size]; exact: one row per route that has its expert here.
        route_rows: exact: [ranks * max_tokens * top_k] int32: the row of each route, -1 for none.
        sizes, tables: of the connection.
        weighted: exact: whether router weights multiply.
        out: [num_tokens, hidden_size] of this rank's own tokens.
    """
    device, num_tokens = tables.bases.get_device(), out.shape[0]
    rows = rows.contiguous()
    key = ("back", sizes, tables.rank, weighted, rows.dtype, device)
    found = _READY.get(key) or _back_ready(sizes, tables, weighted, rows.dtype, device)
    launch, places, grid, shared, pushers = found
    sized = numbers_of_push_back(sizes, places, tables, num_tokens, pushers)
    launch(
        Shape(grid, shared, sized), tables.bases.data_ptr(), tables.here, rows.data_ptr(),
        0 if route_rows is None else route_rows.data_ptr(), out.data_ptr(), tables.trouble.data_ptr(),
    )  # fmt: skip


def numbers_of_push(
    sizes: PushSizes, places: Places, tables: PushTables, num_tokens: int, stride: int
) -> tuple[int, ...]:
    """What push.cu takes behind its pointers; `stride` is the bytes from row to row."""
    return (
        tables.rank, sizes.ranks, tables.tensor, num_tokens, sizes.max_tokens, places.tile, places.tiles, sizes.top_k,
        sizes.sent_bytes // CUT.word, stride, sizes.scales, *tables.places.shape, places.rows, places.scales,
        places.slots, places.factors, places.masks, places.flags, places.epoch, tables.timeout_ns,
    )  # fmt: skip


def numbers_of_push_back(
    sizes: PushSizes, places: Places, tables: PushTables, num_tokens: int, pushers: int
) -> tuple[int, ...]:
    """What push_back.cu takes behind its pointers; `pushers` blocks send."""
    return (
        pushers, tables.rank, sizes.ranks, num_tokens, sizes.max_tokens, places.tile_back, places.tiles_back,
        sizes.top_k, sizes.row_bytes // CUT.word, tables.first_slot, tables.num_slots, places.slots, places.factors,
        places.masks, places.back, places.flags_back, places.epoch_back, tables.timeout_ns,
    )  # fmt: skip


_READY = Ready()


def push_recipe(ids: torch.dtype, cut: Cut = CUT) -> Recipe:
    """The kernel of a dispatch."""
    defines = (("BLOCK", str(cut.threads)), ("LOADS", str(cut.loads)), ("ID", id_type(ids)))
    return Recipe("push.cu", "push_kernel", defines, cut.threads, 9 + 21)


def back_recipe(sizes: PushSizes, weighted: bool, dtype: torch.dtype, cut: Cut = CUT) -> Recipe:
    """The kernel of a combine. Its blocks wait for blocks of other ranks, so all of them have to be at work."""
    defines = (
        ("BLOCK", str(cut.threads)), ("LOADS", str(cut.loads)), ("ROW_KIND", KINDS[dtype]),
        ("EXACT", "true" if sizes.exact else "false"), ("WEIGHTS", "true" if sizes.exact and weighted else "false"),
        ("ADDED", str(sizes.top_k if sizes.exact else sizes.ranks)),
    )  # fmt: skip
    return Recipe("push_back.cu", "push_back_kernel", defines, cut.threads, 6 + 18, cooperative=True)


def _push_ready(
    sizes: PushSizes, tables: PushTables, ids: torch.dtype, beside: bool, device: int
) -> tuple[Launch | Noted, Places, int, int]:
    places, key = places_of(sizes), ("push", sizes, tables.rank, ids, beside, device)
    made = launch_of(push_recipe(ids), device), places, push_grid(places, beside), push_shared_bytes(places)
    kept: tuple[Launch | Noted, Places, int, int] = _READY.add(key, made)
    return kept


def _back_ready(
    sizes: PushSizes, tables: PushTables, weighted: bool, dtype: torch.dtype, device: int
) -> tuple[Launch | Noted, Places, int, int, int]:
    places = places_of(sizes)
    pushers, adders = back_grid(sizes, places, card_of(device))
    made = (
        launch_of(back_recipe(sizes, weighted, dtype), device), places, pushers + adders,
        back_shared_bytes(sizes, places), pushers,
    )  # fmt: skip
    key = ("back", sizes, tables.rank, weighted, dtype, device)
    kept: tuple[Launch | Noted, Places, int, int, int] = _READY.add(key, made)
    return kept
