// On a host: what experts.cu needs of device.cuh and of the compiler. Every lane is a fiber of one thread; lanes take
// turns in random order, and give way where they meet or wait.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#define __device__
#define __global__
#define __shared__
#define __align__(n)
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 ALL = 0xffffffffu;
using std::max;
using std::min;

struct Index {
  u32 x;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
extern Index threadIdx, blockIdx, gridDim, blockDim;

void __syncthreads();
void __syncwarp();
u32 atomicAdd(u32* word, u32 value);
u32 __shfl_xor_sync(u32, u32 value, u32 mask);
bool __any_sync(u32, u32 value);
u32 __reduce_max_sync(u32, u32 value);
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
  const u64 both = u64(y) << 32 | x;
  u32 bytes = 0;
  for (u32 i = 0; i < 4; ++i) bytes |= u32(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return bytes;
}
void wait_for_previous_launch();
u32 scan_block(u32 value, u32* sums, u32& total);

inline void __trap() { std::abort(); }
inline int __clz(u32 bits) { return __builtin_clz(bits); }
inline float __int_as_float(i64 bits) {
  const u32 low = static_cast<u32>(bits);
  float value;
  std::memcpy(&value, &low, 4);
  return value;
}
inline float __uint_as_float(u32 bits) { return __int_as_float(bits); }
inline u32 __float_as_uint(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}
