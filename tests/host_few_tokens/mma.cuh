// On a host: products of a warp's fragments, each lane's sums from all lanes' values.

#pragma once

#include "rows.cuh"

struct Fragments {
  u32 a[2], b[2], x[2];
};
extern Fragments fragments[32][32];

template <int KIND>
void multiply_tile(float (&sums)[4], const u32 (&a)[2], const u32 (&b)[2], u32 x0, u32 x1) {
  Fragments* lanes = fragments[threadIdx.x >> 5];
  lanes[lane_id()] = {{a[0], a[1]}, {b[0], b[1]}, {x0, x1}};
  __syncwarp();
  const u32 row = lane_id() / 4, column = lane_id() % 4 * 2;
  for (u32 i = 0; i < 4; ++i) {  // row, row, row + 8, row + 8 in columns column, column + 1, ...
    double sum = sums[i];
    for (u32 t = 0; t < 4; ++t) {
      const Fragments &of_row = lanes[row * 4 + t], &of_column = lanes[(column + i % 2) * 4 + t];
      for (u32 k = 0; k < 4; ++k) {
        const u32 first = (i < 2 ? of_row.a : of_row.b)[k / 2] >> k % 2 * 16 & 0xffff;
        const u32 second = of_column.x[k / 2] >> k % 2 * 16 & 0xffff;
        sum += static_cast<double>(widen<KIND>(first)) * widen<KIND>(second);
      }
    }
    sums[i] = static_cast<float>(sum);
  }
  __syncwarp();
}

inline float on_diagonal(const float (&sums)[4], bool lower) { return sums[2 * lower + (lane_id() >> 2 & 1)]; }
inline bool has_diagonal() { return (lane_id() & 3) == lane_id() >> 3; }
