// Alignment by blocks that each learn all counts; align.cu says how.

#pragma once

#include "align_count.cuh"

__device__ __forceinline__ void align(const Parameters& p) {
  extern __shared__ uint4 shared_words[];
  const u32 thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const u32 experts = p.num_local, block_size = p.block_size, num_routes = p.num_routes, capacity = p.capacity;
  const u32 rank_in_cluster = CLUSTER_SIZE > 1 ? cluster_rank() : 0;

  u64* mailbox = reinterpret_cast<u64*>(shared_words);   // [2]
  u32* sums = reinterpret_cast<u32*>(shared_words + 1);  // [32]
  u32* tile_sums = sums + 32;                            // [32]
  u32* counts = tile_sums + 32;                          // [experts]
  u32* before = counts + experts;                        // [experts] routes before this block's span
  u32* rest = before + experts;                          // [experts] other routes; grid: first staged one of a tile
  u32* bits = rest + experts;                            // [WARPS, experts] see rank_routes
  u16* table = reinterpret_cast<u16*>(bits + WARPS * experts);  // [WARPS, experts] routes of a warp, of those before it
  u32* firsts = bits + WARPS * experts + (WARPS * experts + 1) / 2;  // [experts] first slot of this block, less `rest`
  u32* blocks = firsts + experts;                        // [experts + 1] first block of an expert
  u32* inbox = blocks + experts + 1;                     // [CLUSTER_SIZE, experts] counts of the blocks of a cluster
  u32* answers = inbox + (CLUSTER_SIZE > 1 ? CLUSTER_SIZE * experts : 0);       // grid: [2, experts] all, before
  u32* staged = answers + (!REPEATS && CLUSTER_SIZE > 1 ? 2 * experts : 0);     // grid: [TILE] routes by bucket
  u32* staged_place = staged + TILE;                                            // grid: [TILE] their slots
  u32* own_bits = bits + warp * experts;
  u16* own_row = table + warp * experts;
  auto owner = [](u32 e) { return (e >> 5) % CLUSTER_SIZE; };  // grid: the block of a cluster that adds up an expert

  // which part of the routes this block counts, and which span of it this block places
  const u32 spans = HOW == CLUSTER ? number_of_clusters() : aligning_blocks();
  const u32 part = HOW == CLUSTER ? rank_in_cluster : 0;
  const u32 own_span = HOW == CLUSTER ? cluster_number() : blockIdx.x, span = HOW == LONG ? TILE * p.tiles : TILE;
  const u32 part_start = min(part * spans * span, num_routes), part_stop = min(part_start + spans * span, num_routes);
  const u32 start = min(part_start + own_span * span, num_routes), stop = min(start + span, num_routes);
  const u32 first_route = start + warp * 32 * ROUNDS + lane, warp_stop = warp < WARPS ? stop : 0;

  // ids are on their way while shared memory is cleared, and the later parameters come into the constant cache
  wait_for_previous_launch();
  int id[ROUNDS];
  int4 four[BATCH];
  const u32 counted = HOW == LONG ? start : part_start, counted_stop = HOW == LONG ? stop : part_stop;
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) id[r] = load_id(p.ids, first_route + r * 32, warp_stop);
  if constexpr (HOW != GRID) load_batch(four, p, counted, counted_stop);
  asm volatile("" ::"l"(p.sorted_token_ids), "l"(p.expert_offsets), "l"(p.route_rows), "l"(p.capacity), "l"(p.tiles));
  const u32 cleared = 64 + (3 + WARPS) * experts + (WARPS * experts + 1) / 2;
