"""What launchers of experts share: steps that lay routes out, weigh rows and sum them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard.dispatch.call import lies_turned
from moeyard.dispatch.sizes import power, round_up
from moeyard.triton import align_kernels, kernels
from moeyard.triton.launch import Step, card

MOST_PLANS = 512
"""Plans that are kept."""
SIDE_BY_SIDE = 8
"""Row tiles whose programs meet the same weights in L2."""
_MOST_ALONE = 4096  # routes that one launch lays out: each is compared with all
_CHUNK = 512


class LayoutSteps(NamedTuple):
    """What orders routes by expert and cuts every expert's rows into tiles: one launch up to 4096 routes, else four."""

    ints: list[int]
    """int32 elements of routes, route_rows, tiles, counts and totals."""
    align: Any
    count: Any
    scan: Any
    first: Any
    place: Any

    def __call__(self, ids: Tensor, expert_map: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """int32: each slot's route, each route's slot (-1: dropped), and row tiles as `write_tiles` has them."""
        room = torch.empty(sum(self.ints), dtype=torch.int32, device=ids.device)
        routes, route_rows, tiles, counts, totals = room.split(self.ints)
        if self.align is not None:
            self.align(ids, expert_map, routes, route_rows, tiles)
        else:
            self.count(ids, expert_map, counts)
            self.scan(counts, totals)
            self.first(totals, tiles)
            self.place(ids, expert_map, counts, totals, routes, route_rows)
        return routes, route_rows, tiles


def layout_steps(
    n: int, num_experts: int, local: int, rows: int, most_tiles: int, *, programmatic: bool
) -> LayoutSteps:
    """Steps for `n` routes, `local` of `num_experts` experts and tiles of `rows` rows."""
    chunks, experts, alone = -(-n // _CHUNK), power(local, 32), n <= _MOST_ALONE
    sizes = (n, num_experts, local)
    common: dict[str, Any] = {"EXPERTS": experts, "PDL": programmatic}
    ints = [round_up(n, 4), round_up(n, 4), round_up(3 * most_tiles, 4)]
    if alone:
        grid = (-(-n // 32) + 1, 1)
        align = Step(align_kernels.align_kernel, grid, (*sizes, most_tiles, rows), MINE=32, OTHERS=256, **common)
        return LayoutSteps([*ints, 0, 0], align, None, None, None, None)
    count = Step(align_kernels.count_kernel, (chunks, 1), sizes, CHUNK=_CHUNK, **common)
    scan = Step(
        align_kernels.scan_kernel, (-(-experts // 32), 1), (chunks,), EXPERTS=experts, BLOCK=32, CHUNKS=64,
        PDL=programmatic,
    )  # fmt: skip
    first = Step(align_kernels.first_kernel, (1, 1), (most_tiles, rows), **common)
    place = Step(align_kernels.place_kernel, (-(-n // 64), 1), sizes, CHUNK=_CHUNK, MINE=64, OTHERS=64, **common)
    return LayoutSteps([*ints, chunks * experts, experts], None, count, scan, first, place)


def weigh_step(n: int, hidden: int, row_stride: int, top_k: int, *, programmatic: bool) -> Step:
    """Each route's row, times its router weight."""
    wide = power(min(hidden, 1024), 16)
    grid = (n, -(-hidden // wide))
    return Step(kernels.weigh_kernel, grid, (hidden, row_stride, top_k), COLUMNS=wide, PDL=programmatic)


def combine_step(tokens: int, hidden: int, top_k: int, *, programmatic: bool) -> Step:
    """Each token's rows, summed in k order."""
    wide = power(min(hidden, 1024), 16)
    return Step(
        kernels.combine_kernel, (tokens, -(-hidden // wide)), (hidden,), TOP_K=top_k, COLUMNS=wide, PDL=programmatic
    )


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 0 else tensor.contiguous()


def stride_of(bias: Tensor | None) -> int:
    """Elements from expert to expert; -1 without a bias, for which a step is another."""
    return -1 if bias is None else bias.stride(0)


class Lies(NamedTuple):
    """How matrices [experts, columns, size] lie in memory, in elements."""

    strides: tuple[int, int]
    """From expert to expert, and from column to column; where they are turned, from element to element of a sum."""
    turned: bool
    """Whether columns are side by side: the matrices lie transposed."""


def readable(weight: Tensor) -> tuple[Tensor, Lies]:
    """What products read in place, and how it lies: the weights themselves wherever an axis is contiguous."""
    if lies_turned(weight):
        return weight, Lies((weight.stride(0), weight.stride(2)), True)
    weight = dense_rows(weight)
    return weight, Lies((weight.stride(0), weight.stride(1)), False)


def placed_alike(tensor: Tensor) -> Tensor:
    """The matrix itself if it is dense and begins at a multiple of 16 bytes, otherwise such a copy.

    Triton compiles a kernel for what addresses and strides are multiples of. So one kernel serves a token wherever it
    lies.
    """
    dense = tensor.stride() == (tensor.shape[1], 1)
    return tensor if dense and not tensor.data_ptr() % 16 else tensor.clone(memory_format=torch.contiguous_format)


def programmatic_on(device: torch.device) -> bool:
    """Whether a kernel may be placed while the one before drains: it waits for that one's writes itself."""
    return device.type in ("cuda", "meta") and card(device).capability >= (9, 0)


def prepared(prepare: Any, device: torch.device, *sizes: Any) -> Any:
    """What `prepare` has kept for these sizes; for meta tensors, whose card is in no key, made anew."""
    return (prepare.__wrapped__ if device.type == "meta" else prepare)(device, *sizes)
