// A warp routes a token; route.cu says how.

#pragma once

#include "route.cuh"

namespace router {

constexpr u32 LANES = LANES_A_GROUP;  // of a warp's lanes, for a group: a power of two
constexpr int PER = EXPERTS_A_LANE;
constexpr int LOADED = WORD;          // bytes of a load where all lanes have PER experts
constexpr bool FULL = ALL_LANES_FULL;
constexpr bool EXACT = !BIASED && KIND != FLOAT32;  // no widened 16-bit float has bits below
constexpr u32 BELOW = EXACT ? 0x1fff : EXPERTS <= 256 ? 0xff : EXPERTS <= 512 ? 0x1ff : 0x3ff;

// PER values in words of BYTES.
template <int ROW_KIND, int BYTES>
__device__ __forceinline__ void load_values(const void* from, float (&value)[PER]) {
  constexpr int VALUES = values_of<ROW_KIND, BYTES>;
  Piece<BYTES> piece[PER / VALUES];
#pragma unroll
  for (int i = 0; i < PER / VALUES; ++i) load_word(piece[i].word, reinterpret_cast<u64>(from) + i * BYTES);
#pragma unroll
  for (int i = 0; i < PER / VALUES; ++i) {
    float wide[VALUES];
    widen_piece<ROW_KIND, BYTES>(piece[i], wide);
#pragma unroll
    for (int v = 0; v < VALUES; ++v) value[i * VALUES + v] = wide[v];
  }
}

// Sorts words, the largest first (Batcher's merge exchange, Knuth 5.2.2 M): pairs (i, i + K) within runs of 2 * P.
template <int P, int K>
__device__ __forceinline__ void sort_words(u32 (&word)[PER]) {
#pragma unroll
  for (int i = 0; i + K < PER; ++i) {
    if (i >= K % P && (i - K % P) % (2 * K) < K && i / (2 * P) == (i + K) / (2 * P)) {
      const u32 larger = max(word[i], word[i + K]);
      word[i + K] = min(word[i], word[i + K]);
      word[i] = larger;
    }
  }
  if constexpr (K > 1) sort_words<P, K / 2>(word);
  else if constexpr (2 * P < PER) sort_words<2 * P, 2 * P>(word);
}

// The largest of keys [first, first + N) and, of equal ones, the first place.
template <int N>
__device__ __forceinline__ void find_best(const u32 (&key)[PER], int first, u32& best, u32& at) {
  if constexpr (N == 1) {
    best = key[first];
    at = first;
  } else {
    u32 later, later_at;
    find_best<(N + 1) / 2>(key, first, best, at);
    find_best<N / 2>(key, first + (N + 1) / 2, later, later_at);
    at = later > best ? later_at : at;
    best = max(best, later);
  }
}

// Whether the group of this lane is among the best. `one` and `two` are the largest keys of the lane; 0 is none.
__device__ __forceinline__ bool in_best_group(u32 one, u32 two, u32 top_k_groups) {
  const u32 group = (threadIdx.x & 31) / LANES;
#pragma unroll
  for (u32 step = 1; step < LANES; step *= 2) {
    const u32 other_one = __shfl_xor_sync(ALL, one, step);
    if constexpr (BIASED) two = max(min(one, other_one), max(two, __shfl_xor_sync(ALL, two, step)));
    one = max(one, other_one);
  }
  const u32 key = BIASED && GROUP > 1 ? key_of(float_of(one) + float_of(two)) : one;
  u32 better = 0;
#pragma unroll
  for (u32 g = 0; g < NUM_GROUPS; ++g) {
    const u32 other = __shfl_sync(ALL, key, g * LANES);
    if (other > key || (other == key && g < group)) ++better;
  }
  return better < top_k_groups;
}

// What a warp needs to know of a token after its choice: for the weights.
struct Chosen {
  const u8* row;
  int mine;  // this lane's expert, of the first 32
  float largest, sum;
};

__device__ __forceinline__ Chosen choose(const Router& p, u32 token) {
  const u32 lane = threadIdx.x & 31, top_k = p.top_k;
  const u8* row;
  float largest, sum;
  const u32 group = lane / LANES, first = group * GROUP + lane % LANES * PER;
  const u32 stop = FULL ? ALL : group < NUM_GROUPS ? (group + 1) * GROUP : 0;
  const float lowest = -__int_as_float(0x7f800000);
  row = p.logits + token * p.stride;
  float value[PER], added[PER];
  if constexpr (FULL) {
    load_values<KIND, LOADED>(row + first * SIZE, value);
    if constexpr (BIASED) load_values<FLOAT32, BIAS_WORD>(p.bias + first, added);
  } else {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      value[i] = first + i < stop ? logit_at(row, first + i) : lowest;
      if constexpr (BIASED) added[i] = first + i < stop ? __ldg(p.bias + first + i) : 0.0f;
    }
  }

