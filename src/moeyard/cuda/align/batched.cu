// The layout of a batched buffer in one launch: expert_num_tokens -> a whole Layout, route e * rows + j being row j of
// expert e. Every block scans all counts itself, then fills pieces of the outputs.

#include "device.cuh"

constexpr u32 THREADS = BLOCK;
constexpr int PER = EXPERTS_A_THREAD;  // consecutive experts that a thread owns
constexpr u32 PIECE = 4 * THREADS;     // rows of one expert that a block fills at a time

extern "C" __global__ void __launch_bounds__(THREADS) batched_align_kernel(
    const int* expert_num_tokens, int* sorted_token_ids, int* expert_ids, int* num_tokens_post_padded,
    i64* expert_offsets, int* expert_counts, int* route_rows, i64 num_experts, i64 rows_, i64 block_size_,
    i64 capacity_, i64 block_magic, i64 block_shift, i64 pieces_) {
  extern __shared__ u32 shared[];
  u32* sums = shared;                       // [32]
  u32* counts = sums + 32;                  // [experts]
  u32* blocks = counts + num_experts;       // [experts + 1] first block of an expert
  const u32 thread = threadIdx.x, experts = num_experts, rows = rows_, block_size = block_size_, capacity = capacity_;
  const u32 pieces = pieces_, num_routes = experts * rows;  // pieces: those of one expert
  wait_for_previous_launch();

  u32 sum = 0, used_blocks, needed[PER];
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const u32 e = thread * PER + k;
    u32 count = 0;
    if (e < experts) counts[e] = count = min(max(__ldg(expert_num_tokens + e), 0), static_cast<int>(rows));
    sum += needed[k] = divide_up(count, block_magic, block_shift);
  }
  if (thread < 32) sums[thread] = 0;
  __syncthreads();
  sum = scan_block(sum, sums, used_blocks);
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const u32 e = thread * PER + k;
    if (e < experts) blocks[e] = sum;
    sum += needed[k];
  }
  if (thread == 0) blocks[experts] = used_blocks;
  __syncthreads();

  for (u32 item = blockIdx.x; item < experts * pieces; item += gridDim.x) {
    const u32 e = item / pieces, from = item % pieces * PIECE;
    const u32 count = counts[e], first = blocks[e] * block_size, padded = blocks[e + 1] * block_size - first;
    const u32 route = e * rows;
    if (from == 0 && thread == 0) {
      expert_offsets[e] = first;
      expert_counts[e] = count;
    }
#pragma unroll
    for (u32 i = 0; i < PIECE / THREADS; ++i) {
      const u32 row = from + i * THREADS + thread;
      if (row < rows) route_rows[route + row] = row < count ? first + row : ALL;
      if (row < padded) sorted_token_ids[first + row] = row < count ? route + row : num_routes;
    }
    // the blocks that start in this piece
    const u32 last = divide_up(min(from + PIECE, padded), block_magic, block_shift);
    for (u32 b = divide_up(from, block_magic, block_shift) + thread; b < last; b += THREADS) {
      expert_ids[blocks[e] + b] = e;
    }
  }

  const u32 grid_thread = blockIdx.x * THREADS + thread, grid_threads = gridDim.x * THREADS;
  for (u32 s = used_blocks * block_size + grid_thread; s < capacity; s += grid_threads) {
    sorted_token_ids[s] = num_routes;
  }
  const u32 num_blocks = divide_up(capacity, block_magic, block_shift);
  for (u32 b = used_blocks + grid_thread; b < num_blocks; b += grid_threads) expert_ids[b] = -1;
  if (grid_thread == 0) {
    expert_offsets[experts] = used_blocks * block_size;
    *num_tokens_post_padded = used_blocks * block_size;
  }
}
