// What the alignment kernels share: parameters, ids, the bucket of a route, whole blocks of a count.

#pragma once

#include "device.cuh"

// One kernel a compilation: what is known before comes as macros.
typedef ID Id;                       // int or i64
constexpr bool MAPPED = MAP;         // whether there is an expert_map
constexpr bool ALIGNED = ALIGN;      // whether ids start at a multiple of 16 bytes
#ifdef SHARED_IDS
constexpr bool IN_SHARED = true;      // ids are in shared memory, where their router put them
#else
constexpr bool IN_SHARED = false;
#endif
constexpr bool WHOLE = WHOLE_LAYOUT;  // false: the last three outputs are not written
constexpr u32 THREADS = BLOCK;
constexpr u32 CLUSTER_SIZE = BLOCKS_A_CLUSTER;
constexpr u32 WARPS = PLACING_WARPS;  // warps of a block that place routes
constexpr int ROUNDS = ROUTES_A_LANE;  // routes that each of their lanes holds at a time
constexpr int PER = EXPERTS_A_THREAD;  // consecutive experts that a thread owns

// 64-bit, so that the host can pass plain integers.
struct Parameters {
  const void* ids;           // [num_routes] int32 or int64
  const int* expert_map;     // [num_experts] or null
  int* sorted_token_ids;     // [capacity]
  int* expert_ids;           // [capacity / block_size]
  int* num_tokens_post_padded;
  i64* expert_offsets;       // [num_local + 1]
  int* expert_counts;        // [num_local]
  int* route_rows;           // [num_routes]
  u32* exchange;             // grid and long: [clusters, num_local] counts of a cluster's routes
  u32* barrier;              // grid and long: one word, see device.cuh
  i64 num_routes, num_experts, num_local, block_size, capacity;
  i64 block_magic, block_shift;  // x / block_size = x * block_magic >> block_shift for x below 2^31
  i64 tiles;                 // times that a block places routes: 1 unless long
};

// Blocks that align: one more routes, and has the weights to write, where every block routes all tokens.
__device__ __forceinline__ u32 aligning_blocks() {
#ifdef SHARED_IDS
  return gridDim.x - (BLOCKS_THAT_SHARE == 1 ? 1 : 0);
#else
  return gridDim.x;
#endif
}

// The local expert of a route, or num_local if the route is dropped. Negative ids are large when unsigned.
__device__ __forceinline__ u32 bucket_of(int id, const Parameters& p) {
  const u32 experts = p.num_local;
  if constexpr (!MAPPED) {
    const u32 limit = min(static_cast<u32>(p.num_experts), experts);
    return static_cast<u32>(id) < limit ? id : experts;
  }
  u32 local = static_cast<u32>(id) < static_cast<u32>(p.num_experts) ? __ldg(p.expert_map + id) : ALL;
  return min(local, experts);
}

// Ids of 64 bits: those that 32 bits do not hold are out of range like -1.
__device__ __forceinline__ int narrow(int id) { return id; }
__device__ __forceinline__ int narrow(i64 id) { return id == static_cast<int>(id) ? static_cast<int>(id) : -1; }

__device__ __forceinline__ int load_id(const void* ids, u32 route, u32 stop) {
  const Id* id = static_cast<const Id*>(ids) + route;
  return route < stop ? narrow(IN_SHARED ? *id : __ldg(id)) : -1;
}

__device__ __forceinline__ int4 load_whole(const int* ids) {
  const int4* four = reinterpret_cast<const int4*>(ids);
  return IN_SHARED ? *four : __ldg(four);
}

__device__ __forceinline__ int4 load_whole(const i64* ids) {
  const longlong2* pairs = reinterpret_cast<const longlong2*>(ids);
  const longlong2 low = __ldg(pairs), high = __ldg(pairs + 1);
  return make_int4(narrow(low.x), narrow(low.y), narrow(high.x), narrow(high.y));
}

// Four ids from a multiple of four on, at once where the address allows it.
__device__ __forceinline__ int4 load_four(const void* ids, u32 route, u32 stop) {
  if (ALIGNED && route + 4 <= stop) return load_whole(static_cast<const Id*>(ids) + route);
  return make_int4(load_id(ids, route, stop), load_id(ids, route + 1, stop), load_id(ids, route + 2, stop),
                   load_id(ids, route + 3, stop));
}

// Blocks of block_size that hold `count` rows.
__device__ __forceinline__ u32 blocks_of(u32 count, const Parameters& p) {
  return divide_up(count, p.block_magic, p.block_shift);
}
