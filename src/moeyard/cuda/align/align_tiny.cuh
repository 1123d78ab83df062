// Alignment of at most 32 routes. A lane holds one of them, and what is one expert's in its first lane; every warp has
// a piece of one output, and its threads look their words up: no shared memory, no barrier.

#pragma once

#include "align.cuh"

// Calls body(lane) for the lanes of the routes, eight at a time.
template <typename Body>
__device__ __forceinline__ void for_every_route(u32 num_routes, Body body) {
#pragma unroll 1
  for (u32 lanes = 0; lanes < num_routes; lanes += 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) body(lanes + i);
  }
}

__device__ __forceinline__ void align_tiny(const Parameters& p) {
  const u32 lane = threadIdx.x & 31, num_warps = aligning_blocks() * (THREADS / 32);
  const u32 experts = p.num_local, num_routes = p.num_routes, capacity = p.capacity, block_size = p.block_size;
  wait_for_previous_launch();
  const int id = load_id(p.ids, lane, num_routes);
  asm volatile("" ::"l"(p.sorted_token_ids), "l"(p.expert_offsets), "l"(p.route_rows), "l"(p.capacity));
  const u32 num_blocks = blocks_of(capacity, p);
  const u32 expert_pieces = (experts + 31) / 32, slot_pieces = (capacity + 31) / 32;
  const u32 bucket = bucket_of(id, p);
  const u32 same = __match_any_sync(ALL, bucket), rank = __popc(same & lanes_below()), count = __popc(same);
  const bool held = bucket < experts, first = held && rank == 0;

  // bucket, count and blocks in one word; neither bucket nor blocks unless this lane is its expert's first
  const u32 word = first ? bucket << 12 | count << 6 | blocks_of(count, p) : ALL << 6;
  u32 first_block = 0;
  for_every_route(num_routes, [&](u32 r) {
    const u32 other = __shfl_sync(ALL, word, r);
    if (other < bucket << 12) first_block += other & 63;
  });
  const u32 place = held ? first_block * block_size + rank : ALL;

  for (u32 piece = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;; piece += num_warps) {
    if (piece < expert_pieces) {
      if (!WHOLE) continue;
      const u32 e = piece * 32 + lane;
      u32 before = 0, own = 0;
      for_every_route(num_routes, [&](u32 r) {
        const u32 other = __shfl_sync(ALL, word, r);
        if (other < e << 12) before += other & 63;
        if (other >> 12 == e) own = other >> 6 & 63;
      });
      if (e < experts) {
        p.expert_offsets[e] = before * block_size;
        p.expert_counts[e] = own;
      }
    } else if (piece - expert_pieces < slot_pieces) {
      const u32 slot = (piece - expert_pieces) * 32 + lane;
      u32 route = num_routes;
      for_every_route(num_routes, [&](u32 r) {
        if (__shfl_sync(ALL, place, r) == slot) route = r;
      });
      if (slot < capacity) p.sorted_token_ids[slot] = route;
    } else {
      const u32 block = (piece - expert_pieces - slot_pieces) * 32 + lane;
      if (block - lane == 0) {
        const u32 used = __reduce_add_sync(ALL, word & 63) * block_size;
        if (WHOLE && lane < num_routes) p.route_rows[lane] = place;
        if (WHOLE && lane == 0) p.expert_offsets[experts] = used;
        if (lane == 0) *p.num_tokens_post_padded = used;
      } else if (block - lane >= num_blocks) {
        break;
      }
      u32 expert = ALL;
      for_every_route(num_routes, [&](u32 r) {
        const u32 other = __shfl_sync(ALL, word, r), from = __shfl_sync(ALL, first_block, r);
        if (block - from < (other & 63)) expert = other >> 12;
      });
      if (block < num_blocks) p.expert_ids[block] = expert;
    }
  }
}
