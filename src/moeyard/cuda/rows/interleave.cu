// Rows of 16-bit values as products with weights of 4 bits take them (experts_nibbles.cuh): in each 16 columns first the
// even pairs, then the odd ones. With `slots` row r is that of token slots[r] / divisor.

#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) interleave_kernel(const u8* rows, const int* slots, uint4* out,
                                                                      i64 num_rows, i64 blocks, i64 stride, i64 divisor) {
  wait_for_previous_launch();
  const u64 total = static_cast<u64>(num_rows) * blocks;  // of 16 columns
  for (u64 i = static_cast<u64>(blockIdx.x) * BLOCK + threadIdx.x; i < total; i += static_cast<u64>(gridDim.x) * BLOCK) {
    const u32 row = i / blocks, block = i - row * blocks;
    const u32 source = slots ? static_cast<u32>(__ldcg(slots + row)) / static_cast<u32>(divisor) : row;
    const u64 from = reinterpret_cast<u64>(rows) + static_cast<u64>(source) * stride + block * 32;
    uint4 first, second;
    load_word(first, from);
    load_word(second, from + 16);
    out[2 * i] = {first.x, first.z, second.x, second.z};
    out[2 * i + 1] = {first.y, first.w, second.y, second.w};
  }
}
