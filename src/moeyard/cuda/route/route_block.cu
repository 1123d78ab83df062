// Routers for more experts than a warp holds, and for more groups than it has lanes: a block has a token, and its keys
// lie in shared memory. The same answers as route.cu.

#include "route.cuh"

using namespace router;

constexpr u32 THREADS = 256;

// The largest of a value of every thread. `shared` holds 8 words, which nothing else uses until the next barrier.
__device__ __forceinline__ u64 largest_of_block(u64 value, u64* shared) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(ALL, value, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (u32 i = 0; i < THREADS / 32; ++i) value = max(value, shared[i]);
  return value;
}

extern "C" __global__ void __launch_bounds__(THREADS) route_block_kernel(
    const u8* logits, const float* bias, const u8* is_padding, float* topk_weights, int* topk_ids, i64 num_tokens,
    i64 top_k_, i64 top_k_groups, i64 renormalize, i64 factor, i64 stride) {
  extern __shared__ u64 best_of_warp[];                    // [8]
  float* sums = reinterpret_cast<float*>(best_of_warp + 8);  // [8]
  u32* keys = reinterpret_cast<u32*>(sums + 8);            // [EXPERTS]
  u32* group_keys = keys + EXPERTS;                        // [NUM_GROUPS]
  const Router p = {logits, bias, is_padding, topk_weights, topk_ids, num_tokens, top_k_, top_k_groups, renormalize,
                    factor, stride};
  const u32 thread = threadIdx.x, token = blockIdx.x, top_k = top_k_;
  const float lowest = -__int_as_float(0x7f800000);
  wait_for_previous_launch();
  const u8* row = logits + token * stride;

  float largest = 0.0f, sum = 0.0f;
  if constexpr (SOFTMAX) {
    float mine = lowest;
    for (u32 e = thread; e < EXPERTS; e += THREADS) mine = fmaxf(mine, logit_at(row, e));
    largest = float_of(largest_of_block(key_of(mine), best_of_warp));
    for (u32 e = thread; e < EXPERTS; e += THREADS) sum += power_of_two((logit_at(row, e) - largest) * LOG2_E);
    sum = sum_warp(sum);
    if (thread % 32 == 0) sums[thread / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < THREADS / 32; ++i) sum += sums[i];
  }
  for (u32 e = thread; e < EXPERTS; e += THREADS) {
    const float logit = logit_at(row, e);
    keys[e] = key_of(BIASED ? score_of(logit, largest, sum) + __ldg(bias + e) : logit);
  }
  __syncthreads();

  if constexpr (NUM_GROUPS > 1) {
    for (u32 g = thread; g < NUM_GROUPS; g += THREADS) {
      u32 one = 0, two = 0;
      for (u32 e = g * GROUP; e < (g + 1) * GROUP; ++e) {
        two = max(two, min(one, keys[e]));
        one = max(one, keys[e]);
      }
      group_keys[g] = BIASED && GROUP > 1 ? key_of(float_of(one) + float_of(two)) : one;
    }
    __syncthreads();
    for (u32 g = thread; g < NUM_GROUPS; g += THREADS) {
      u32 better = 0;
      for (u32 other = 0; other < NUM_GROUPS; ++other) {
        if (group_keys[other] > group_keys[g] || (group_keys[other] == group_keys[g] && other < g)) ++better;
      }
      if (better < top_k_groups) continue;
      for (u32 e = g * GROUP; e < (g + 1) * GROUP; ++e) keys[e] = 0;
    }
  }

  u32 mine = 0;
#pragma unroll 1
  for (u32 k = 0; k < top_k; ++k) {
    __syncthreads();
    u64 best = 0;
    for (u32 e = thread; e < EXPERTS; e += THREADS) best = max(best, static_cast<u64>(keys[e]) << 32 | (EXPERTS - e));
    const u32 chosen = EXPERTS - static_cast<u32>(largest_of_block(best, best_of_warp));
    if (thread == 0) keys[chosen] = 0;
    if (k < 32) mine = thread == k ? chosen : mine;
    else if (thread == k % 32) topk_ids[static_cast<i64>(token) * top_k + k] = chosen;
  }
  if (thread < 32) finish(p, token, row, settle(p, token, thread, mine, sum), largest, sum);
}
