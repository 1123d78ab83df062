// What the router kernels share: keys that order floats as integers, exponentials, the weights of the chosen.

#pragma once

#include "rows.cuh"

namespace router {

constexpr int KIND = LOGIT_KIND;
constexpr bool SOFTMAX = SCORING == 0, SIGMOID = SCORING == 1, BIASED = SELECTION_BIAS;  // else sqrt(softplus)
constexpr u32 EXPERTS = NUM_EXPERTS, NUM_GROUPS = GROUPS, GROUP = EXPERTS / NUM_GROUPS;
constexpr u32 SIZE = KIND == FLOAT32 ? 4 : 2;  // bytes of a logit
constexpr float LOG2_E = 1.44269504f;

// 64-bit, so that the host can pass plain integers.
struct Router {
  const u8* logits;        // [num_tokens, EXPERTS]
  const float* bias;       // [EXPERTS] or null
  const u8* is_padding;    // [num_tokens] or null
  float* topk_weights;     // [num_tokens, top_k]
  int* topk_ids;           // [num_tokens, top_k]
  i64 num_tokens, top_k, top_k_groups, renormalize;
  i64 factor;              // the bits of a float32
  i64 stride;              // bytes from row to row
};

// Larger floats have larger keys: -0 is 0, NaN is -inf, and no float has key 0.
__device__ __forceinline__ u32 key_of(float value) {
  const u32 bits = __float_as_uint(value != value ? -__int_as_float(0x7f800000) : value + 0.0f);
  return bits ^ (static_cast<int>(bits) < 0 ? ALL : 0x80000000);
}

__device__ __forceinline__ float float_of(u32 key) { return __uint_as_float(key ^ (key >> 31 ? 0x80000000 : ALL)); }

__device__ __forceinline__ float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

// exp(value), what rounding takes from value * log2(e) put back: a few units in the last place, subnormals too.
__device__ __forceinline__ float exponential(float value) {
  const float exponent = value * LOG2_E, rest = fmaf(value, LOG2_E, -exponent) + value * 1.92596303e-8f;
  float power;
  asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return value > -105.0f && value < 89.0f ? fmaf(power, rest * 0.693147181f, power) : power;
}

__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}

// sqrt(log(1 + exp(value))); infinite for infinity, NaN for NaN.
__device__ __forceinline__ float sqrt_softplus(float value) {
  return sqrtf((value > 0.0f || value != value ? value : 0.0f) + log1pf(exponential(-fabsf(value))));
}

// What ranks an expert: its logit or, if there is a bias, score + bias, from plain exponentials: within 3e-7. A score
// that is NaN counts as 0. Rounded step by step, so that the same arguments always give the same bits.
__device__ __forceinline__ float ranked_by(float logit, float bias, float largest, float inverse_sum) {
  if constexpr (!BIASED) return logit;
  float score;
  if constexpr (SOFTMAX) score = __fmul_rn(power_of_two(__fmul_rn(__fsub_rn(logit, largest), LOG2_E)), inverse_sum);
  else if constexpr (SIGMOID) score = reciprocal(__fadd_rn(1.0f, power_of_two(__fmul_rn(-LOG2_E, logit))));
  else score = sqrt_softplus(logit);
  const bool finite = SOFTMAX || SIGMOID ? score == score : fabsf(score) < __int_as_float(0x7f800000);
  return __fadd_rn(finite ? score : 0.0f, bias);
}

__device__ __forceinline__ float logit_at(const u8* row, u32 expert) {
  u32 bits;
  if constexpr (SIZE == 4) bits = __ldg(reinterpret_cast<const u32*>(row) + expert);
  else bits = __ldg(reinterpret_cast<const u16*>(row) + expert);
  return widen<KIND>(bits);
}

// The score of a logit; `largest` and `sum` are those of its row's softmax. What is NaN or infinite counts as 0.
__device__ __forceinline__ float score_of(float logit, float largest, float sum) {
  float score;
  if constexpr (SOFTMAX) score = exponential(logit - largest) / sum;
  else if constexpr (SIGMOID) score = reciprocal(1.0f + exponential(-logit));
  else score = sqrt_softplus(logit);
  return (__float_as_uint(score) & 0x7fffffff) < 0x7f800000 ? score : 0.0f;
}

// The expert of this lane's route k, or -1: `id` unless the row has no value, or the token is padding.
__device__ __forceinline__ int settle(const Router& p, u32 token, u32 k, u32 id, float sum) {
  if (p.is_padding && p.is_padding[token]) return -1;
  return !SOFTMAX || BIASED || sum > 0.0f ? id : k;  // a row without a value ranks all experts alike
}

// A warp writes the weights and ids of a token. `mine` is what this lane settled on of the first 32; later choices are
// in topk_ids already, written by this lane.
__device__ __forceinline__ void finish(const Router& p, u32 token, const u8* row, int mine, float largest, float sum) {
  const u32 lane = threadIdx.x & 31, top_k = p.top_k;
  int* ids = p.topk_ids + static_cast<i64>(token) * top_k;
  float* weights = p.topk_weights + static_cast<i64>(token) * top_k;
  float total = 0.0f, weight = 0.0f;
#pragma unroll 1
  for (u32 k = lane; k < top_k; k += 32) {
    const int id = k < 32 ? mine : settle(p, token, k, ids[k], sum);
    weight = id < 0 ? 0.0f : score_of(logit_at(row, id), largest, sum);
    total += weight;
    ids[k] = id;
    if (top_k > 32) weights[k] = weight;
  }
  if (p.renormalize) {
    for (u32 step = 1; step < min(top_k, 32u); step *= 2) total += __shfl_xor_sync(ALL, total, step);
    if (!(total > 0.0f)) total = 1.0f;
  } else {
    total = 1.0f;
  }
  const float factor = __uint_as_float(p.factor);
#pragma unroll 1
  for (u32 k = lane; k < top_k; k += 32) weights[k] = (top_k > 32 ? weights[k] : weight) / total * factor;
}

}  // namespace router
