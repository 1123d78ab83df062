// What both directions of a push share: whose turn it is, and waits that end.

#pragma once

#include "peers.cuh"
#include "rows.cuh"

constexpr u32 MOST_RANKS = 32;

// The rank `step` places behind another, step <= ranks: so not all write to one at once, and each to itself last.
__device__ __forceinline__ u32 rank_after(u32 rank, u32 step, u32 ranks) {
  return rank + step < ranks ? rank + step : rank + step - ranks;
}

// Where the memory of each rank begins, from a table into shared memory; the block meets before it is read.
__device__ __forceinline__ void load_bases(u64* bases, const u64* table, u32 ranks) {
  if (threadIdx.x < ranks) bases[threadIdx.x] = table[threadIdx.x];
}

// Returns once the flag has reached the epoch, or gives up after `timeout` nanoseconds.
__device__ __forceinline__ void await_flag(const u32* flag, u32 epoch, u64 timeout, u64* trouble, u64 what) {
  if (static_cast<int>(acquire_here(flag) - epoch) >= 0) return;
  const u64 begin = nanoseconds();
  for (u32 polls = 1; static_cast<int>(acquire_here(flag) - epoch) < 0; ++polls) {  // the clock is slower than a poll
    if (polls % 64 == 0 && nanoseconds() - begin > timeout) give_up(trouble, what);
  }
}
