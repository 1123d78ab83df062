// What the row kernels share: words as wide as alignment allows, 16-bit floats and back, which row a warp works on.

#pragma once

#include "device.cuh"

typedef unsigned char u8;

// A word of BYTES bytes, loaded and stored at once.
template <int BYTES>
struct WordOf;
template <>
struct WordOf<1> {
  typedef u8 Type;
};
template <>
struct WordOf<2> {
  typedef u16 Type;
};
template <>
struct WordOf<4> {
  typedef u32 Type;
};
template <>
struct WordOf<8> {
  typedef uint2 Type;
};
template <>
struct WordOf<16> {
  typedef uint4 Type;
};

// Loads of inputs, in the order written: a compiler that moves them to where values are needed leaves too few on their
// way.
__device__ __forceinline__ void load_word(u8& word, u64 from) {
  u32 wide;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(wide) : "l"(from));
  word = wide;
}
__device__ __forceinline__ void load_word(u16& word, u64 from) {
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(word) : "l"(from));
}
__device__ __forceinline__ void load_word(u32& word, u64 from) {
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(from));
}
__device__ __forceinline__ void load_word(uint2& word, u64 from) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(from));
}
__device__ __forceinline__ void load_word(uint4& word, u64 from) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from));
}

// How results are written: as any store, or (__stcs) as what is not read again while it is in the L2 cache.
template <typename Word>
__device__ __forceinline__ void store_word(Word* to, Word word) {
  *to = word;
}

// The float32 values of a word, and the word of float32 values.
constexpr int FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2;

__device__ __forceinline__ float half_to_float(u32 bits) {
  float value;
  asm("{\n\t.reg .b16 half;\n\tcvt.u16.u32 half, %1;\n\tcvt.f32.f16 %0, half;\n\t}" : "=f"(value) : "r"(bits));
  return value;
}

template <int KIND>
__device__ __forceinline__ float widen(u32 bits) {
  if constexpr (KIND == FLOAT32) return __uint_as_float(bits);
  if constexpr (KIND == BFLOAT16) return __uint_as_float(bits << 16);
  return half_to_float(bits);
}

template <int KIND>
__device__ __forceinline__ u32 narrow_pair(float low, float high) {
  u32 pair;
  if constexpr (KIND == BFLOAT16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// BYTES of a row of KIND in registers.
template <int BYTES>
union Piece {
  typename WordOf<BYTES>::Type word;
  u32 words[(BYTES + 3) / 4];
  u16 half;
};

template <int KIND, int BYTES>
constexpr int values_of = BYTES / (KIND == FLOAT32 ? 4 : 2);

template <int KIND, int BYTES>
__device__ __forceinline__ void widen_piece(const Piece<BYTES>& piece, float (&values)[values_of<KIND, BYTES>]) {
  if constexpr (BYTES == 2) {
    values[0] = widen<KIND>(piece.half);
  } else if constexpr (KIND == FLOAT32) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) values[i] = __uint_as_float(piece.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) {
      values[2 * i] = KIND == BFLOAT16 ? __uint_as_float(piece.words[i] << 16) : half_to_float(piece.words[i] & 0xffff);
      values[2 * i + 1] =
          KIND == BFLOAT16 ? __uint_as_float(piece.words[i] & 0xffff0000) : half_to_float(piece.words[i] >> 16);
    }
  }
}

template <int KIND, int BYTES>
__device__ __forceinline__ void narrow_piece(const float (&values)[values_of<KIND, BYTES>], Piece<BYTES>& piece) {
  if constexpr (BYTES == 2) {
    piece.half = narrow_pair<KIND>(values[0], 0.0f);
  } else if constexpr (KIND == FLOAT32) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) piece.words[i] = __float_as_uint(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) piece.words[i] = narrow_pair<KIND>(values[2 * i], values[2 * i + 1]);
  }
}

// Rows are cut in pieces of `reach` words, and every warp has one piece of one row: false past the last row.
// item / pieces = item * magic >> shift (`division` in parameters.py).
struct Cut {
  i64 rows, pieces, magic, shift;
};

__device__ __forceinline__ bool find_piece(const Cut& cut, u32 warps, u32& row, u32& piece) {
  const u32 item = blockIdx.x * warps + (threadIdx.x >> 5);
  row = static_cast<u64>(item) * static_cast<u32>(cut.magic) >> cut.shift;
  piece = item - row * static_cast<u32>(cut.pieces);
  return row < static_cast<u32>(cut.rows);
}
