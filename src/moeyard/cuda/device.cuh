// What kernels share: integer types, lanes, clusters, one grid barrier. Compiled by NVRTC: no other header is needed.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 ALL = 0xffffffffu;

__device__ __forceinline__ u32 lanes_below() {
  u32 mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}

// Programmatic dependent launch: what the launch before wrote may be read after this; a no-op otherwise.
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ u32 cluster_size() {
  u32 size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The word of another block of the cluster at the place of `mine` in this one's shared memory.
__device__ __forceinline__ u32 read_peer(const u32* mine, u32 rank) {
  u32 value = 0;
#if __CUDA_ARCH__ >= 900
  u32 address = static_cast<u32>(__cvta_generic_to_shared(mine)), peer;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(peer) : "memory");
#endif
  return value;
}

// All blocks of the grid arrive before any leaves. The last one resets the counter, so the grid may change its size.
__device__ void grid_barrier(u32* barrier) {
  __syncthreads();
  if (threadIdx.x == 0) {
    volatile u32* generation = barrier + 32;  // a line of its own: those who wait do not slow those who arrive
    u32 before = *generation;
    __threadfence();
    if (atomicAdd(barrier, 1u) == gridDim.x - 1) {
      *static_cast<volatile u32*>(barrier) = 0;
      __threadfence();
      *generation = before + 1;
    } else {
      while (*generation == before) {
      }
    }
    __threadfence();
  }
  __syncthreads();
}

// The sum over this lane and those below it.
__device__ __forceinline__ u32 scan_warp(u32 value, u32 lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    u32 other = __shfl_up_sync(ALL, value, step);
    if (lane >= step) value += other;
  }
  return value;
}
