// Rows of 16-bit values as products with weights of 4 bits take them (experts_nibbles.cuh): in each 16 columns first the
// even pairs, then the odd ones. With `slots` row r is that of token slots[r] / divisor. A warp has a row at a time.

#include "rows.cuh"

constexpr u32 WARPS = BLOCK / 32;

extern "C" __global__ void __launch_bounds__(BLOCK) interleave_kernel(const u8* rows, const int* slots, const int* count,
                                                                      uint4* out, i64 num_rows, i64 blocks, i64 stride,
                                                                      i64 divisor) {
  wait_for_previous_launch();
  const u32 lane = threadIdx.x & 31, total = count ? __ldcg(count) : static_cast<u32>(num_rows);
#pragma unroll 1
  for (u32 row = blockIdx.x * WARPS + (threadIdx.x >> 5); row < total; row += gridDim.x * WARPS) {
    const u32 source = slots ? static_cast<u32>(__ldcg(slots + row)) / static_cast<u32>(divisor) : row;
    const u64 from = reinterpret_cast<u64>(rows) + source * static_cast<u64>(stride);
    uint4* to = out + row * static_cast<u64>(2 * blocks);
#pragma unroll 4
    for (u32 block = lane; block < blocks; block += 32) {  // of 16 columns
      uint4 first, second;
      load_word(first, from + block * 32);
      load_word(second, from + block * 32 + 16);
      to[2 * block] = {first.x, first.z, second.x, second.z};
      to[2 * block + 1] = {first.y, first.w, second.y, second.w};
    }
  }
}
