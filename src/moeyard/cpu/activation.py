"""Activations: what stands between the two products of an expert, and as an operator of its own."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from moeyard.cpu import dots
from moeyard.cpu.dots import LANES
from moeyard.cpu.pointers import kernel
from moeyard.cpu.products import FLOAT32, KINDS, dense_rows
from moeyard.cpu.rows import add_row, store_row
from moeyard.cpu.threads import count_parts, run_parts
from moeyard.values import Activation

SILU, GELU, GELU_TANH, RELU2 = range(4)
_CODES = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu2": RELU2}


def activate_launch(rows: Tensor, activation: Activation, *, gated: bool, out: Tensor) -> None:
    """Fills out [R, I] from rows [R, 2I], or [R, I] without a gate."""
    rows = dense_rows(rows)
    num_rows, size = out.shape
    parts = count_parts(rows.nbytes, 1 << 18)
    run_parts(
        _activate_kernel, parts, num_rows, (rows, out), KINDS[rows.dtype], rows.stride(0) * rows.element_size(), size,
        gated, *code_of(activation),
    )  # fmt: skip


def code_of(activation: Activation) -> tuple[int, float, float, float]:
    """An activation as kernels take it: code, alpha, beta, limit."""
    limit = math.inf if activation.limit is None else activation.limit
    return _CODES[activation.name], activation.alpha, activation.beta, limit


@kernel
def apply(code: int, alpha: float, beta: float, limit: float, gate: Any, up: Any, size: int, scratch: Any) -> None:
    """gate[:size] = act(gate) * (up + beta), clamped first; `up` has no elements where nothing is gated.

    All are float32 arrays with room for whole vectors.
    """
    bound = np.float32(limit)
    if limit != np.inf:
        for j in range(size):
            gate[j] = bound if gate[j] > bound else gate[j]
    if code in (SILU, GELU_TANH):
        if code == SILU:
            factor = np.float32(alpha)
            for j in range(size):
                scratch[j] = factor * gate[j]
        else:  # 0.5 (1 + tanh y) is the sigmoid of 2 y
            first, third = np.float32(1.5957691216057308), np.float32(0.07135481627159669)
            for j in range(size):
                scratch[j] = gate[j] * (first + third * gate[j] * gate[j])
        for j in range(0, size, LANES):
            dots.sigmoids(scratch.ctypes.data + 4 * j, scratch.ctypes.data + 4 * j)
        for j in range(size):
            gate[j] *= scratch[j]
    elif code == GELU:
        for j in range(size):
            gate[j] *= np.float32(0.5 * math.erfc(-gate[j] * 0.7071067811865476))
    else:
        for j in range(size):
            gate[j] = gate[j] * gate[j] if gate[j] > 0 or gate[j] != gate[j] else np.float32(0)
    if up.size:
        shift = np.float32(beta)
        for j in range(size):
            other = up[j]
            if limit != np.inf:
                other = bound if other > bound else (-bound if other < -bound else other)
            gate[j] *= other + shift


@kernel
def _activate_kernel(part: int, start: int, stop: int, rows: int, out: int, kind: int, row_stride: int, size: int,
                     gated: bool, code: int, alpha: float, beta: float, limit: float) -> None:  # fmt: skip
    width = 4 if kind == FLOAT32 else 2
    whole = np.zeros((3, (size + LANES) // LANES * LANES), np.float32)
    for row in range(start, stop):
        gate = rows + row * row_stride
        plainly(kind, whole[0], gate, size)
        if gated:
            plainly(kind, whole[1], gate + width * size, size)
        apply(code, alpha, beta, limit, whole[0], whole[1] if gated else whole[1][:0], size, whole[2])
        store_row(kind, out + width * row * size, whole[0].ctypes.data, size, 0)


@kernel
def plainly(kind: int, target: Any, source: int, size: int) -> None:
    """A row as float32, in its own order."""
    target[:size] = 0
    add_row(kind, target.ctypes.data, np.float32(1), source, source, size)
