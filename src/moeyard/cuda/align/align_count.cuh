// How a block ranks the routes that it places and counts those that it needs to know of.

#pragma once

#include "align.cuh"

constexpr int TINY = 0, ALONE = 1, CLUSTER = 2, GRID = 3, LONG = 4, HOW = EXCHANGE;
constexpr bool REPEATS = HOW == ALONE || HOW == CLUSTER;  // blocks count routes that other blocks count as well
static_assert(HOW != LONG || ROUNDS > 1, "rank_routes would leave bits behind for the next tile");
constexpr u32 TILE = 32 * WARPS * ROUNDS;                 // routes that a block places at a time
constexpr int BATCH = HOW == ALONE ? 2 : 4;               // groups of four ids that a thread has in flight

// Ranks the routes of a warp among those of its own bucket. `bits` are clear before and, if ROUNDS > 1, after;
// `counts` are those of the rounds so far.
__device__ __forceinline__ void rank_routes(const int (&id)[ROUNDS], u32 (&bucket)[ROUNDS], u32 (&rank)[ROUNDS],
                                            u32* bits, u16* counts, const Parameters& p) {
  const u32 experts = p.num_local, lane_bit = 1u << (threadIdx.x & 31);
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    bucket[r] = bucket_of(id[r], p);
    const bool held = bucket[r] < experts;
    if (held) atomicOr(bits + bucket[r], lane_bit);
    __syncwarp();
    const u32 same = held ? bits[bucket[r]] : 0;
    rank[r] = __popc(same & (lane_bit - 1));
    if constexpr (ROUNDS > 1) {
      const bool first = held && rank[r] == 0;
      if (held) rank[r] += counts[bucket[r]];
      __syncwarp();
      if (first) {
        counts[bucket[r]] = rank[r] + __popc(same);
        bits[bucket[r]] = 0;
      }
      __syncwarp();
    }
  }
}

// Turns an expert's counts (ROUNDS == 1: bits) of each warp into counts of the warps before; returns the sum.
__device__ __forceinline__ u32 sum_column(u32* bits, u16* counts, u32 experts) {
  constexpr u32 MOST = WARPS < 8 ? WARPS : 8;  // all loads of a batch before its stores
  u32 run = 0;
#pragma unroll
  for (u32 first = 0; first < WARPS; first += MOST) {
    u32 count[MOST];
#pragma unroll
    for (u32 i = 0; i < MOST; ++i) {
      const u32 at = (first + i) * experts;
      count[i] = first + i >= WARPS ? 0 : ROUNDS == 1 ? __popc(bits[at]) : counts[at];
    }
#pragma unroll
    for (u32 i = 0; i < MOST; ++i) {
      if (first + i < WARPS) counts[(first + i) * experts] = run;
      run += count[i];
    }
  }
  return run;
}

// Long counts its span from the end, so that what it places first is still in the L2 cache.
__device__ __forceinline__ u32 counted_at(u32 route, u32 start, u32 stop) {
  return HOW == LONG ? start + (stop - start + 3) / 4 * 4 - 4 - (route - start) : route;
}

// The first groups of four ids that this thread counts.
__device__ __forceinline__ void load_batch(int4 (&four)[BATCH], const Parameters& p, u32 start, u32 stop) {
#pragma unroll
  for (int k = 0; k < BATCH; ++k) {
    const u32 route = start + (threadIdx.x + k * THREADS) * 4;
    if (route < stop) four[k] = load_four(p.ids, counted_at(route, start, stop), stop);
  }
}

// Adds the routes of [start, stop) to two histograms: those before `border`, a multiple of four, and the others.
__device__ __forceinline__ void count_routes(int4 (&four)[BATCH], const Parameters& p, u32 start, u32 border, u32 stop,
                                             u32* before, u32* others) {
  const u32 experts = p.num_local;
  constexpr u32 STEP = 4 * BATCH * THREADS;
#pragma unroll 1
  for (u32 first = start + 4 * threadIdx.x; first < stop; first += STEP) {
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      const u32 route = first + k * 4 * THREADS;
      if (route >= stop) break;
      u32* histogram = route < border ? before : others;
      const u32 bucket[4] = {bucket_of(four[k].x, p), bucket_of(four[k].y, p), bucket_of(four[k].z, p),
                             bucket_of(four[k].w, p)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (bucket[i] < experts) atomicAdd(histogram + bucket[i], 1u);
      }
      if (route + STEP < stop) four[k] = load_four(p.ids, counted_at(route + STEP, start, stop), stop);
    }
  }
}
