// What becomes of sums: bias, activation, the factor of a route, 16 bits.

#pragma once

#include "rows.cuh"

constexpr int IDENTITY = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU2 = 4;

// Of the activation (values.py); `limit` counts only where a kernel is compiled to clamp.
struct Curve {
  float alpha, beta, limit;
};

// x * sigmoid(y): exp(-y) of infinity gives 0 as it should.
__device__ __forceinline__ float times_sigmoid(float x, float y) { return __fdividef(x, 1.0f + __expf(-y)); }

// A NaN stays one, as in torch: hence comparisons where fminf would drop it.
template <int CURVE, bool LIMITED>
__device__ __forceinline__ float bend(float x, const Curve& curve) {
  if constexpr (LIMITED) x = x > curve.limit ? curve.limit : x;
  if constexpr (CURVE == SILU) return times_sigmoid(x, curve.alpha * x);
  if constexpr (CURVE == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  if constexpr (CURVE == GELU_TANH) return times_sigmoid(x, x * (1.5957691216f + 0.0713548163f * x * x));
  if constexpr (CURVE == RELU2) return x < 0.0f ? 0.0f : x * x;
  return x;
}

template <int CURVE, bool LIMITED>
__device__ __forceinline__ float bend(float gate, float up, const Curve& curve) {
  if constexpr (LIMITED) {
    up = up > curve.limit ? curve.limit : up;
    up = up < -curve.limit ? -curve.limit : up;
  }
  return bend<CURVE, LIMITED>(gate, curve) * (up + curve.beta);
}
