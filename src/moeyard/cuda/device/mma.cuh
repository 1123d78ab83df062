// Products of a warp's registers on tensor cores, of 16-bit floats, summed in float32.

#pragma once

#include "rows.cuh"

// A product of 16 x 16 by 16 x 8. Lane 4g + t has of rows g and g + 8 of the first factor four values each, `a` and
// `b`, and of column g of the second the values of the same places, `x`. Its sums are those of row g in columns 2t and
// 2t + 1, then those of row g + 8. So the dot products of what lanes have themselves, added up over the four lanes of
// g, come to stand on the diagonal: where 2t or 2t + 1 is g.
template <int KIND>
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const u32 (&a)[2], const u32 (&b)[2], u32 x0, u32 x1) {
  if constexpr (KIND == BFLOAT16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(b[0]), "r"(a[1]), "r"(b[1]), "r"(x0), "r"(x1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(b[0]), "r"(a[1]), "r"(b[1]), "r"(x0), "r"(x1));
  }
}

// This lane's share of the diagonal, of rows g or g + 8; the shares of all lanes add up to it.
__device__ __forceinline__ float on_diagonal(const float (&sums)[4], bool lower) {
  const u32 lane = threadIdx.x & 31;
  return lane & 4 ? sums[2 * lower + 1] : sums[2 * lower];
}
__device__ __forceinline__ bool has_diagonal() {
  const u32 lane = threadIdx.x & 31;
  return (lane & 3) == lane >> 3;
}
