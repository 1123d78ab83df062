// Codes of 8 bits: the rule by which rows are quantised, and codes as pairs of 16-bit floats.
//
// scale = max(largest magnitude, 1e-10) / largest code, value / scale rounded to the nearest code, ties to even, and
// saturated; all in float32.

#pragma once

#include "rows.cuh"

constexpr int NO_CODE = 0, E4M3 = 1, INT8 = 2;

template <int CODE>
constexpr float largest_code = CODE == E4M3 ? 448.0f : 127.0f;

// NaN stays NaN.
template <int CODE>
__device__ __forceinline__ float scale_of_magnitude(float magnitude) {
  return __fdiv_rn(magnitude < 1e-10f ? 1e-10f : magnitude, largest_code<CODE>);
}

// Magnitudes of two 16-bit floats at a time, compared as integers, so that NaN is the largest.
__device__ __forceinline__ u32 larger_pair(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
  u32 both;
  asm("max.u16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  return both;
#else
  return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16;
#endif
}

// value / scale, rounded to nearest as the division is, from inverse = 1 / scale: two steps of Markstein's. A scale
// that is infinite or NaN makes 0 or NaN of what it divides. No scale of the rule is so small or large that steps lose
// bits that a code has.
__device__ __forceinline__ float quotient(float value, float scale, float inverse) {
  float result = value * inverse;
  if (scale < __int_as_float(0x7f800000)) {
    result = fmaf(-inverse, fmaf(result, scale, -value), result);
    result = fmaf(-inverse, fmaf(result, scale, -value), result);
  }
  return result;
}

// Two floats as two bytes of float8_e4m3fn, the low one first.
__device__ __forceinline__ u32 to_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
  u32 codes;
  asm("{\n\t.reg .b16 pair;\n\tcvt.rn.satfinite.e4m3x2.f32 pair, %2, %1;\n\tcvt.u32.u16 %0, pair;\n\t}"
      : "=r"(codes)
      : "f"(low), "f"(high));
  return codes;
#else
  auto code = [](float value) -> u32 {
    const u32 bits = __float_as_uint(value), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return 0x7f;
    if (size < 0x3c800000) return sign | __float2int_rn(__uint_as_float(size) * 512.0f);  // below 2^-6: steps of 2^-9
    return sign | min(((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3), 0x7eu);
  };
  return code(low) | code(high) << 8;
#endif
}

// The byte of a float; of a NaN the scale has to tell.
__device__ __forceinline__ u32 to_int8(float value) {
  return static_cast<u32>(max(-127, min(127, __float2int_rn(value)))) & 0xff;
}

// Four codes as two pairs of float16, exactly.
__device__ __forceinline__ void halves_of_e4m3(u32 codes, u32& low, u32& high) {
#if __CUDA_ARCH__ >= 890
  asm("{\n\t.reg .b16 first, second;\n\tmov.b32 {first, second}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, first;\n\tcvt.rn.f16x2.e4m3x2 %1, second;\n\t}"
      : "=r"(low), "=r"(high)
      : "r"(codes));
#else
  auto value = [](u32 code) -> float {
    const u32 size = code & 0x7f;
    const float magnitude = size == 0x7f ? __uint_as_float(0x7fc00000)
                            : size < 8   ? size * 0.001953125f
                                         : __uint_as_float((size << 20) + (120 << 23));
    return code & 0x80 ? -magnitude : magnitude;
  };
  low = narrow_pair<FLOAT16>(value(codes & 0xff), value(codes >> 8 & 0xff));
  high = narrow_pair<FLOAT16>(value(codes >> 16 & 0xff), value(codes >> 24));
#endif
}

// Two float16 as two bfloat16, which have bits for all of them: of values that codes have.
__device__ __forceinline__ u32 bfloats_of_halves(u32 pair) {
  return __byte_perm(__float_as_uint(widen<FLOAT16>(pair & 0xffff)), __float_as_uint(widen<FLOAT16>(pair >> 16)), 0x7632);
}

__device__ __forceinline__ u32 subtract_bfloats(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
  u32 pair;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
#else
  return narrow_pair<BFLOAT16>(widen<BFLOAT16>(a & 0xffff) - widen<BFLOAT16>(b & 0xffff),
                               widen<BFLOAT16>(a >> 16) - widen<BFLOAT16>(b >> 16));
#endif
}

__device__ __forceinline__ u32 subtract_halves(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 530
  u32 pair;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
#else
  return narrow_pair<FLOAT16>(widen<FLOAT16>(a & 0xffff) - widen<FLOAT16>(b & 0xffff),
                              widen<FLOAT16>(a >> 16) - widen<FLOAT16>(b >> 16));
#endif
}

// Four codes as two pairs of 16-bit floats of KIND, exactly.
template <int CODE, int KIND>
__device__ __forceinline__ void widen_codes(u32 codes, u32& low, u32& high) {
  if constexpr (CODE == E4M3) {
    halves_of_e4m3(codes, low, high);
    if constexpr (KIND == BFLOAT16) {
      low = bfloats_of_halves(low);
      high = bfloats_of_halves(high);
    }
  } else if constexpr (KIND == FLOAT16) {  // 0x6400 is 1024: the last eight bits count ones
    const u32 above = codes ^ 0x80808080;  // code + 128
    low = subtract_halves(__byte_perm(above, 0x64646464, 0x4140), 0x64806480);
    high = subtract_halves(__byte_perm(above, 0x64646464, 0x4342), 0x64806480);
  } else {  // 0x4300 is 128: the last seven bits count ones; the sign takes 128 or 256 away
    low = __byte_perm(codes, 0x43434343, 0x4140);
    high = __byte_perm(codes, 0x43434343, 0x4342);
    low = subtract_bfloats(low & 0xff7fff7f, low & 0xff80ff80);
    high = subtract_bfloats(high & 0xff7fff7f, high & 0xff80ff80);
  }
}
