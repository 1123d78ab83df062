// Codes of 4 bits, four to each half of a word as `pack.py` has them, as pairs of 16-bit floats; and their scales.

#pragma once

#include "codes.cuh"

constexpr int E8M0_SCALES = 3, E4M3_SCALES = 4;  // kinds of scales beside FLOAT32, BFLOAT16, FLOAT16

// Two 16-bit floats each: a * b + c of float16, and a * b of KIND, rounded once.
__device__ __forceinline__ u32 fma_halves(u32 a, u32 b, u32 c) {
#if __CUDA_ARCH__ >= 530
  u32 pair;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
#else
  return narrow_pair<FLOAT16>(fmaf(widen<FLOAT16>(a & 0xffff), widen<FLOAT16>(b & 0xffff), widen<FLOAT16>(c & 0xffff)),
                              fmaf(widen<FLOAT16>(a >> 16), widen<FLOAT16>(b >> 16), widen<FLOAT16>(c >> 16)));
#endif
}

template <int KIND>
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
  u32 pair;
  if constexpr (KIND == BFLOAT16) asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  else asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
#else
  return narrow_pair<KIND>(widen<KIND>(a & 0xffff) * widen<KIND>(b & 0xffff),
                           widen<KIND>(a >> 16) * widen<KIND>(b >> 16));
#endif
}

// Constants. If the compiler knew them, every use would have an instruction of its own that makes them.
struct Masks {
  u32 ones, sixteens;
};

__device__ __forceinline__ u32 unknown(u32 value) {
#if __CUDA_ARCH__
  value += blockIdx.y;  // 0
#endif
  return value;
}

// The codes s of a word's halves: of e2m1 as float16 times 2^-14 or as bfloat16 times 2^-126, of int4 less `zero`.
template <bool E2M1, int KIND>
__device__ __forceinline__ u32 widen_pair(u32 s, u32 word, u32 zero, const Masks& masks) {
  constexpr u32 SIZE_BITS = KIND == FLOAT16 ? 0x0e000e00 : 0x01c001c0, SIGN_BITS = 0x80008000;
  if constexpr (E2M1 && KIND == FLOAT16) {
    if (s == 0) return word & (SIZE_BITS | SIGN_BITS);
    if (s == 1) return word << 3 & (SIZE_BITS | SIGN_BITS);
    if (s == 2) return (word << 6 & SIZE_BITS) | (word << 1 & SIGN_BITS);
    return (word << 9 & SIZE_BITS) | (word << 2 & SIGN_BITS);
  } else if constexpr (E2M1) {
    if (s == 0) return (word >> 3 & SIZE_BITS) | (word & SIGN_BITS);
    if (s == 1) return (word & SIZE_BITS) | (word << 3 & SIGN_BITS);
    if (s == 2) return (word << 3 & SIZE_BITS) | (word << 1 & SIGN_BITS);
    return (word << 6 & SIZE_BITS) | (word << 2 & SIGN_BITS);
  } else if constexpr (KIND == FLOAT16) {  // 0x6400 is 1024: the last four bits count ones, the four before them sixteens
    const u32 own = s < 2 ? word : word >> 8;
    if (s % 2 == 0) return subtract_halves((own & masks.ones) | 0x64006400, 0x64006400 + zero * 0x10001);
    return fma_halves((own & masks.sixteens) | 0x64006400, 0x2c002c00, 0xd400d400 + zero * 0x100010);  // / 16 - 64 - zero
  } else {  // 0x4300 is 128: the last four bits count ones
    return subtract_bfloats((word >> 4 * s & masks.ones) | 0x43004300, 0x43004300 + zero * 0x10001);
  }
}

// e8m0, from where the byte lies as the exponent of a float32: 0 is a subnormal, 255 NaN, which infinity times 0 makes.
__device__ __forceinline__ float power_of_byte(u32 shifted) {
  const float power = __uint_as_float(max(shifted & 0x7f800000, 0x00400000u));
  return __fmaf_rn(power, 0.0f, power);
}
