"""Launchers of what backward passes are made of: sums of outer products, derivatives of activations."""

from functools import lru_cache

import torch
from torch import Tensor

from moeyard.dispatch.sizes import power
from moeyard.triton import gradient_kernels
from moeyard.triton.launch import Step, card, dtypes_of, on_its_device
from moeyard.triton.plan import outer_tile
from moeyard.triton.steps import MOST_PLANS, SIDE_BY_SIDE, dense_rows, prepared, programmatic_on
from moeyard.values import Activation, Segments, WeightedGradients


@on_its_device
def grouped_outer_launch(grads: Tensor, rows: Tensor, segments: Segments, row_divisor: int, *, out: Tensor) -> None:
    """One launch: a program sums a tile of an expert's matrix over its rows, in float32, in the order of slots."""
    if not out.numel():
        return
    if not grads.shape[0] or not rows.shape[0]:
        out.zero_()
        return
    grads, rows = dense_rows(grads), dense_rows(rows)
    slots = None if segments.slots is None else segments.slots.contiguous()
    step = prepared(
        _outer_step, out.device, (grads.dtype, out.dtype), tuple(out.shape), grads.stride(0), rows.stride(0),
        segments.divisor, row_divisor, slots is not None,
    )  # fmt: skip
    step(grads, rows, slots, segments.first_rows.contiguous(), segments.row_counts.contiguous(), out)


@on_its_device
def activate_backward_launch(rows: Tensor, grad: Tensor, activation: Activation, *, gated: bool, out: Tensor) -> None:
    """In float32, rounded once. Clamped values have a derivative of 0, a limit itself 1."""
    _launch_backward(rows, grad, None, activation, gated, (out, None, None))


@on_its_device
def weighted_activate_backward_launch(
    rows: Tensor, grad: Tensor, factors: Tensor | None, activation: Activation, *, gated: bool, out: WeightedGradients
) -> None:
    """In float32, each result rounded once; one pass over rows and grad."""
    _launch_backward(rows, grad, factors, activation, gated, out)


def _launch_backward(
    rows: Tensor, grad: Tensor, factors: Tensor | None, activation: Activation, gated: bool,
    out: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    of_rows, weighted, dots = out
    if not rows.shape[0]:
        return
    rows, grad = dense_rows(rows), dense_rows(grad)
    factors = None if factors is None else factors.contiguous()
    tensors = rows, grad, factors, of_rows, weighted, dots
    step = prepared(
        _backward_step, rows.device, dtypes_of(tensors), *grad.shape, rows.stride(0), grad.stride(0), gated, activation
    )
    step(*tensors)


@lru_cache(MOST_PLANS)
def _outer_step(
    device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], grad_stride: int,
    row_stride: int, divisor: int, row_divisor: int, gathered: bool,
) -> Step:  # fmt: skip
    experts, columns, size = shape
    tile = outer_tile(experts, columns, size, itemsize=dtypes[0].itemsize, gathered=gathered, card=card(device))
    tiles = -(-columns // tile.columns) * -(-size // tile.sizes)
    return Step(
        gradient_kernels.outer_kernel, (experts * tiles, 1),
        (columns, size, grad_stride, row_stride, divisor, row_divisor), tile.warps, tile.stages,
        COLUMNS=tile.columns, SIZES=tile.sizes, DEPTH=tile.depth, GROUP=SIDE_BY_SIDE, PDL=programmatic_on(device),
    )  # fmt: skip


@lru_cache(MOST_PLANS)
def _backward_step(
    device: torch.device, _dtypes: tuple[torch.dtype | None, ...], num_rows: int, columns: int, row_stride: int,
    grad_stride: int, gated: bool, activation: Activation,
) -> Step:  # fmt: skip
    wide = power(min(columns, 256), 16)
    tall = 2048 // wide
    return Step(
        gradient_kernels.activate_backward_kernel, (-(-num_rows // tall), 1),
        (num_rows, columns, row_stride, grad_stride), GATED=gated, NAME=activation.name, ALPHA=activation.alpha,
        BETA=activation.beta, LIMIT=activation.limit, ROWS=tall, COLUMNS=wide, PDL=programmatic_on(device),
    )  # fmt: skip