  largest = sum = 0.0f;
  if constexpr (SOFTMAX) {
    largest = lowest;
#pragma unroll
    for (int i = 0; i < PER; ++i) largest = fmaxf(largest, value[i]);
    largest = float_of(__reduce_max_sync(ALL, key_of(largest)));
#pragma unroll
    for (int i = 0; i < PER; ++i) sum += power_of_two((value[i] - largest) * LOG2_E);
    sum = sum_warp(sum);
  }
  const float inverse_sum = reciprocal(sum);
  u32 key[PER], word[PER];
  bool whole = true;  // whether words leave out nothing of any key
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    key[i] = first + i < stop ? key_of(ranked_by(value[i], BIASED ? added[i] : 0.0f, largest, inverse_sum)) : 0;
    word[i] = key[i] ? (key[i] & ~BELOW) | (BELOW - first - i) : 0;
    whole = whole && (key[i] & BELOW) == (static_cast<int>(key[i]) < 0 ? 0 : key[i] ? BELOW : 0);
  }
  if constexpr (NUM_GROUPS > 1) {
    u32 one = 0, two = 0;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if constexpr (BIASED) two = max(two, min(one, key[i]));
      one = max(one, key[i]);
    }
    if (!in_best_group(one, two, p.top_k_groups)) {
#pragma unroll
      for (int i = 0; i < PER; ++i) key[i] = word[i] = 0;
    }
  }
  if constexpr (PER > 1) sort_words<1, 1>(word);

  u32 mine = 0, taken = 0, before = ALL;
  auto take = [&](u32 k, u32 chosen) {
    if (k < 32) mine = lane == k ? chosen : mine;
    else if (lane == k % 32) p.topk_ids[static_cast<i64>(token) * top_k + k] = chosen;
  };
  bool close = false;  // whether two of the best, or the last of them and the next, have the same bits above
#pragma unroll 1
  while (true) {
    const u32 best = __reduce_max_sync(ALL, word[0]);
    const bool alike = !EXACT && ((best ^ before) & ~BELOW) == 0;
    if (taken >= top_k && (!alike || taken >= 32)) {
      close = close || alike;
      break;
    }
    close = close || alike;
    before = best;
    take(taken++, BELOW - (best & BELOW));
    if (EXACT && taken == top_k) break;
    const bool gives = word[0] == best;
#pragma unroll
    for (int i = 0; i + 1 < PER; ++i) word[i] = gives ? word[i + 1] : word[i];
    if (gives) word[PER - 1] = 0;
  }
  if (!EXACT && close && !__all_sync(ALL, whole)) {
    if (taken < 32) {  // those that are alike are all here: ranked by whole keys
      u32 own = 0, rank = 0;
      const float bias = BIASED && lane < taken ? __ldg(p.bias + mine) : 0.0f;
      if (lane < taken) own = key_of(ranked_by(logit_at(row, mine), bias, largest, inverse_sum));
#pragma unroll 1
      for (u32 k = 0; k < taken; ++k) {
        const u32 other = __shfl_sync(ALL, own, k), its = __shfl_sync(ALL, mine, k);
        if (other > own || (other == own && its < mine)) ++rank;
      }
      u32 settled = 0;
#pragma unroll 1
      for (u32 k = 0; k < taken; ++k) {
        const u32 its_rank = __shfl_sync(ALL, rank, k), its = __shfl_sync(ALL, mine, k);
        if (its_rank == lane) settled = its;
      }
      mine = settled;
    } else {  // again, by whole keys: of several lanes with the largest the lowest gives
#pragma unroll 1
      for (u32 k = 0; k < top_k; ++k) {
        u32 best, at;
        find_best<PER>(key, 0, best, at);
        const u32 winner = __ffs(__ballot_sync(ALL, best == __reduce_max_sync(ALL, best))) - 1;
        take(k, __shfl_sync(ALL, first + at, winner));
        if (lane != winner) at = PER;
#pragma unroll
        for (int i = 0; i < PER; ++i) key[i] = at == i ? 0 : key[i];
      }
    }
  }
  return {row, settle(p, token, lane, mine, sum), largest, sum};
}

__device__ __forceinline__ void finish(const Router& p, u32 token, const Chosen& chosen) {
  finish(p, token, chosen.row, chosen.mine, chosen.largest, chosen.sum);
}

}  // namespace router
