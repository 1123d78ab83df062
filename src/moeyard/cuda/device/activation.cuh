// The activation between the two products of an expert (values.Activation): clamp, curve, gate.

#pragma once

#include "rows.cuh"

constexpr int IDENTITY = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU2 = 4;

// Its numbers; `limit` counts only where a kernel is compiled to clamp.
struct Curve {
  float alpha, beta, limit;
};

// Where every result of a tile is bent, instructions of the special function unit, off by some 2^-22 of a value that is
// rounded to 16 bits; elsewhere the accurate functions.
struct Quick {
  static __device__ __forceinline__ float divide(float a, float b) { return __fdividef(a, b); }
  static __device__ __forceinline__ float exponential(float x) { return __expf(x); }
};
struct Accurate {
  static __device__ __forceinline__ float divide(float a, float b) { return a / b; }
  static __device__ __forceinline__ float exponential(float x) { return expf(x); }
};

// x * sigmoid(y): exp(-y) of infinity gives 0 as it should.
template <typename Math>
__device__ __forceinline__ float times_sigmoid(float x, float y) {
  return Math::divide(x, 1.0f + Math::exponential(-y));
}

// Without a gate. A NaN stays one, as in torch: hence comparisons where fminf would drop it.
template <typename Math, int CURVE, bool LIMITED>
__device__ __forceinline__ float bend(float x, const Curve& curve) {
  if constexpr (LIMITED) x = x > curve.limit ? curve.limit : x;
  if constexpr (CURVE == SILU) return times_sigmoid<Math>(x, curve.alpha * x);
  if constexpr (CURVE == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  if constexpr (CURVE == GELU_TANH) return times_sigmoid<Math>(x, x * (1.5957691216f + 0.0713548163f * x * x));
  if constexpr (CURVE == RELU2) return x < 0.0f ? 0.0f : x * x;
  return x;
}

template <typename Math, int CURVE, bool LIMITED>
__device__ __forceinline__ float bend(float gate, float up, const Curve& curve) {
  if constexpr (LIMITED) {
    up = up > curve.limit ? curve.limit : up;
    up = up < -curve.limit ? -curve.limit : up;
  }
  return bend<Math, CURVE, LIMITED>(gate, curve) * (up + curve.beta);
}
