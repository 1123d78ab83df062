// A warp routes a token; route.cu says how.

#pragma once

#include "route.cuh"

namespace router {

constexpr u32 LANES = LANES_A_GROUP;  // of a warp's lanes, for a group: a power of two
constexpr int PER = EXPERTS_A_LANE;
constexpr int LOADED = WORD;          // bytes of a load where all lanes have PER experts
constexpr bool FULL = ALL_LANES_FULL;
constexpr bool PACKED = !BIASED && KIND != FLOAT32;
constexpr u32 BELOW = 0x1fff;         // packed: bits that no widened 16-bit float has

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

// Orders two keys, and their places if a key says nothing of its expert: of equal keys the lower place comes first.
__device__ __forceinline__ void exchange(u32& key, u32& other, u32& place, u32& other_place) {
  if constexpr (PACKED) {
    const u32 larger = max(key, other);
    other = min(key, other);
    key = larger;
  } else {
    const bool swapped = other > key || (other == key && other_place < place);
    const u32 first = swapped ? other : key, first_place = swapped ? other_place : place;
    other = swapped ? key : other;
    other_place = swapped ? place : other_place;
    key = first;
    place = first_place;
  }
}

// Sorts keys, the largest first (Batcher's merge exchange, Knuth 5.2.2 M): pairs (i, i + K) within runs of 2 * P.
template <int P, int K>
__device__ __forceinline__ void sort_keys(u32 (&key)[PER], u32 (&place)[PER]) {
#pragma unroll
  for (int i = 0; i + K < PER; ++i) {
    if (i >= K % P && (i - K % P) % (2 * K) < K && i / (2 * P) == (i + K) / (2 * P)) {
      exchange(key[i], key[i + K], place[i], place[i + K]);
    }
  }
  if constexpr (K > 1) sort_keys<P, K / 2>(key, place);
  else if constexpr (2 * P < PER) sort_keys<2 * P, 2 * P>(key, place);
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
  const u32 key = BIASED && GROUP > 1 ? key_of(float_of(one) + float_of(two)) : PACKED ? one & ~BELOW : one;
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
  if constexpr (!SIGMOID) {
    largest = lowest;
#pragma unroll
    for (int i = 0; i < PER; ++i) largest = fmaxf(largest, value[i]);
    largest = float_of(__reduce_max_sync(ALL, key_of(largest)));
#pragma unroll
    for (int i = 0; i < PER; ++i) sum += power_of_two((value[i] - largest) * LOG2_E);
    sum = sum_warp(sum);
  }
  const float inverse_sum = reciprocal(sum);
  u32 key[PER], place[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    if constexpr (BIASED) value[i] = rough_score(value[i], largest, inverse_sum) + added[i];
    key[i] = key_of(value[i]);
    if constexpr (PACKED) key[i] = (key[i] & ~BELOW) | (BELOW - first - i);
    if (first + i >= stop) key[i] = 0;
    place[i] = i;
  }
  if constexpr (PER > 1) sort_keys<1, 1>(key, place);

  if constexpr (NUM_GROUPS > 1) {
    if (!in_best_group(key[0], PER > 1 ? key[PER > 1] : 0, p.top_k_groups)) {
#pragma unroll
      for (int i = 0; i < PER; ++i) key[i] = 0;
    }
  }

  u32 mine = 0;
#pragma unroll 1
  for (u32 k = 0; k < top_k; ++k) {
    const u32 best = __reduce_max_sync(ALL, key[0]);
    u32 chosen;
    bool gives = key[0] == best;
    if constexpr (PACKED) {
      chosen = BELOW - (best & BELOW);
    } else {
      const u32 winner = __ffs(__ballot_sync(ALL, gives)) - 1;
      chosen = __shfl_sync(ALL, first + place[0], winner);
      gives = lane == winner;
    }
#pragma unroll
    for (int i = 0; i + 1 < PER; ++i) {
      key[i] = gives ? key[i + 1] : key[i];
      if constexpr (!PACKED) place[i] = gives ? place[i + 1] : place[i];
    }
    if (gives) key[PER - 1] = 0;
    if (k < 32) mine = lane == k ? chosen : mine;
    else if (lane == k % 32) p.topk_ids[static_cast<i64>(token) * top_k + k] = chosen;
  }
  return {row, settle(p, token, lane, mine, sum), largest, sum};
}

__device__ __forceinline__ void finish(const Router& p, u32 token, const Chosen& chosen) {
  finish(p, token, chosen.row, chosen.mine, chosen.largest, chosen.sum);
}

}  // namespace router
