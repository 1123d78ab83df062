// On a host: barriers, the copy engine and products of a warpgroup, as wgmma.cuh has them of the machine.

#pragma once

#include "rows.cuh"

struct alignas(64) TensorMap {
  u64 address;
  u64 strides[4];  // bytes, of all dimensions but the first
  u32 rank, sizes[5], box[5];
  u32 item;  // bytes of an element of what is not swizzled; 0: 16-bit values, which are
};
static_assert(sizeof(TensorMap) == 128, "as the driver's");

u32 shared_address(const void* pointer);
void open_barrier(u32 barrier, u32 count);
void publish_barriers();
void arrive(u32 barrier);
void arrive_and_expect(u32 barrier, u32 bytes);
void arrive_after_copies(u32 barrier);
void await_phase(u32 barrier, u32 parity);
void sync_warpgroup(u32 group);
void sync_loaders();
void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y, u32 z = 0, u32 v = 0, u32 w = 0, u64 policy = 0);
void copy_16_bytes(u32 to, const u8* from, u32 bytes);
void await_copies();
void store_transposed(u32 address, u32 values);
void store_transposed(u32 address, const uint4& values);
void show_shared_writes();
void copy_out(u16* to, u32 from, u32 bytes);
void commit_copies_out();
void await_copies_out();
uint4 load_shared(u32 address);
u32 load_shared_word(u32 address);
u32 load_shared_half(u32 address);
float2 load_shared_pair(u32 address);
void queue_product(int n, float* d, u64 a, u64 b, u32 adds);
void queue_held_product(int n, float* d, const u32* a, u64 b, u32 adds);
void commit_products();
void await_products(int pending);

inline u64 soon_forgotten() { return 0; }
inline void prefetch_map(const TensorMap&) {}
inline void show_memory_to_copies() {}
inline void begin_products() {}
typedef float Sum;
inline float float_of(float sum) { return sum; }
inline void settle(float&) {}
inline u32 kept(u32 value) { return value; }
inline u64 tile_descriptor(u32 address) {
  return u64(1) << 62 | u64(1024 >> 4) << 32 | u64(1) << 16 | (address & 0x3ffff) >> 4;
}
inline u64 blocks_descriptor(u32 address) {
  return u64(1) << 62 | u64(1024 >> 4) << 32 | u64(8192 >> 4) << 16 | (address & 0x3ffff) >> 4;
}
template <int PENDING>
void await_products() {
  await_products(PENDING);
}
template <int N, int COUNT>
void multiply(float (&d)[COUNT], u64 a, u64 b, u32 adds) {
  static_assert(N <= 2 * COUNT && N % 8 == 0, "a lane holds N / 2 values");
  queue_product(N, d, a, b, adds);
}
template <int N, int COUNT>
void multiply_held(float (&d)[COUNT], const u32 (&a)[4], u64 b, u32 adds) {
  static_assert(N <= 2 * COUNT && N % 16 == 0, "a lane holds N / 2 values");
  queue_held_product(N, d, a, b, adds);
}
template <int COUNT>
void keep_registers() {}
template <int COUNT>
void take_registers() {}
