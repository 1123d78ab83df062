// On a host: what few_tokens.cu and four_bits.cu need of rows.cuh, device.cuh and the compiler. Every lane is a fiber of one
// thread; lanes take turns from a random one on, and give way where lanes meet or wait.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 ALL = 0xffffffffu;
constexpr int FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2;
using std::max;
using std::min;

struct Index {
  u32 x;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
extern Index threadIdx, blockIdx, gridDim;
extern u8 shared[];
extern u32 words_of_lanes[32][32];

void __syncthreads();
void __syncwarp();

inline u32 lane_id() { return threadIdx.x & 31; }
inline u32 lanes_below() { return (1u << lane_id()) - 1; }
inline int __popc(u32 mask) { return __builtin_popcount(mask); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }

inline float __uint_as_float(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline u32 __float_as_uint(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float __int_as_float(int bits) { return __uint_as_float(bits); }

// To nearest, ties to even; saturated; 0 of NaN.
inline int __float2int_rn(float value) {
  if (value != value) return 0;
  if (value >= 2147483648.0f) return 0x7fffffff;
  return value < -2147483648.0f ? -0x7fffffff - 1 : static_cast<int>(std::nearbyint(value));
}

inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
  const u64 bytes = static_cast<u64>(high) << 32 | low;
  u32 picked = 0;
  for (int i = 0; i < 4; ++i) picked |= static_cast<u32>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return picked;
}

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<signed char>(a >> i) * static_cast<signed char>(b >> i);
  return sum;
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}

// A word of every lane of this warp, seen by `read`.
template <typename Read>
u32 exchange(u32 word, Read read) {
  u32* words = words_of_lanes[threadIdx.x >> 5];
  words[lane_id()] = word;
  __syncwarp();
  const u32 answer = read(words);
  __syncwarp();
  return answer;
}

inline float __shfl_xor_sync(u32, float value, int step) {
  const u32 other = lane_id() ^ step;
  return __uint_as_float(exchange(__float_as_uint(value), [=](const u32* words) { return words[other]; }));
}

inline u32 __shfl_xor_sync(u32, u32 value, u32 step) {
  const u32 other = lane_id() ^ step;
  return exchange(value, [=](const u32* words) { return words[other]; });
}

inline u32 __shfl_sync(u32, u32 value, u32 lane) {
  return exchange(value, [=](const u32* words) { return words[lane]; });
}

inline u32 __match_any_sync(u32, u32 value) {
  return exchange(value, [=](const u32* words) {
    u32 mask = 0;
    for (int i = 0; i < 32; ++i) mask |= (words[i] == value) << i;
    return mask;
  });
}

// The sum over this lane and those below it.
inline u32 scan_warp(u32 value, u32 lane) {
  return exchange(value, [=](const u32* words) {
    u32 sum = 0;
    for (u32 i = 0; i <= lane; ++i) sum += words[i];
    return sum;
  });
}

inline u32 __reduce_max_sync(u32, u32 value) {
  return exchange(value, [](const u32* words) { return *std::max_element(words, words + 32); });
}

inline u32 __ballot_sync(u32, bool vote) {
  return exchange(vote, [](const u32* words) {
    u32 mask = 0;
    for (int i = 0; i < 32; ++i) mask |= words[i] << i;
    return mask;
  });
}

template <int KIND>
float widen(u32 bits) {
  if (KIND == FLOAT32) return __uint_as_float(bits);
  if (KIND == BFLOAT16) return __uint_as_float(bits << 16);
  const u16 half = bits;
  _Float16 value;
  std::memcpy(&value, &half, 2);
  return value;
}

template <int KIND>
u32 narrow(float value) {
  const u32 bits = __float_as_uint(value);
  if (KIND == BFLOAT16) return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const _Float16 rounded = static_cast<_Float16>(value);
  u16 half;
  std::memcpy(&half, &rounded, 2);
  return half;
}

template <int KIND>
u32 narrow_pair(float low, float high) {
  return narrow<KIND>(low) | narrow<KIND>(high) << 16;
}

template <int BYTES>
union Piece {
  uint4 word;
  u32 words[4];
};

template <int KIND, int BYTES>
void widen_piece(const Piece<BYTES>& piece, float (&values)[8]) {
  for (int i = 0; i < 8; ++i) values[i] = widen<KIND>(piece.words[i / 2] >> 16 * (i & 1) & 0xffff);
}
