// Dispatch: a rank's tokens, straight into the memory of the ranks that have their experts.
//
// Token t of rank s has place s * max_tokens + t on every rank. So nothing is counted, and nobody waits before it sends.
// A row goes once to each rank that has one of its experts. Slots and router weights go to all; -1 where there is no
// token. Tokens are cut in tiles, a flag each. The first block returns when all tiles of all ranks are here.

#include "push.cuh"

constexpr u32 WARPS = BLOCK / 32, COUNT = LOADS, REACH = 32 * COUNT;  // words of 16 bytes of a piece of a row
typedef ID Id;

extern "C" __global__ void __launch_bounds__(BLOCK, 2) push_kernel(
    const u64* table, u8* here, const u8* rows, const u32* scales, const Id* ids, const u32* factors, const u32* places,
    const int* replicas, u64* trouble, i64 me_, i64 ranks_, i64 tensor, i64 num_tokens, i64 max_tokens, i64 tile_rows,
    i64 tiles_, i64 top_k_, i64 words_, i64 stride, i64 scale_words_, i64 num_experts, i64 most_replicas, i64 rows_at,
    i64 scales_at, i64 slots_at, i64 factors_at, i64 masks_at, i64 flags_at, i64 epoch_at, i64 timeout) {
  u64* bases = shared_words();
  u32* masks = reinterpret_cast<u32*>(bases + MOST_RANKS);  // of a tile: the ranks of each token
  const u32 me = me_, ranks = ranks_, tiles = tiles_, top_k = top_k_, words = words_, scale_words = scale_words_;
  const u32 pieces = (words + REACH - 1) / REACH, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  u32* epochs = reinterpret_cast<u32*>(here + epoch_at);
  const u32 epoch = __ldcg(epochs) + 1;
  load_bases(bases, table, ranks);

  for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const u32 first = tile * static_cast<u32>(tile_rows), place = me * static_cast<u32>(max_tokens) + first;
    const u32 count = min(static_cast<u32>(tile_rows), static_cast<u32>(max_tokens) - first);
    const u32 full = first < num_tokens ? min(count, static_cast<u32>(num_tokens) - first) : 0;
    auto load = [&](u32 item, uint4(&word)[COUNT]) {
      const u32 row = item / pieces, begin = (item - row * pieces) * REACH + lane;
      const u64 from = reinterpret_cast<u64>(rows) + (first + row) * static_cast<u64>(stride) + begin * 16ull;
#pragma unroll
      for (u32 i = 0; i < COUNT; ++i) {
        if (begin + i * 32 < words) load_word(word[i], from + i * 512);
      }
    };
    // The slot of route i of this tile, and the ranks that have its expert.
    u32 slot, factor, to_ranks;
    auto look_up = [&](u32 i) {
      slot = ~0u, factor = to_ranks = 0;
      if (i >= full * top_k) return;
      const i64 id = ids[static_cast<u64>(first) * top_k + i];
      factor = factors[static_cast<u64>(first) * top_k + i];
      if (id < 0 || id >= num_experts) return;
      const u32 turn = most_replicas > 1 ? (me + first + i / top_k) % static_cast<u32>(replicas[id]) : 0;
      const u32 found = places[id * most_replicas + turn], share = found >> 24;
      slot = found & 0xffffff;
      to_ranks = ALL >> (32 - tensor) << share * tensor;
    };
    uint4 word[COUNT];
    if (warp < full * pieces) load(warp, word);  // on its way, and so is the first route, before the block meets
    look_up(threadIdx.x);
    for (u32 i = threadIdx.x; i < count; i += BLOCK) masks[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < count * top_k; i += BLOCK) {
      if (i != threadIdx.x) look_up(i);
      if (to_ranks) atomicOr(masks + i / top_k, to_ranks);
      const u64 offset = (static_cast<u64>(place) * top_k + i) * 4;
      for (u32 step = 1; step <= ranks; ++step) {
        const u64 there = bases[rank_after(me, step, ranks)] + offset;
        store_there(reinterpret_cast<u32*>(there + slots_at), slot);
        store_there(reinterpret_cast<u32*>(there + factors_at), factor);
      }
    }
    for (u32 i = threadIdx.x; i < full * scale_words; i += BLOCK) {
      const u32 scale = scales[static_cast<u64>(first) * scale_words + i];
      const u64 offset = scales_at + (static_cast<u64>(place) * scale_words + i) * 4;
      for (u32 step = 1; step <= ranks; ++step) {
        store_there(reinterpret_cast<u32*>(bases[rank_after(me, step, ranks)] + offset), scale);
      }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < full; i += BLOCK) {
      store_there(reinterpret_cast<u32*>(here + masks_at) + first + i, masks[i]);
    }
    for (u32 item = warp; item < full * pieces; item += WARPS) {
      if (item != warp) load(item, word);
      const u32 row = item / pieces, begin = (item - row * pieces) * REACH + lane, mask = masks[row];
      const u64 offset = rows_at + (static_cast<u64>(place + row) * words + begin) * 16;
      for (u32 step = 1; step <= ranks; ++step) {
        const u32 rank = rank_after(me, step, ranks);
        if ((mask >> rank & 1) == 0) continue;
        uint4* to = reinterpret_cast<uint4*>(bases[rank] + offset);
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
          if (begin + i * 32 < words) store_there(to + i * 32, word[i]);
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < ranks) {
      const u32 rank = rank_after(me, 1 + threadIdx.x, ranks);
      release_there(reinterpret_cast<u32*>(bases[rank] + flags_at) + me * tiles + tile, epoch);
    }
  }

  if (blockIdx.x) return;
  for (u32 i = threadIdx.x; i < ranks * tiles; i += BLOCK) {
    await_flag(reinterpret_cast<u32*>(here + flags_at) + i, epoch, timeout, trouble, i / tiles + 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) *epochs = epoch;  // all blocks have read it, as their own flags are here
}
