"""Derivatives of activations: one pass over rows and gradients, row by row, so that no row depends on the others."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from moeyard.cpu import dots
from moeyard.cpu.activation import GELU, GELU_TANH, SILU, code_of, plainly
from moeyard.cpu.dots import LANES
from moeyard.cpu.pointers import float32_at, kernel
from moeyard.cpu.products import FLOAT32, KINDS, dense_rows
from moeyard.cpu.rows import store_row
from moeyard.cpu.threads import count_parts, dense, run_parts
from moeyard.values import Activation, WeightedGradients


def activate_backward_launch(rows: Tensor, grad: Tensor, activation: Activation, *, gated: bool, out: Tensor) -> None:
    """In float32, rounded once. Clamped values have a derivative of 0, a limit itself 1."""
    _launch(rows, grad, None, activation, gated, (out, None, None))


def weighted_activate_backward_launch(
    rows: Tensor, grad: Tensor, factors: Tensor | None, activation: Activation, *, gated: bool, out: WeightedGradients
) -> None:
    """In float32, each result rounded once."""
    _launch(rows, grad, factors, activation, gated, out)


def _launch(
    rows: Tensor, grad: Tensor, factors: Tensor | None, activation: Activation, gated: bool,
    out: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    rows, grad = dense_rows(rows), dense_rows(grad)
    num_rows, size = grad.shape
    run_parts(
        _backward_kernel, count_parts(rows.nbytes, 1 << 18), num_rows, (rows, grad, dense(factors), *out),
        KINDS[rows.dtype], KINDS[grad.dtype], rows.stride(0) * rows.element_size(),
        grad.stride(0) * grad.element_size(), num_rows, size, gated, *code_of(activation),
    )  # fmt: skip


@kernel
def _curve(code: int, alpha: float, x: Any, level: Any, slope: Any, scratch: Any, size: int) -> None:
    """level[:size], slope[:size] = an activation's curve at x, and its derivative; arrays of whole vectors."""
    one, half = np.float32(1), np.float32(0.5)
    if code in (SILU, GELU_TANH):
        factor, third = np.float32(alpha), np.float32(0.044715)
        first, second = np.float32(1.5957691216057308), np.float32(0.134145)
        for j in range(size):
            scratch[j] = factor * x[j] if code == SILU else first * (x[j] + third * x[j] * x[j] * x[j])
        for j in range(0, size, LANES):
            dots.sigmoids(scratch.ctypes.data + 4 * j, scratch.ctypes.data + 4 * j)
        for j in range(size):
            share = scratch[j]
            level[j] = x[j] * share
            steep = factor * x[j] if code == SILU else first * x[j] * (one + second * x[j] * x[j])
            slope[j] = share + share * steep * (one - share)
    elif code == GELU:
        peak = np.float32(0.3989422804014327)
        for j in range(size):
            share = np.float32(half * math.erfc(-x[j] * 0.7071067811865476))
            level[j] = x[j] * share
            slope[j] = share + x[j] * peak * np.float32(math.exp(-0.5 * x[j] * x[j]))
    else:
        for j in range(size):
            positive = x[j] if x[j] > 0 or x[j] != x[j] else np.float32(0)
            level[j], slope[j] = positive * positive, np.float32(2) * positive


@kernel
def _backward_kernel(
    part: int, start: int, stop: int, rows: int, grad: int, factors: int, of_rows: int, weighted: int, dots_: int,
    kind: int, grad_kind: int, row_stride: int, grad_stride: int, num_rows: int, size: int, gated: bool, code: int,
    alpha: float, beta: float, limit: float,
) -> None:  # fmt: skip
    width = 4 if kind == FLOAT32 else 2
    wide = 2 * size if gated else size
    padded = (size + LANES) // LANES * LANES
    whole, sums = np.zeros((7, padded), np.float32), np.zeros(LANES, np.float32)
    gate, up, back, level, slope, scratch, other = whole[0], whole[1], whole[2], whole[3], whole[4], whole[5], whole[6]
    bound, shift, nothing = np.float32(limit), np.float32(beta), np.float32(0)
    for row in range(start, stop):
        plainly(kind, gate, rows + row * row_stride, size)
        plainly(grad_kind, back, grad + row * grad_stride, size)
        for j in range(size):
            scratch[j] = gate[j]
            gate[j] = bound if gate[j] > bound else gate[j]
            other[j] = np.float32(1) if scratch[j] <= bound else nothing
        _curve(code, alpha, gate, level, slope, scratch, size)
        factor = float32_at(factors, num_rows)[row] if factors != 0 else np.float32(1)
        for j in range(size):
            slope[j] *= other[j]
        target = of_rows + width * row * wide
        if gated:
            plainly(kind, up, rows + row * row_stride + width * size, size)
            for j in range(size):
                inside = np.float32(1) if abs(up[j]) <= bound else nothing
                held = bound if up[j] > bound else (-bound if up[j] < -bound else up[j])
                other[j] = factor * back[j] * level[j] * inside
                level[j] *= held + shift
                slope[j] *= held + shift
            store_row(kind, target + width * size, other.ctypes.data, size, 0)
        for j in range(size):
            other[j] = factor * back[j] * slope[j]
        store_row(kind, target, other.ctypes.data, size, 0)
        if weighted != 0:
            sums[:] = 0
            for j in range(0, size, LANES):
                for lane in range(LANES):
                    sums[lane] += level[j + lane] * back[j + lane]
            total = nothing
            for lane in range(LANES):
                total += sums[lane]
            float32_at(dots_, num_rows)[row] = total
            for j in range(size):
                level[j] *= factor
            store_row(kind, weighted + width * row * size, level.ctypes.data, size, 0)
    whole[:1] = 0  # numba frees an array after its last use, though its address is still in use
