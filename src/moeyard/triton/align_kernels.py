"""Triton kernels that lay out routes by expert and cut the experts' slots into row tiles, with integers alone.

Routes stand in the order of their experts and, of one expert, in their own: the slot of a route is the number of
routes before it. Dropped routes come last and have no slot.
"""

import triton
import triton.language as tl

from moeyard.triton.kernels import start


@triton.jit
def expert_of(ids_ptr, map_ptr, routes, num_routes, num_experts, local, DROPPED: tl.constexpr):
    """The local expert of each route; DROPPED if it has none or is none."""
    ids = tl.load(ids_ptr + routes, mask=routes < num_routes, other=-1)
    held = (ids >= 0) & (ids < num_experts)
    if map_ptr is not None:
        ids = tl.load(map_ptr + ids, mask=held, other=-1)
        held = held & (ids >= 0)
    return tl.where(held & (ids < local), ids.to(tl.int32), DROPPED)


@triton.jit
def routes_before(
    ids_ptr,
    map_ptr,
    mine,
    experts,
    begin,
    end,
    num_routes,
    num_experts,
    local,
    OTHER_EXPERTS: tl.constexpr,  # routes of lower experts count as well
    DROPPED: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """For routes `mine` of `experts`: how many of the routes from begin to end come before them."""
    found = tl.zeros_like(mine)
    for at in range(begin, end, OTHERS):
        routes = at + tl.arange(0, OTHERS)
        theirs = expert_of(ids_ptr, map_ptr, routes, tl.minimum(num_routes, end), num_experts, local, DROPPED)
        before = (theirs[None, :] == experts[:, None]) & (routes[None, :] < mine[:, None])
        if OTHER_EXPERTS:
            before = before | (theirs[None, :] < experts[:, None])
        found += tl.sum(before.to(tl.int32), 1)
    return found


@triton.jit
def write_tiles(tiles_ptr, first, count, most_tiles, rows, EXPERTS: tl.constexpr):
    """int32 [3, most_tiles] of (expert, first slot, slots): every expert's slots in tiles of `rows`, then -1."""
    expert = tl.arange(0, EXPERTS)
    number = (count + rows - 1) // rows
    where = tl.cumsum(number, 0) - number
    for i in range(0, tl.max(number, 0)):
        at = where + i
        inside = (i < number) & (at < most_tiles)
        tl.store(tiles_ptr + at, expert, mask=inside)
        tl.store(tiles_ptr + most_tiles + at, first + i * rows, mask=inside)
        tl.store(tiles_ptr + 2 * most_tiles + at, tl.minimum(count - i * rows, rows), mask=inside)
    for begin in range(tl.sum(number, 0), most_tiles, 256):
        at = begin + tl.arange(0, 256)
        tl.store(tiles_ptr + at, tl.full((256,), -1, tl.int32), mask=at < most_tiles)


@triton.jit(do_not_specialize=["most_tiles", "rows"])
def tiles_kernel(first_ptr, counts_ptr, tiles_ptr, experts, most_tiles, rows, EXPERTS: tl.constexpr, PDL: tl.constexpr):
    """Row tiles of experts whose first slots (int64) and numbers of slots (int32) are known; one program."""
    start(PDL)
    expert = tl.arange(0, EXPERTS)
    first = tl.load(first_ptr + expert, mask=expert < experts, other=0).to(tl.int32)
    count = tl.load(counts_ptr + expert, mask=expert < experts, other=0)
    write_tiles(tiles_ptr, first, count, most_tiles, rows, EXPERTS)


@triton.jit(do_not_specialize=["num_routes", "num_experts", "local", "most_tiles", "rows"])
def align_kernel(
    ids_ptr,
    map_ptr,  # int32 [num_experts] or None
    sorted_ptr,  # int32: the route of each slot
    route_rows_ptr,  # int32: the slot of each route, -1 if it is dropped
    tiles_ptr,
    num_routes,
    num_experts,
    local,
    most_tiles,
    rows,
    MINE: tl.constexpr,
    OTHERS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The whole layout in one launch: every program compares its routes with all; the last one counts and cuts."""
    start(PDL)
    program = tl.program_id(0)
    if program < tl.num_programs(0) - 1:
        mine = program * MINE + tl.arange(0, MINE)
        experts = expert_of(ids_ptr, map_ptr, mine, num_routes, num_experts, local, EXPERTS)
        slots = routes_before(
            ids_ptr, map_ptr, mine, experts, 0, num_routes, num_routes, num_experts, local, True, EXPERTS, OTHERS
        )
        held = experts < EXPERTS
        tl.store(route_rows_ptr + mine, tl.where(held, slots, -1), mask=mine < num_routes)
        tl.store(sorted_ptr + slots, mine, mask=held)
    else:
        count = tl.zeros((EXPERTS,), dtype=tl.int32)
        for at in range(0, num_routes, 1024):
            routes = at + tl.arange(0, 1024)
            experts = expert_of(ids_ptr, map_ptr, routes, num_routes, num_experts, local, EXPERTS)
            count += tl.histogram(experts, EXPERTS, mask=experts < EXPERTS)
        write_tiles(tiles_ptr, tl.cumsum(count, 0) - count, count, most_tiles, rows, EXPERTS)


@triton.jit(do_not_specialize=["num_routes", "num_experts", "local"])
def count_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,  # int32 [chunks, EXPERTS]
    num_routes,
    num_experts,
    local,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Routes of each expert in each chunk, a program a chunk."""
    start(PDL)
    chunk = tl.program_id(0)
    routes = chunk * CHUNK + tl.arange(0, CHUNK)
    experts = expert_of(ids_ptr, map_ptr, routes, num_routes, num_experts, local, EXPERTS)
    count = tl.histogram(experts, EXPERTS, mask=experts < EXPERTS)
    tl.store(counts_ptr + chunk.to(tl.int64) * EXPERTS + tl.arange(0, EXPERTS), count)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    counts_ptr,  # becomes the number of routes of the expert in earlier chunks
    totals_ptr,  # int32 [EXPERTS]
    chunks,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums over chunks, a program some experts."""
    start(PDL)
    expert = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (expert < EXPERTS)[None, :]
        at = counts_ptr + (chunk.to(tl.int64) * EXPERTS)[:, None] + expert[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, tl.cumsum(count, 0) - count + total[None, :], mask=inside)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + expert, total, mask=expert < EXPERTS)


@triton.jit(do_not_specialize=["most_tiles", "rows"])
def first_kernel(
    totals_ptr,  # becomes the first slot of the expert
    tiles_ptr,
    most_tiles,
    rows,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """First slots and row tiles of all experts; one program."""
    start(PDL)
    expert = tl.arange(0, EXPERTS)
    count = tl.load(totals_ptr + expert)
    first = tl.cumsum(count, 0) - count
    tl.store(totals_ptr + expert, first)
    write_tiles(tiles_ptr, first, count, most_tiles, rows, EXPERTS)


@triton.jit(do_not_specialize=["num_routes", "num_experts", "local"])
def place_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    first_ptr,
    sorted_ptr,
    route_rows_ptr,
    num_routes,
    num_experts,
    local,
    CHUNK: tl.constexpr,
    MINE: tl.constexpr,
    OTHERS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Slots of MINE routes of a chunk: the expert's first, plus its earlier routes in other chunks and in this one."""
    start(PDL)
    mine = tl.program_id(0) * MINE + tl.arange(0, MINE)
    chunk = tl.program_id(0) * MINE // CHUNK
    experts = expert_of(ids_ptr, map_ptr, mine, num_routes, num_experts, local, EXPERTS)
    held = experts < EXPERTS
    begin = chunk * CHUNK
    slots = routes_before(
        ids_ptr, map_ptr, mine, experts, begin, begin + CHUNK, num_routes, num_experts, local, False, EXPERTS, OTHERS
    )
    slots += tl.load(first_ptr + experts, mask=held, other=0)
    slots += tl.load(counts_ptr + chunk.to(tl.int64) * EXPERTS + experts, mask=held, other=0)
    tl.store(route_rows_ptr + mine, tl.where(held, slots, -1), mask=mine < num_routes)
    tl.store(sorted_ptr + slots, mine, mask=held)
