// What kernels share: integer types, lanes, scans, clusters, one grid barrier. Compiled by NVRTC: no other header is
// needed.

#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 ALL = 0xffffffffu;

__device__ __forceinline__ u32 lanes_below() {
  u32 mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}

// dividend / divisor rounded up, below 2^31, by a multiplication (Granlund and Montgomery 1994): the host gives
// (magic, shift) such that x / divisor = x * magic >> shift (`division` in parameters.py).
__device__ __forceinline__ u32 divide_up(u32 dividend, u32 magic, u32 shift) {
  const u32 full = static_cast<u64>(dividend - 1) * magic >> shift;
  return dividend ? full + 1 : 0;
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

// The sum over the threads below this one, and over all. `sums` holds 32 words, those past the last warp zero; nothing
// else may be written to it until the whole block has returned.
__device__ __forceinline__ u32 scan_block(u32 value, u32* sums, u32& total) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, through = scan_warp(value, lane);
  if (lane == 31) sums[warp] = through;
  __syncthreads();
  const u32 of_warp = sums[lane];
  total = __reduce_add_sync(ALL, of_warp);
  return __reduce_add_sync(ALL, lane < warp ? of_warp : 0) + through - value;
}

// Programmatic dependent launch: what the launch before wrote may be read after this; a no-op otherwise.
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Clusters: a block of an architecture that has none is a cluster of its own.

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ u32 cluster_number() {
  u32 number = blockIdx.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
#endif
  return number;
}

__device__ __forceinline__ u32 number_of_clusters() {
  u32 number = gridDim.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(number));
#endif
  return number;
}

// Words from every block of a cluster into every block's shared memory, which an mbarrier counts as they come
// (st.async): a barrier of the cluster would wait for all writes to global memory as well. First the block opens its
// mailboxes, then `greet_peers`, and `await_peers` before the first post; `await_mail` returns when `words` have
// come. `mailbox` is 8 bytes of shared memory, and only the first warp opens it.

__device__ __forceinline__ void open_mailbox(u64* mailbox, u32 words) {
#if __CUDA_ARCH__ >= 900
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(mailbox)), lane = threadIdx.x & 31;
  if (lane == 0) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncwarp();
  if (lane == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address), "r"(words * 4) : "memory");
  }
#endif
}

__device__ __forceinline__ void greet_peers() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void await_peers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Writes a word to where `place` is in the shared memory of another block.
__device__ __forceinline__ void post(u64* mailbox, u32* place, u32 rank, u32 word) {
#if __CUDA_ARCH__ >= 900
  const u32 here = static_cast<u32>(__cvta_generic_to_shared(place));
  const u32 box = static_cast<u32>(__cvta_generic_to_shared(mailbox));
  asm volatile(
      "{\n\t.reg .b32 there, its_box;\n\t"
      "mapa.shared::cluster.u32 there, %0, %2;\n\t"
      "mapa.shared::cluster.u32 its_box, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %3, [its_box];\n\t}" ::"r"(here),
      "r"(box), "r"(rank), "r"(word)
      : "memory");
#endif
}

__device__ __forceinline__ void await_mail(u64* mailbox) {
#if __CUDA_ARCH__ >= 900
  u32 address = static_cast<u32>(__cvta_generic_to_shared(mailbox)), done = 0;
  while (!done) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(address)
        : "memory");
  }
#endif
}

// A barrier of the whole grid in two halves, on one word that starts as zero. The first block adds what makes the
// grid's sum 2^31, so the top bit flips when the last one arrives and the other bits are zero again: nothing to
// reset, whatever the next grid's size (the scheme of cooperative groups). What a block wrote before it arrived, the
// others may read after they waited.
__device__ __forceinline__ u32 arrive_at_grid(u32* barrier) {
  u32 before = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    const u32 added = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(barrier), "r"(added) : "memory");
  }
  return before;
}

__device__ __forceinline__ void await_grid(u32* barrier, u32 before) {
  if (threadIdx.x == 0) {
    u32 now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(barrier) : "memory");
    } while (((now ^ before) & 0x80000000u) == 0);
  }
  __syncthreads();
}
