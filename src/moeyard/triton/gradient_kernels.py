"""Triton kernels of backward passes: sums of outer products, derivatives of activations. Sizes count elements."""

import triton
import triton.language as tl

from moeyard.triton.kernels import start


@triton.jit(do_not_specialize=["divisor", "row_divisor"])
def outer_kernel(
    grads_ptr,
    rows_ptr,
    slots_ptr,  # int32: the entry of a slot; None: slots are entries
    first_ptr,  # int64 [experts]: first slot
    counts_ptr,  # int32 [experts]: number of slots
    out_ptr,  # [experts, columns, size]
    columns,
    size,
    grad_stride,
    row_stride,
    divisor,
    row_divisor,
    COLUMNS: tl.constexpr,
    SIZES: tl.constexpr,
    DEPTH: tl.constexpr,  # rows at a time
    GROUP: tl.constexpr,  # tiles of columns whose programs run side by side, to meet the same rows in L2
    PDL: tl.constexpr,
):
    """One tile of an expert's sum of grads[entry // divisor] x rows[entry // row_divisor], in the order of its slots.

    Grads are read as [COLUMNS, DEPTH], which the matrix instructions take as it lies.
    """
    start(PDL)
    across = tl.cdiv(size, SIZES)
    down = tl.cdiv(columns, COLUMNS)
    expert = tl.program_id(0) // (down * across)
    tile = tl.program_id(0) % (down * across)
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tile % (GROUP * across)
    column = (group * GROUP + within % height) * COLUMNS + tl.arange(0, COLUMNS)
    other = within // height * SIZES + tl.arange(0, SIZES)
    first = tl.load(first_ptr + expert)
    count = tl.load(counts_ptr + expert)
    place = tl.arange(0, DEPTH)
    here = (column < columns)[:, None]
    there = (other < size)[None, :]
    grad_at = grads_ptr + column[:, None]
    row_at = rows_ptr + other[None, :]
    total = tl.zeros((COLUMNS, SIZES), dtype=tl.float32)
    for begin in range(0, count, DEPTH):
        held = begin + place < count
        entry = first + begin + place
        if slots_ptr is not None:
            entry = tl.load(slots_ptr + entry, mask=held, other=0)
        of_grads = (entry // divisor).to(tl.int64) * grad_stride
        of_rows = (entry // row_divisor).to(tl.int64) * row_stride
        grads = tl.load(grad_at + of_grads[None, :], mask=here & held[None, :], other=0.0)
        rows = tl.load(row_at + of_rows[:, None], mask=there & held[:, None], other=0.0)
        total = tl.dot(grads, rows, total, input_precision="ieee")
    at = out_ptr + (expert.to(tl.int64) * columns + column)[:, None] * size + other[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=here & there)


@triton.jit
def level_and_slope(x, NAME: tl.constexpr, ALPHA: tl.constexpr):
    """An activation's curve at float32 values, and its derivative. NaN stays NaN."""
    if NAME == "silu":
        share = 1.0 / (1.0 + tl.exp(-ALPHA * x))
        level = x * share
        slope = share * (1.0 + ALPHA * x * (1.0 - share))
    elif NAME == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        level = x * share
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == "gelu_tanh":  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        level = x * share
        slope = share + level * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        level = positive * positive
        slope = 2.0 * positive
    return level, slope


@triton.jit(do_not_specialize=["num_rows"])
def activate_backward_kernel(
    rows_ptr,
    grad_ptr,  # [num_rows, columns]
    factors_ptr,  # float32 [num_rows] or None for ones
    of_rows_ptr,  # the gradient of rows, contiguous
    weighted_ptr,  # [num_rows, columns] or None: factors times what the activation leaves
    dots_ptr,  # float32 [num_rows] or None: the gradient of factors
    num_rows,
    columns,
    row_stride,
    grad_stride,
    GATED: tl.constexpr,
    NAME: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """All of ROWS rows of the backward of factors * activate(rows), COLUMNS at a time."""
    start(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = row < num_rows
    wide = 2 * columns if GATED else columns
    if factors_ptr is not None:
        factor = tl.load(factors_ptr + row, mask=held, other=0.0)[:, None]
    products = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, columns, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = held[:, None] & (column < columns)[None, :]
        at = rows_ptr + (row * row_stride)[:, None] + column[None, :]
        back = tl.load(grad_ptr + (row * grad_stride)[:, None] + column[None, :], mask=inside, other=0.0)
        back = back.to(tl.float32)
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        x = gate
        if LIMIT is not None:
            x = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        level, slope = level_and_slope(x, NAME, ALPHA)
        if LIMIT is not None:
            slope *= (gate <= LIMIT).to(tl.float32)
        result = level
        weighted = back
        if factors_ptr is not None:
            weighted = back * factor
        of_rows_at = of_rows_ptr + (row * wide)[:, None] + column[None, :]
        if GATED:
            given = tl.load(at + columns, mask=inside, other=0.0).to(tl.float32)
            up = given
            if LIMIT is not None:
                up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
                up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
            result = level * (up + BETA)
            slope *= up + BETA
            of_up = weighted * level
            if LIMIT is not None:
                of_up *= (tl.abs(given) <= LIMIT).to(tl.float32)
            tl.store(of_rows_at + columns, of_up.to(of_rows_ptr.dtype.element_ty), mask=inside)
        tl.store(of_rows_at, (weighted * slope).to(of_rows_ptr.dtype.element_ty), mask=inside)
        if weighted_ptr is not None:
            products += result * back
            if factors_ptr is not None:
                result *= factor
            weighted_at = weighted_ptr + (row * columns)[:, None] + column[None, :]
            tl.store(weighted_at, result.to(weighted_ptr.dtype.element_ty), mask=inside)
    if dots_ptr is not None:
        tl.store(dots_ptr + row, tl.sum(products, 1), mask=held)
