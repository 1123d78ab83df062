// Token alignment in one launch: topk_ids -> a whole Layout (see values.py), stable and without floating point,
// so the same ids always give the same bits.
//
// Every block learns the count of every expert, and how many of an expert's routes come before the block's own span
// of routes; then offsets, ranks and outputs follow without another word between blocks. How a block learns it is
// the main difference between the kernels:
//
//   tiny      at most a warp of routes: every warp has all of them in its lanes, and nothing is shared
//   alone     each block counts all routes itself: nothing is exchanged
//   cluster   the blocks of a cluster count a part each and post their counts to each other; every cluster does the
//             whole input again
//   grid      each block counts its own span; clusters add up and publish; one grid barrier (cooperative launch)
//   long      as grid, for spans of more than one tile, which is what a block's registers hold
//
// A warp ranks 32 routes at a time: each lane sets its bit in its bucket's word of shared memory, and the bits below
// its own are its rank, whatever order the bits were set in (measured on an H200, __match_any_sync takes two cycles
// for every distinct bucket, in one warp of a multiprocessor at a time: ten times as long). Spans of warps, blocks
// and parts are consecutive, so ranks ascend with the route. Grid and long sort a tile in shared memory, so that
// neighbouring threads write neighbouring slots.
//
// Small sizes take about five cycles an instruction, in one warp: hence the constants and the loops that are not
// unrolled.

#pragma nv_diag_suppress 177, 186  // names and comparisons that only some kernels need

#include "align_blocks.cuh"
#include "align_tiny.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, HOW >= GRID ? 1024 / THREADS : 1) align_kernel(
    const void* ids, const int* expert_map, int* sorted_token_ids, int* expert_ids, int* num_tokens_post_padded,
    i64* expert_offsets, int* expert_counts, int* route_rows, u32* exchange, u32* barrier, i64 num_routes,
    i64 num_experts, i64 num_local, i64 block_size, i64 capacity, i64 block_magic, i64 block_shift, i64 tiles) {
  const Parameters p = {ids, expert_map, sorted_token_ids, expert_ids, num_tokens_post_padded, expert_offsets,
                        expert_counts, route_rows, exchange, barrier, num_routes, num_experts, num_local, block_size,
                        capacity, block_magic, block_shift, tiles};
  if constexpr (HOW == TINY) align_tiny(p);
  else align(p);
}
