// Memory that GPUs of one host write to each other over NVLink: stores, flags, a clock that bounds waits.
//
// A flag is released after what it stands for, and acquired before that is read, both at the scope of the system. A
// barrier of the block before the release puts what all its threads stored in front of it. Flags hold epochs, which
// grow by one from launch to launch. So nothing is reset, and a graph may be replayed.

#pragma once

#include "device.cuh"

extern __shared__ u64 words_of_block[];

__device__ __forceinline__ u64* shared_words() { return words_of_block; }

__device__ __forceinline__ void store_there(uint4* to, uint4 word) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}

__device__ __forceinline__ void store_there(u32* to, u32 word) {
  asm volatile("st.global.L1::no_allocate.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

__device__ __forceinline__ void release_there(u32* flag, u32 epoch) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory");
}

__device__ __forceinline__ u32 acquire_here(const u32* flag) {
  u32 epoch;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(epoch) : "l"(flag) : "memory");
  return epoch;
}

// What peers may have written while this kernel runs: past the L1 cache, and not before a flag in the order written.
__device__ __forceinline__ uint4 load_arrived(u64 from) {
  uint4 word;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from)
               : "memory");
  return word;
}

// Blocks of this grid that came before.
__device__ __forceinline__ u32 arrive_last(u32* count) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before;
}

__device__ __forceinline__ u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Says on the host who did not answer, and ends all work of this process on the GPU: an error, where waiting on would be
// a hang and going on would be garbage.
__device__ __forceinline__ void give_up(u64* trouble, u64 what) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(trouble), "l"(what) : "memory");
  asm volatile("fence.acq_rel.sys;" ::: "memory");
  asm volatile("trap;");
}