#pragma unroll 1
  for (u32 i = thread; i < (cleared + 3) / 4; i += THREADS) shared_words[1 + i] = make_uint4(0, 0, 0, 0);
  if constexpr (CLUSTER_SIZE > 1) {
    if (warp == 0) {
      const u32 groups = (experts + 31) / 32, own_groups = (groups + CLUSTER_SIZE - 1 - rank_in_cluster) / CLUSTER_SIZE;
      const u32 owned = own_groups * 32 - (owner(experts - 1) == rank_in_cluster ? groups * 32 - experts : 0);
      open_mailbox(mailbox, CLUSTER_SIZE * (REPEATS ? experts : owned));
      if constexpr (!REPEATS) open_mailbox(mailbox + 1, 2 * experts);
    }
    greet_peers();
  }
  __syncthreads();

  u32 bucket[ROUNDS], rank[ROUNDS];
  if constexpr (HOW != LONG) {
    if (warp < WARPS) rank_routes(id, bucket, rank, own_bits, own_row, p);
  }
  if constexpr (REPEATS) count_routes(four, p, counted, start, counted_stop, before, rest);
  if constexpr (HOW == LONG) count_routes(four, p, counted, stop, counted_stop, counts, counts);
  __syncthreads();

  // every owned expert's routes: those counted here, those before this block's span, those of this tile
  u32 count[PER], low[PER], in_tile[PER];
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const u32 e = thread * PER + k;
    count[k] = low[k] = in_tile[k] = 0;
    if (e < experts) {
      if constexpr (REPEATS) {
        low[k] = before[e];
        count[k] = low[k] + rest[e];
      }
      if constexpr (HOW == LONG) count[k] = counts[e];
      if constexpr (HOW == GRID) count[k] = in_tile[k] = sum_column(bits + e, table + e, experts);
      if constexpr (REPEATS && WARPS > 1) sum_column(bits + e, table + e, experts);
    }
  }
  if constexpr (CLUSTER_SIZE > 1) {
    await_peers();
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const u32 e = thread * PER + k;
      if (e >= experts) continue;
      u32* place = inbox + rank_in_cluster * experts + e;
      if constexpr (!REPEATS) post(mailbox, place, owner(e), count[k]);
#pragma unroll
      for (u32 r = 0; REPEATS && r < CLUSTER_SIZE; ++r) post(mailbox, place, r, count[k]);
    }
    await_mail(mailbox);
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const u32 e = thread * PER + k;
      if (e >= experts || (!REPEATS && owner(e) != rank_in_cluster)) continue;
      count[k] = 0;
#pragma unroll
      for (u32 r = 0; r < CLUSTER_SIZE; ++r) {
        const u32 value = inbox[r * experts + e];
        count[k] += value;
        if (REPEATS && r < rank_in_cluster) low[k] += value;
      }
    }
  }
  u32 staged_routes = 0, first_staged[PER];
  auto scan_tile = [&]() {
    u32 sum = 0;
#pragma unroll
    for (int k = 0; k < PER; ++k) sum += in_tile[k];
    sum = scan_block(sum, tile_sums, staged_routes);
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      first_staged[k] = sum;
      sum += in_tile[k];
    }
  };
  if constexpr (!REPEATS) {
    const u32 row = CLUSTER_SIZE > 1 ? cluster_number() : blockIdx.x, rows = aligning_blocks() / CLUSTER_SIZE;
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const u32 e = thread * PER + k;
      if (e < experts && owner(e) == rank_in_cluster) p.exchange[row * experts + e] = count[k];
    }
    const u32 ticket = arrive_at_grid(p.barrier);
    if constexpr (HOW == GRID) scan_tile();
    await_grid(p.barrier, ticket);
    if constexpr (CLUSTER_SIZE > 1) {  // owners read what clusters have, and tell every block of theirs
#pragma unroll
      for (int k = 0; k < PER; ++k) {
        const u32 e = thread * PER + k;
        if (e >= experts || owner(e) != rank_in_cluster) continue;
        u32 all = 0, below = 0;
#pragma unroll 16
        for (u32 b = 0; b < rows; ++b) {
          const u32 value = __ldcg(p.exchange + b * experts + e);
          all += value;
          if (b < row) below += value;
        }
#pragma unroll
        for (u32 r = 0; r < CLUSTER_SIZE; ++r) {
          post(mailbox + 1, answers + e, r, all);
          post(mailbox + 1, answers + experts + e, r, below);
          below += inbox[r * experts + e];
        }
      }
      await_mail(mailbox + 1);
    } else {
      const u32 lines = max(THREADS / experts, 1u), line = lines > 1 ? thread / experts : 0;
      const u32 step = lines > 1 ? experts : THREADS;
      for (u32 e = lines > 1 ? thread % experts : thread; e < experts && line < lines; e += step) {
        u32 all = 0, below = 0;
#pragma unroll 8
        for (u32 b = line; b < rows; b += lines) {
          const u32 value = __ldcg(p.exchange + b * experts + e);
          all += value;
          if (b < row) below += value;
        }
        atomicAdd(rest + e, all);
        atomicAdd(before + e, below);
      }
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const u32 e = thread * PER + k;
      count[k] = e >= experts ? 0 : CLUSTER_SIZE > 1 ? answers[e] : rest[e];
      low[k] = e >= experts ? 0 : CLUSTER_SIZE > 1 ? answers[experts + e] : before[e];
    }
  }

  // first block of every expert: an exclusive scan
  u32 sum = 0, used_blocks, padded[PER];
