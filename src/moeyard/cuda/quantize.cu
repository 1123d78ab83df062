// permute that quantises to float8_e4m3fn on its way: every row is read and quantised once and written to the slots of
// its routes, its scales beside it. scale = max(largest magnitude, 1e-10) / 448, value / scale rounded to nearest even
// and saturated; all in float32. One scale a row: a block has a row. One scale a group of 128: a warp has a piece.

#include "rows.cuh"

constexpr u32 WARPS = BLOCK / 32;
constexpr int KIND = ROW_KIND, BYTES = WORD, COUNT = LOADS;
constexpr int VALUES = values_of<KIND, BYTES>;  // and as many bytes of the result
constexpr bool GROUPED = GROUPS, HELD = WHOLE_ROW;  // held: the row of a block is in its registers
constexpr u32 TEAM = GROUPED ? 32 : BLOCK;  // threads that share a piece
constexpr u32 REACH = TEAM * COUNT;
constexpr u32 GROUP_LANES = 128 / VALUES;  // grouped: lanes that hold the values of one scale

typedef typename WordOf<BYTES>::Type Word;
typedef typename WordOf<VALUES>::Type Result;

// The bits of the largest magnitude: as integers, so that NaN is the largest.
__device__ __forceinline__ u32 largest_of(const Piece<BYTES>& piece) {
  float value[VALUES];
  widen_piece<KIND, BYTES>(piece, value);
  u32 largest = 0;
#pragma unroll
  for (int v = 0; v < VALUES; ++v) largest = max(largest, __float_as_uint(value[v]) & 0x7fffffff);
  return largest;
}

__device__ __forceinline__ float scale_of(u32 largest) {
  return __fdiv_rn(__uint_as_float(max(largest, __float_as_uint(1e-10f))), 448.0f);
}

__device__ __forceinline__ u32 to_e4m3(float value) {
#if __CUDA_ARCH__ >= 890
  u32 code;
  asm("{\n\t.reg .b16 pair;\n\tcvt.rn.satfinite.e4m3x2.f32 pair, %2, %1;\n\tcvt.u32.u16 %0, pair;\n\t}"
      : "=r"(code)
      : "f"(value), "f"(0.0f));
  return code;
#else
  const u32 bits = __float_as_uint(value), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7f;
  if (size < 0x3c800000) return sign | __float2int_rn(__uint_as_float(size) * 512.0f);  // below 2^-6: multiples of 2^-9
  return sign | min(((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3), 0x7eu);
#endif
}

__device__ __forceinline__ Result quantised(const Piece<BYTES>& piece, float scale) {
  float value[VALUES];
  widen_piece<KIND, BYTES>(piece, value);
  union {
    Result whole;
    u8 bytes[VALUES];
  } result;
#pragma unroll
  for (int v = 0; v < VALUES; ++v) result.bytes[v] = to_e4m3(__fdiv_rn(value[v], scale));
  return result.whole;
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCK < 512 ? 1024 / BLOCK : 1) quantize_kernel(
    const u8* rows, const int* route_rows, u8* out, float* scales, i64 num_tokens, i64 pieces, i64 magic, i64 shift,
    i64 top_k_, i64 words_, i64 stride) {
  const u32 top_k = top_k_, words = words_;
  extern __shared__ u32 largest_of_warp[];  // [32]
  u32 token = blockIdx.x, piece = 0;
  if (GROUPED && !find_piece({num_tokens, pieces, magic, shift}, WARPS, token, piece)) return;
  const u32 lane = threadIdx.x & 31, member = GROUPED ? lane : threadIdx.x, groups = words / GROUP_LANES;
  wait_for_previous_launch();
  const u64 from = reinterpret_cast<u64>(rows) + token * stride;
  const int* own = route_rows + static_cast<i64>(token) * top_k;
  const u32 first = piece * REACH + member, stop = GROUPED ? min(first + REACH, words) : words;
  Piece<BYTES> held[COUNT];
  auto load = [&](u32 start) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      held[i].word = Word();
      if (start + i * TEAM < words) load_word(held[i].word, from + (start + i * TEAM) * u64(BYTES));
    }
  };

  float scale = 0.0f;
  if constexpr (!GROUPED) {
    u32 largest = 0;
#pragma unroll 1
    for (u32 start = first; HELD ? start == first : start < words; start += REACH) {
      load(start);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) largest = max(largest, largest_of(held[i]));
    }
    if (threadIdx.x < 32) largest_of_warp[threadIdx.x] = 0;
    __syncthreads();
    largest = __reduce_max_sync(ALL, largest);
    if (lane == 0) largest_of_warp[threadIdx.x >> 5] = largest;
    __syncthreads();
    scale = scale_of(__reduce_max_sync(ALL, largest_of_warp[lane]));
    for (u32 k = threadIdx.x; k < top_k; k += BLOCK) {
      const int there = __ldg(own + k);
      if (there >= 0) scales[there] = scale;
    }
  }

#pragma unroll 1
  for (u32 start = first; start < stop; start += REACH) {
    if (GROUPED || !HELD) load(start);
    Result result[COUNT];
    float group_scale[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      group_scale[i] = scale;
      if constexpr (GROUPED) {
        u32 largest = largest_of(held[i]);
#pragma unroll
        for (u32 step = 1; step < GROUP_LANES; step *= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, step));
        group_scale[i] = scale_of(largest);
      }
      result[i] = quantised(held[i], group_scale[i]);
    }
#pragma unroll 1
    for (u32 k = 0; k < top_k; ++k) {
      const int there = __ldg(own + k);
      if (there < 0) continue;
      Result* to = reinterpret_cast<Result*>(out) + static_cast<i64>(there) * words + start;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const u32 at = start + i * TEAM;
        if (at >= words) continue;
        STORE(to + i * TEAM, result[i]);
        if (GROUPED && lane % GROUP_LANES == 0) scales[static_cast<i64>(there) * groups + at / GROUP_LANES] = group_scale[i];
      }
    }
  }
}
