// Combine: what experts made of tokens, straight into the memory of the ranks whose tokens they are, and added there.
//
// The first `pushers` blocks send tile after tile, a flag each. The others add up this rank's own tokens, each tile once
// the flags of all ranks for it are here. So sums run while rows cross. A rank reads its own rows where they lie.
// grouped: one row per token and rank, added in rank order. EXACT: one per route, weighted and added in k order. Sums
// are float32; products and sums are rounded one by one, as in sum.cu.

#include "push.cuh"

constexpr u32 WARPS = BLOCK / 32, COUNT = LOADS, REACH = 32 * COUNT;  // words of 16 bytes of a piece that is sent
constexpr int KIND = ROW_KIND, VALUES = values_of<KIND, 16>;
constexpr bool BY_ROUTE = EXACT, WEIGHTED = WEIGHTS;
constexpr u32 WIDTH = ADDED;                // rows of a token that are added: ranks, or top_k
constexpr u32 BATCH = WIDTH < 8 ? WIDTH : 8;  // of these on their way at the same time,
constexpr u32 SUMS = WIDTH > 4 ? 1 : WIDTH > 2 ? 2 : 4;  // of so many words

extern "C" __global__ void __launch_bounds__(BLOCK, 2) push_back_kernel(
    const u64* table, u8* here, const u8* rows, const int* route_rows, u8* out, u64* trouble, i64 pushers_, i64 me_, i64 ranks_,
    i64 num_tokens, i64 max_tokens_, i64 tile_rows_, i64 tiles_, i64 top_k_, i64 words_, i64 first_slot, i64 num_slots,
    i64 slots_at, i64 factors_at, i64 masks_at, i64 back_at, i64 flags_at, i64 epoch_at, i64 timeout) {
  u64* bases = shared_words();
  int* sources = reinterpret_cast<int*>(bases + MOST_RANKS);  // of a tile that is sent: the row of each place, or -1
  const u32 me = me_, ranks = ranks_, tiles = tiles_, top_k = top_k_, words = words_, pushers = pushers_;
  const u32 max_tokens = max_tokens_, tile_rows = tile_rows_, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u32 entries = BY_ROUTE ? top_k : 1;  // places of a token
  u32* epochs = reinterpret_cast<u32*>(here + epoch_at);  // and behind it how many blocks have ended
  const u32 epoch = __ldcg(epochs) + 1;
  const int* slots = reinterpret_cast<const int*>(here + slots_at);
  load_bases(bases, table, ranks);

  const u32 others = ranks - 1;
  for (u32 item = blockIdx.x; blockIdx.x < pushers && item < others * tiles; item += pushers) {
    const u32 tile = item / others, rank = rank_after(me, 1 + item - tile * others, ranks);
    const u32 first = tile * tile_rows, count = min(tile_rows, max_tokens - first);
    const u64 token = static_cast<u64>(rank) * max_tokens + first;
    const u32 pieces = (words + REACH - 1) / REACH, parts = count * entries * pieces;
    auto load = [&](u32 part, u32 source, uint4(&word)[COUNT]) {
      const u32 begin = part % pieces * REACH + lane;
      const u64 from = reinterpret_cast<u64>(rows) + (static_cast<u64>(source) * words + begin) * 16;
#pragma unroll
      for (u32 i = 0; i < COUNT; ++i) {
        if (begin + i * 32 < words) load_word(word[i], from + i * 512);
      }
    };
    uint4 word[COUNT];
    if (!BY_ROUTE && warp < parts) load(warp, token + warp / pieces, word);  // on its way, wanted or not
    if constexpr (BY_ROUTE) {
      for (u32 i = threadIdx.x; i < count * top_k; i += BLOCK) sources[i] = route_rows[token * top_k + i];
    } else {
      for (u32 i = threadIdx.x; i < count; i += BLOCK) sources[i] = -1;
      __syncthreads();
      for (u32 i = threadIdx.x; i < count * top_k; i += BLOCK) {
        const int slot = slots[token * top_k + i];
        if (first_slot <= slot && slot < first_slot + num_slots) sources[i / top_k] = static_cast<int>(token + i / top_k);
      }
    }
    __syncthreads();
    const u64 place = BY_ROUTE ? static_cast<u64>(first) * top_k : static_cast<u64>(me) * max_tokens + first;
    for (u32 part = warp; part < parts; part += WARPS) {
      const u32 entry = part / pieces, begin = (part - entry * pieces) * REACH + lane;
      const int source = sources[entry];
      if (source < 0) continue;
      if (BY_ROUTE || part != warp) load(part, source, word);
      uint4* to = reinterpret_cast<uint4*>(bases[rank] + back_at + ((place + entry) * words + begin) * 16);
#pragma unroll
      for (u32 i = 0; i < COUNT; ++i) {
        if (begin + i * 32 < words) store_there(to + i * 32, word[i]);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) release_there(reinterpret_cast<u32*>(bases[rank] + flags_at) + me * tiles + tile, epoch);
  }

  const u32* masks = reinterpret_cast<const u32*>(here + masks_at);
  const float* factors = reinterpret_cast<const float*>(here + factors_at);
  for (u32 tile = blockIdx.x - pushers; blockIdx.x >= pushers && tile < tiles; tile += gridDim.x - pushers) {
    if (threadIdx.x < ranks && threadIdx.x != me) {
      await_flag(reinterpret_cast<u32*>(here + flags_at) + threadIdx.x * tiles + tile, epoch, timeout, trouble,
                 1ull << 32 | (threadIdx.x + 1));
    }
    __syncthreads();
    const u32 first = tile * tile_rows;
    const u32 full = first < num_tokens ? min(tile_rows, static_cast<u32>(num_tokens) - first) : 0;
    const u32 pieces = (words + 32 * SUMS - 1) / (32 * SUMS);
    for (u32 part = warp; part < full * pieces; part += WARPS) {
      const u32 row = part / pieces, begin = (part - row * pieces) * 32 * SUMS + lane;
      const u32 token = first + row, mask = BY_ROUTE ? 0 : masks[token];
      const u64 home = static_cast<u64>(me) * max_tokens + token;  // this token among those of all ranks
      float total[SUMS][VALUES] = {};
#pragma unroll 1
      for (u32 start = 0; start < WIDTH; start += BATCH) {
        Piece<16> taken[BATCH][SUMS];
        u64 from[BATCH];
#pragma unroll
        for (u32 b = 0; b < BATCH; ++b) {
          const u32 k = start + b;
          from[b] = 0;
          if (k >= WIDTH) continue;
          if constexpr (BY_ROUTE) {
            const int slot = slots[home * top_k + k];
            const bool mine = first_slot <= slot && slot < first_slot + num_slots;
            const u64 place = mine ? route_rows[home * top_k + k] : static_cast<u64>(token) * top_k + k;
            if (slot >= 0) from[b] = (mine ? reinterpret_cast<u64>(rows) : reinterpret_cast<u64>(here) + back_at) + place * words * 16;
          } else if (mask >> k & 1) {
            const u64 place = k == me ? home : static_cast<u64>(k) * max_tokens + token;
            from[b] = (k == me ? reinterpret_cast<u64>(rows) : reinterpret_cast<u64>(here) + back_at) + place * words * 16;
          }
#pragma unroll
          for (u32 i = 0; i < SUMS; ++i) {
            taken[b][i].word = {0, 0, 0, 0};
            if (from[b] && begin + i * 32 < words) taken[b][i].word = load_arrived(from[b] + (begin + i * 32) * 16ull);
          }
        }
#pragma unroll
        for (u32 b = 0; b < BATCH; ++b) {
          if (from[b] == 0) continue;  // an absent row adds 0, which changes no sum that began as +0
          const float factor = WEIGHTED ? factors[home * top_k + start + b] : 1.0f;
#pragma unroll
          for (u32 i = 0; i < SUMS; ++i) {
            float value[VALUES];
            widen_piece<KIND, 16>(taken[b][i], value);
#pragma unroll
            for (int v = 0; v < VALUES; ++v) {
              total[i][v] = __fadd_rn(total[i][v], WEIGHTED ? __fmul_rn(value[v], factor) : value[v]);
            }
          }
        }
      }
      uint4* to = reinterpret_cast<uint4*>(out) + static_cast<u64>(token) * words + begin;
#pragma unroll
      for (u32 i = 0; i < SUMS; ++i) {
        Piece<16> result;
        narrow_piece<KIND, 16>(total[i], result);
        if (begin + i * 32 < words) to[i * 32] = result.word;
      }
    }
  }

  __syncthreads();
  if (threadIdx.x == 0 && arrive_last(epochs + 1) == gridDim.x - 1) {  // so all blocks have read the epoch
    epochs[1] = 0;
    epochs[0] = epoch;
  }
}