#pragma unroll
  for (int k = 0; k < PER; ++k) sum += padded[k] = blocks_of(count[k], p);
  sum = scan_block(sum, sums, used_blocks);
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const u32 e = thread * PER + k;
    if (e < experts) {
      counts[e] = count[k];
      blocks[e] = sum;
      firsts[e] = sum * block_size + low[k] - (HOW == GRID ? first_staged[k] : 0);
      if constexpr (HOW == GRID) rest[e] = first_staged[k];
    }
    sum += padded[k];
  }
  if (thread == 0) blocks[experts] = used_blocks;
  __syncthreads();

  // routes
  if constexpr (REPEATS) {
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const u32 route = first_route + r * 32;
      if (route < warp_stop) {
        u32 place = ALL;
        if (bucket[r] < experts) {
          place = firsts[bucket[r]] + rank[r] + (WARPS > 1 ? own_row[bucket[r]] : 0);
          p.sorted_token_ids[place] = route;
        }
        if constexpr (WHOLE) p.route_rows[route] = place;
      }
    }
  } else {
#pragma unroll 1
    for (u32 t = 0; t < (HOW == LONG ? p.tiles : 1); ++t) {
      const u32 tile_route = first_route + t * TILE;
      if constexpr (HOW == LONG) {
        if (warp < WARPS) rank_routes(id, bucket, rank, own_bits, own_row, p);
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) id[r] = load_id(p.ids, tile_route + TILE + r * 32, warp_stop);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < PER; ++k) {
          const u32 e = thread * PER + k;
          in_tile[k] = e < experts ? sum_column(bits + e, table + e, experts) : 0;
        }
        scan_tile();
#pragma unroll
        for (int k = 0; k < PER; ++k) {
          const u32 e = thread * PER + k;
          if (e < experts) {
            rest[e] = first_staged[k];
            firsts[e] -= first_staged[k];
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) {
        const u32 route = tile_route + r * 32;
        if (route < warp_stop) {
          u32 place = ALL;
          if (bucket[r] < experts) {
            const u32 i = rest[bucket[r]] + own_row[bucket[r]] + rank[r];
            place = firsts[bucket[r]] + i;
            staged[i] = route;
            staged_place[i] = place;
          }
          if constexpr (WHOLE) __stcs(p.route_rows + route, static_cast<int>(place));
        }
      }
      __syncthreads();
#pragma unroll 4
      for (u32 i = thread; i < staged_routes; i += THREADS) {
        __stcs(p.sorted_token_ids + staged_place[i], static_cast<int>(staged[i]));
      }
      if constexpr (HOW == LONG) {
        u32* words = reinterpret_cast<u32*>(table);
        for (u32 i = thread; i < (WARPS * experts + 1) / 2; i += THREADS) words[i] = 0;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < PER; ++k) {
          const u32 e = thread * PER + k;
          if (e < experts) firsts[e] += first_staged[k] + in_tile[k];
        }
      }
    }
  }

  // what belongs to one expert: a warp an expert
#pragma unroll 1
  for (u32 e = warp * aligning_blocks() + blockIdx.x; e < experts; e += aligning_blocks() * (THREADS / 32)) {
    const u32 first = blocks[e], end = blocks[e + 1], held = counts[e], first_slot = first * block_size;
    if (WHOLE && lane == 0) {
      p.expert_offsets[e] = first_slot;
      p.expert_counts[e] = held;
    }
#pragma unroll 1
    for (u32 s = first_slot + held + lane; s < end * block_size; s += 32) p.sorted_token_ids[s] = num_routes;
#pragma unroll 1
    for (u32 b = first + lane; REPEATS && b < end; b += 32) p.expert_ids[b] = e;
  }
  if (blockIdx.x == 0 && thread == 0) {
    if constexpr (WHOLE) p.expert_offsets[experts] = used_blocks * block_size;
    *p.num_tokens_post_padded = used_blocks * block_size;
  }

  // the unused end
  const u32 grid_thread = blockIdx.x * THREADS + thread, grid_threads = aligning_blocks() * THREADS;
#pragma unroll 1
  for (u32 s = used_blocks * block_size + grid_thread; s < capacity; s += grid_threads) {
    p.sorted_token_ids[s] = num_routes;
  }
  const u32 num_blocks = blocks_of(capacity, p);
#pragma unroll 1
  for (u32 b = used_blocks + grid_thread; b < num_blocks; b += grid_threads) p.expert_ids[b] = -1;
  if constexpr (!REPEATS) {
#pragma unroll 1
    for (u32 b = grid_thread; b < used_blocks; b += grid_threads) {
      u32 least = 0, most = experts;  // the last expert that starts at or before the block
      while (most - least > 1) {
        const u32 middle = (least + most) / 2;
        if (blocks[middle] <= b) least = middle;
        else most = middle;
      }
      p.expert_ids[b] = least;
    }
  }
}
