// Bulk copies into shared memory, barriers that count their bytes, launches that overlap: compute capability 9.0.

#pragma once

#include "device.cuh"

typedef unsigned char u8;

// Kernels after this one in the stream may be placed from here on; they see what it wrote once they wait.
__device__ __forceinline__ void allow_next_launch() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void await_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ u32 shared_address(const void* place) {
  return static_cast<u32>(__cvta_generic_to_shared(place));
}

// Barriers of shared memory that count the bytes of bulk copies. One warp opens `count` of them; the others may use
// them after a __syncthreads.
__device__ __forceinline__ void open_barriers(u64* barriers, u32 count) {
  for (u32 i = threadIdx.x & 31; i < count; i += 32) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barriers + i)) : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncwarp();
}

__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void await_bytes(u32 barrier, u32 parity) {
  u32 done = 0;
  while (!done) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Bulk copies after this read what this thread may read by ordinary loads.
__device__ __forceinline__ void see_earlier_writes() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Addresses and `bytes` are multiples of 16.
__device__ __forceinline__ void copy_in(u32 to, const u8* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// The same for weights, which nobody reads again while they are in the L2 cache.
__device__ __forceinline__ void copy_weights_in(u32 to, const u8* from, u32 bytes, u32 barrier, u64 policy) {
#if EVICT_FIRST
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
#else
  copy_in(to, from, bytes, barrier);
#endif
}

__device__ __forceinline__ u64 weight_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
