"""Triton kernels of the product and of what stands between two products. Sizes and strides count elements."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start(PDL: tl.constexpr):
    """With programmatic launch: waits for what earlier kernels write, then lets the next one's programs be placed."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def activated(gate, up, NAME: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr):
    """The activation of float32 blocks; `up` is None without a gate. NaN stays NaN."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if NAME == "silu":
        result = gate / (1.0 + tl.exp(-ALPHA * gate))
    elif NAME == "gelu":
        result = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
        result = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        positive = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        result = positive * positive
    if up is not None:
        if LIMIT is not None:
            up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        result = result * (up + BETA)
    return result


@triton.jit
def multiplied(weight, rows, total, SWAPPED: tl.constexpr, TURNED: tl.constexpr):
    """`total` plus the product of [COLUMNS, DEPTH] and [ROWS, DEPTH], which is [COLUMNS, ROWS] if swapped; if turned of
    weights [DEPTH, COLUMNS].
    """
    if SWAPPED:
        total = tl.dot(tl.trans(weight) if TURNED else weight, tl.trans(rows), total, input_precision="ieee")
    else:
        total = tl.dot(rows, weight if TURNED else tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit
def weight_tile(at, column, columns, depth, left, TURNED: tl.constexpr, EVEN: tl.constexpr):
    """Weights at `at`, [COLUMNS, DEPTH]; if turned [DEPTH, COLUMNS], zero past the last column. Of the sum's elements
    `left` are left; past them it is zero.
    """
    if TURNED:
        inside = (column < columns)[None, :]
        if not EVEN:
            inside = inside & (depth < left)[:, None]
        tile = tl.load(at, mask=inside, other=0.0)
    elif EVEN:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(depth < left)[None, :], other=0.0)
    return tile


@triton.jit
def tile_of_program(tiles_ptr, most_tiles, columns, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Expert (-1: no tile), first slot, number of slots and columns of a program; GROUP row tiles run side by side."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, COLUMNS)
    group = program // (GROUP * column_tiles)
    height = tl.minimum(most_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    tile = group * GROUP + within % height
    column = within // height * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + most_tiles + tile)
    count = tl.load(tiles_ptr + 2 * most_tiles + tile)
    return expert, first, count, column


@triton.jit
def finished(
    gate,
    up,
    bias_ptr,
    expert,
    bias_stride,
    weight_row,
    columns,
    factors_ptr,
    targets,
    GATED: tl.constexpr,
    NAME: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """[ROWS, COLUMNS] of sums ([COLUMNS, ROWS] if swapped), with biases, activation and factors by result row."""
    if bias_ptr is not None:
        bias_at = bias_ptr + expert.to(tl.int64) * bias_stride + weight_row
        bias = tl.load(bias_at).to(tl.float32)
        gate += bias[:, None] if SWAPPED else bias[None, :]
        if GATED:
            bias = tl.load(bias_at + columns).to(tl.float32)
            up += bias[:, None] if SWAPPED else bias[None, :]
    if NAME != "":
        gate = activated(gate, up if GATED else None, NAME, ALPHA, BETA, LIMIT)
    if factors_ptr is not None:
        factor = tl.load(factors_ptr + targets)
        gate *= factor[None, :] if SWAPPED else factor[:, None]
    return tl.trans(gate) if SWAPPED else gate


@triton.jit(do_not_specialize=["most_tiles", "divisor"])
def product_kernel(
    rows_ptr,
    weight_ptr,
    bias_ptr,  # [experts, columns (gate, then up)] or None
    factors_ptr,  # float32 by result row, or None
    routes_ptr,  # int32: the result row of a slot, and times divisor its row; None: slots are rows
    tiles_ptr,  # int32 [3, most_tiles]: expert (-1: no tile), first slot, number of slots
    out_ptr,
    most_tiles,
    columns,  # of the result
    size,
    row_stride,
    expert_stride,
    column_stride,  # from column to column of weights, or where they are turned from element to element of a sum
    bias_stride,
    out_stride,
    divisor,
    GATHER: tl.constexpr,  # rows are read by route, otherwise by slot
    SCATTER: tl.constexpr,  # results go to the rows that routes name, otherwise to slots
    GATED: tl.constexpr,
    NAME: tl.constexpr,  # of the activation, "" for none
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    EVEN: tl.constexpr,  # size is a multiple of DEPTH
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWAPPED: tl.constexpr,
    TURNED: tl.constexpr,  # weights lie as [experts, size, columns]
    GROUP: tl.constexpr,  # row tiles whose programs run side by side, to meet the same weights in L2
    PDL: tl.constexpr,
):
    """One tile of rows x expert weights. Past the last column loads repeat it; past the last row they are left out."""
    start(PDL)
    expert, first, count, column = tile_of_program(tiles_ptr, most_tiles, columns, COLUMNS, GROUP)
    if expert >= 0:
        place = tl.arange(0, ROWS)
        slots = first + tl.minimum(place, count - 1)
        targets = slots
        if routes_ptr is not None:
            targets = tl.load(routes_ptr + slots)
        sources = targets // divisor if GATHER else slots
        held = (place < count)[:, None]
        depth = tl.arange(0, DEPTH)
        row_at = rows_ptr + (sources.to(tl.int64) * row_stride)[:, None] + depth[None, :]
        weight_row = tl.minimum(column, columns - 1).to(tl.int64)
        weight_ptr += expert.to(tl.int64) * expert_stride
        if TURNED:
            gate_at = weight_ptr + (depth.to(tl.int64) * column_stride)[:, None] + column[None, :]
        else:
            gate_at = weight_ptr + (weight_row * column_stride)[:, None] + depth[None, :]
        if SWAPPED:
            gate = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
        else:
            gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        if GATED:
            if TURNED:
                up_at = gate_at + columns
            else:
                up_at = weight_ptr + ((weight_row + columns) * column_stride)[:, None] + depth[None, :]
            up = gate
        for begin in range(0, size, DEPTH):
            left = size - begin
            rows = tl.load(row_at, mask=held if EVEN else held & (depth < left)[None, :], other=0.0)
            tile = weight_tile(gate_at, column, columns, depth, left, TURNED, EVEN)
            gate = multiplied(tile, rows, gate, SWAPPED, TURNED)
            if GATED:
                tile = weight_tile(up_at, column, columns, depth, left, TURNED, EVEN)
                up = multiplied(tile, rows, up, SWAPPED, TURNED)
            row_at += DEPTH
            gate_at += DEPTH * column_stride if TURNED else DEPTH
            if GATED:
                up_at += DEPTH * column_stride if TURNED else DEPTH
        result = finished(
            gate, up if GATED else None, bias_ptr, expert, bias_stride, weight_row, columns, factors_ptr, targets,
            GATED, NAME, ALPHA, BETA, LIMIT, SWAPPED,
        )  # fmt: skip
        results = targets if SCATTER else slots
        out_at = out_ptr + (results.to(tl.int64) * out_stride)[:, None] + column[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=held & (column < columns)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def activate_kernel(
    rows_ptr,
    out_ptr,
    num_rows,
    columns,
    row_stride,
    GATED: tl.constexpr,
    NAME: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[num_rows, gate and up] -> [num_rows, columns], a program a block of both."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < columns)[None, :]
    at = rows_ptr + (row * row_stride)[:, None] + column[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(at + columns, mask=inside, other=0.0).to(tl.float32)
        result = activated(gate, up, NAME, ALPHA, BETA, LIMIT)
    else:
        result = activated(gate, None, NAME, ALPHA, BETA, LIMIT)
    tl.store(out_ptr + (row * columns)[:, None] + column[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weigh_kernel(rows_ptr, factors_ptr, out_ptr, columns, row_stride, top_k, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """One row per route: its token's row times the route's factor, rounded once."""
    start(PDL)
    route = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(rows_ptr + route // top_k * row_stride + column, mask=column < columns, other=0.0).to(tl.float32)
    value *= tl.load(factors_ptr + route)
    tl.store(out_ptr + route * columns + column, value.to(out_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def combine_kernel(
    rows_ptr,
    factors_ptr,  # float32 [num_tokens, top_k] or None
    route_rows_ptr,  # int32 [num_tokens, top_k]: the row of each route, -1 if it is dropped
    out_ptr,
    columns,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums each token's rows in float32 in the order of k; a dropped route adds nothing and is not read."""
    start(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(route_rows_ptr + token * TOP_K + k).to(tl.int64)
        held = (column < columns) & (row >= 0)
        value = tl.load(rows_ptr + row * columns + column, mask=held, other=0.0).to(tl.float32)
        if factors_ptr is not None:
            value = tl.where(row >= 0, value * tl.load(factors_ptr + token * TOP_K + k), 0.0)
        total += value
    tl.store(out_ptr + token * columns + column, total.to(out_ptr.dtype.element_ty), mask=column < columns)
