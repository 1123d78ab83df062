// Routers: logits -> the top_k experts of every token and their weights, in one launch.
//
// A warp has a token: every lane a few consecutive experts, all of one group, so that lower lanes have lower experts.
// Every round takes the largest key left, by one reduction of the warp, from the lane that has it. Keys of 16-bit
// logits are words that no two experts share: the logit and, below it, the expert from the end; lanes sort theirs and
// give away the first. Keys of float32 (logits, or scores with their bias) fill a word: of several lanes with the
// largest one the lowest gives it away.

#include "route.cuh"

constexpr u32 LANES = LANES_A_GROUP;  // of a warp's lanes, for a group: a power of two
constexpr int PER = EXPERTS_A_LANE;
constexpr int LOADED = WORD;          // bytes of a load where all lanes have PER experts
constexpr bool FULL = ALL_LANES_FULL;
constexpr bool PACKED = !BIASED && KIND != FLOAT32;
constexpr u32 BELOW = 0x1fff;         // packed: bits that no widened 16-bit float has

// Sorts words, the largest first (Batcher's merge exchange, Knuth 5.2.2 M): pairs (i, i + K) within runs of 2 * P.
template <int P, int K>
__device__ __forceinline__ void exchange_words(u32 (&word)[PER]) {
#pragma unroll
  for (int i = 0; i + K < PER; ++i) {
    if (i >= K % P && (i - K % P) % (2 * K) < K && i / (2 * P) == (i + K) / (2 * P)) {
      const u32 larger = max(word[i], word[i + K]);
      word[i + K] = min(word[i], word[i + K]);
      word[i] = larger;
    }
  }
  if constexpr (K > 1) exchange_words<P, K / 2>(word);
  else if constexpr (2 * P < PER) exchange_words<2 * P, 2 * P>(word);
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

// Whether the group of this lane is among the best. `one` and `two` are the largest keys of the lane, as floats.
__device__ __forceinline__ bool in_best_group(float one, float two, u32 top_k_groups) {
  const u32 group = (threadIdx.x & 31) / LANES;
#pragma unroll
  for (u32 step = 1; step < LANES; step *= 2) {
    const float other_one = __shfl_xor_sync(ALL, one, step), other_two = __shfl_xor_sync(ALL, two, step);
    two = fmaxf(fminf(one, other_one), fmaxf(two, other_two));
    one = fmaxf(one, other_one);
  }
  const u32 key = key_of(BIASED && GROUP > 1 ? one + two : one);
  u32 better = 0;
#pragma unroll
  for (u32 g = 0; g < NUM_GROUPS; ++g) {
    const u32 other = __shfl_sync(ALL, key, g * LANES);
    if (other > key || (other == key && g < group)) ++better;
  }
  return better < top_k_groups;
}

extern "C" __global__ void __launch_bounds__(128) route_kernel(
    const u8* logits, const float* bias, const u8* is_padding, float* topk_weights, int* topk_ids, i64 num_tokens,
    i64 top_k_, i64 top_k_groups, i64 renormalize, i64 factor, i64 stride) {
  const Router p = {logits, bias, is_padding, topk_weights, topk_ids, num_tokens, top_k_, top_k_groups, renormalize,
                    factor, stride};
  const u32 lane = threadIdx.x & 31, token = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), top_k = top_k_;
  if (token >= num_tokens) return;
  const u32 group = lane / LANES, first = group * GROUP + lane % LANES * PER;
  const u32 stop = FULL ? ALL : group < NUM_GROUPS ? (group + 1) * GROUP : 0;
  const float lowest = -__int_as_float(0x7f800000);
  wait_for_previous_launch();

  const u8* row = logits + token * stride;
  float value[PER];
  if constexpr (FULL) {
    constexpr int VALUES = LOADED / SIZE;
    Piece<LOADED> piece[PER / VALUES];
#pragma unroll
    for (int i = 0; i < PER / VALUES; ++i) {
      load_word(piece[i].word, reinterpret_cast<u64>(row) + first * SIZE + i * LOADED);
    }
#pragma unroll
    for (int i = 0; i < PER / VALUES; ++i) {
      float wide[VALUES];
      widen_piece<KIND, LOADED>(piece[i], wide);
#pragma unroll
      for (int v = 0; v < VALUES; ++v) value[i * VALUES + v] = wide[v];
    }
  } else {
#pragma unroll
    for (int i = 0; i < PER; ++i) value[i] = first + i < stop ? logit_at(row, first + i) : lowest;
  }

  float largest = 0.0f, sum = 0.0f;
  if constexpr (!SIGMOID) {
    largest = lowest;
#pragma unroll
    for (int i = 0; i < PER; ++i) largest = fmaxf(largest, value[i]);
    largest = float_of(__reduce_max_sync(ALL, key_of(largest)));
#pragma unroll
    for (int i = 0; i < PER; ++i) sum += power_of_two((value[i] - largest) * LOG2_E);
    sum = sum_warp(sum);
  }
  u32 key[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    if constexpr (BIASED) {
      value[i] = score_of(value[i], largest, sum) + (first + i < min(stop, EXPERTS) ? __ldg(bias + first + i) : 0.0f);
    }
    key[i] = key_of(value[i]);
    if constexpr (PACKED) key[i] = (key[i] & ~BELOW) | (BELOW - first - i);
    if (first + i >= stop) key[i] = 0;
  }
  if constexpr (PACKED && PER > 1) exchange_words<1, 1>(key);

  if constexpr (NUM_GROUPS > 1) {
    float one = lowest, two = lowest;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const float mine = first + i < stop && value[i] == value[i] ? value[i] : lowest;
      two = fmaxf(two, fminf(one, mine));
      one = fmaxf(one, mine);
    }
    if (!in_best_group(one, two, top_k_groups)) {
#pragma unroll
      for (int i = 0; i < PER; ++i) key[i] = 0;
    }
  }

  u32 mine = 0;
#pragma unroll 1
  for (u32 k = 0; k < top_k; ++k) {
    u32 chosen;
    if constexpr (PACKED) {
      const u32 best = __reduce_max_sync(ALL, key[0]);
      chosen = BELOW - (best & BELOW);
      const bool gone = key[0] == best;
#pragma unroll
      for (int i = 0; i + 1 < PER; ++i) key[i] = gone ? key[i + 1] : key[i];
      if (gone) key[PER - 1] = 0;
    } else {
      u32 best, at;
      find_best<PER>(key, 0, best, at);
      const u32 winner = __ffs(__ballot_sync(ALL, best == __reduce_max_sync(ALL, best))) - 1;
      chosen = __shfl_sync(ALL, first + at, winner);
      if (lane != winner) at = PER;
#pragma unroll
      for (int i = 0; i < PER; ++i) key[i] = at == i ? 0 : key[i];
    }
    if (k < 32) mine = lane == k ? chosen : mine;
    else if (lane == k % 32) topk_ids[static_cast<i64>(token) * top_k + k] = chosen;
  }
  finish(p, token, row, mine, largest, sum);
}
