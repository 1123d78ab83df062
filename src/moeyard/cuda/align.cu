// Token alignment in one launch: topk_ids -> a whole Layout (see values.py), stable and without floating point,
// so the same ids always give the same bits.
//
// Every block learns the count of every expert, and how many of an expert's routes come before the block's own span
// of routes; then offsets, ranks and outputs follow without another word between blocks. How a block learns it is
// the only difference between the kernels:
//
//   small     one block, a route a thread
//   alone     each block counts all routes itself: nothing is exchanged
//   cluster   the blocks of a cluster count a part each and read each other's shared memory; every cluster does the
//             whole input again
//   grid      each block counts its own span and publishes it; one grid barrier (cooperative launch)
//
// A warp ranks 32 routes at a time by __match_any_sync; spans of warps, blocks and parts are consecutive, so ranks
// ascend with the route. Parameters are 64-bit so that the host can pass plain integers.

#pragma nv_diag_suppress 186  // comparisons that only some kernels need

#include "device.cuh"

constexpr int SMALL = 0, ALONE = 1, CLUSTER = 2, GRID = 3;
constexpr int BATCH = 8;   // ids that a thread has in flight
constexpr int ROUNDS = 4;  // times 32 routes that a warp keeps in registers (all but grid)

struct Parameters {
  const void* ids;           // [num_routes] int32 or int64
  const int* expert_map;     // [num_experts] or null
  int* sorted_token_ids;     // [capacity]
  int* expert_ids;           // [capacity / block_size]
  int* num_tokens_post_padded;
  i64* expert_offsets;       // [num_local + 1]
  int* expert_counts;        // [num_local]
  int* route_rows;           // [num_routes]
  u32* exchange;             // grid: [blocks, num_local] counts
  u32* barrier;              // grid: [0] arrived, zero between launches; [32] generation
  i64 num_routes, num_experts, num_local, block_size, capacity;
  i64 block_magic, block_shift;  // x / block_size = x * block_magic >> block_shift for x below 2^31
  i64 owners;                // blocks that write what belongs to one expert: a power of two, at most the grid
  i64 warp_span;             // routes that a warp places: a multiple of 32, at most 32 * ROUNDS unless grid
  i64 warps;                 // warps of a block that place routes
};

// The local expert of a route, or num_local if the route is dropped. Negative ids are large when unsigned.
template <bool MAPPED>
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
__device__ __forceinline__ int load_id(const void* ids, u32 route, u32 stop, int) {
  return route < stop ? __ldg(static_cast<const int*>(ids) + route) : -1;
}

__device__ __forceinline__ int load_id(const void* ids, u32 route, u32 stop, i64) {
  i64 id = route < stop ? __ldg(static_cast<const i64*>(ids) + route) : -1;
  return id == static_cast<int>(id) ? static_cast<int>(id) : -1;
}

// Blocks of block_size that hold `count` rows: a division below 2^31 by a multiplication (Granlund and Montgomery 1994).
__device__ __forceinline__ u32 blocks_of(u32 count, const Parameters& p) {
  u32 full = static_cast<u64>(count - 1) * static_cast<u32>(p.block_magic) >> static_cast<u32>(p.block_shift);
  return count ? full + 1 : 0;
}

// Gives the bucket of every lane the next free places of a warp's table; returns the lane's place.
__device__ __forceinline__ u32 take_places(u32* table, u32 bucket, u32 experts) {
  u32 same = __match_any_sync(ALL, bucket);
  u32 rank = __popc(same & lanes_below());
  bool held = bucket < experts;
  u32 place = held ? table[bucket] + rank : ALL;
  __syncwarp();
  if (held && rank == 0) table[bucket] = place + __popc(same);
  __syncwarp();
  return place;
}

// A thread owns PER consecutive experts from the counts on: they stay in its registers.
template <int HOW, typename Id, bool MAPPED, int PER>
__device__ __forceinline__ void align(const Parameters& p) {
  extern __shared__ uint4 shared_words[];
  const u32 threads = blockDim.x, thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const u32 experts = p.num_local, warps = p.warps, block_size = p.block_size;
  const u32 num_routes = p.num_routes, capacity = p.capacity;

  u32* table = reinterpret_cast<u32*>(shared_words);  // [warps, experts] counts of a warp's span, then of those before it
  u32* before = table + warps * experts;              // [experts] routes of this part before this block's span
  u32* rest = before + experts;                       // [experts] the others of this part
  u32* own = rest + experts;                          // [experts] this part's counts, what others read
  u32* earlier = own + experts;                       // [experts] grid: routes before this block's span
  u32* firsts = earlier + experts;                    // [experts] first slot of this block's routes
  u32* offsets = firsts + experts;                    // [experts + 1] grid: first slot of an expert
  u32* warp_sums = offsets + experts + 1;             // [32]

  // which part of the routes this block counts, and which span of it this block places
  const u32 parts = HOW == CLUSTER ? cluster_size() : HOW == GRID ? gridDim.x : 1;
  const u32 part = HOW == CLUSTER ? cluster_rank() : HOW == GRID ? blockIdx.x : 0;
  const u32 spans = HOW == ALONE ? gridDim.x : HOW == CLUSTER ? gridDim.x / parts : 1;  // spans of a part
  const u32 own_span = HOW == ALONE ? blockIdx.x : HOW == CLUSTER ? blockIdx.x / parts : 0;
  const u32 warp_span = p.warp_span, span = warps * warp_span;
  const u32 part_start = min(part * spans * span, num_routes), part_stop = min(part_start + spans * span, num_routes);
  const u32 start = min(part_start + own_span * span, num_routes), stop = min(start + span, num_routes);
  const u32 warp_start = min(start + warp * warp_span, stop);
  const u32 warp_stop = warp < warps ? min(warp_start + warp_span, stop) : warp_start;

  // ids are on their way while shared memory is cleared, and the later parameters come into the constant cache
  wait_for_previous_launch();
  constexpr int OWN = HOW == SMALL ? 1 : HOW == GRID ? 0 : ROUNDS;
  int own_id[OWN + 1], part_id[BATCH];
#pragma unroll
  for (int r = 0; r < OWN; ++r) own_id[r] = load_id(p.ids, warp_start + r * 32 + lane, warp_stop, Id());
  if constexpr (HOW == ALONE || HOW == CLUSTER) {
#pragma unroll
    for (int k = 0; k < BATCH; ++k) part_id[k] = load_id(p.ids, part_start + thread + k * threads, part_stop, Id());
  }
  asm volatile("" ::"l"(p.sorted_token_ids), "l"(p.expert_offsets), "l"(p.route_rows), "l"(p.capacity), "l"(p.owners));
  const u32 zeroed = (HOW == GRID ? firsts : own) - table;
  for (u32 i = thread; i < (zeroed + 3) / 4; i += threads) shared_words[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();

  // count: ranks among the routes of its own warp come along
  u32 own_bucket[OWN + 1], own_rank[OWN + 1];
  if (warp < warps) {
    u32* own_table = table + warp * experts;
    if constexpr (HOW == GRID) {
      for (u32 first = warp_start + lane; first < warp_stop; first += BATCH * 32) {
        int id[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) id[k] = load_id(p.ids, first + k * 32, warp_stop, Id());
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
          u32 bucket = bucket_of<MAPPED>(id[k], p);
          if (bucket < experts) atomicAdd(own_table + bucket, 1u);
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < OWN; ++r) {
        own_bucket[r] = experts;
        if (r == 0 || r * 32 < warp_span) {
          own_bucket[r] = bucket_of<MAPPED>(own_id[r], p);
          own_rank[r] = take_places(own_table, own_bucket[r], experts);
        }
      }
    }
  }
  if constexpr (HOW == ALONE || HOW == CLUSTER) {
    for (u32 first = part_start + thread; first < part_stop; first += BATCH * threads) {
      int next_id[BATCH];  // on their way while these are counted
#pragma unroll
      for (int k = 0; k < BATCH; ++k) next_id[k] = load_id(p.ids, first + (BATCH + k) * threads, part_stop, Id());
#pragma unroll
      for (int k = 0; k < BATCH; ++k) {
        u32 bucket = bucket_of<MAPPED>(part_id[k], p);
        if (bucket < experts) atomicAdd((first + k * threads < start ? before : rest) + bucket, 1u);
        part_id[k] = next_id[k];
      }
    }
  }
  __syncthreads();

  // every owned expert's count, and its routes before this block's span
  u32 count[PER], low[PER];
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const u32 e = thread * PER + k;
    count[k] = low[k] = 0;
    if (e < experts) {
      if constexpr (HOW == ALONE || HOW == CLUSTER) {
        low[k] = before[e];
        count[k] = low[k] + rest[e];
      } else if (warps == 1) {
        count[k] = table[e];
      }
      if (warps > 1) {  // the table's counts become routes of the warps before
        u32 run = 0;
        for (u32 w = 0; w < warps; w += 4) {  // all loads of a batch before its stores
          u32 in_warp[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) in_warp[i] = w + i < warps ? table[(w + i) * experts + e] : 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (w + i < warps) table[(w + i) * experts + e] = run;
            run += in_warp[i];
          }
        }
        if constexpr (HOW == SMALL || HOW == GRID) count[k] = run;
      } else {
        table[e] = 0;
      }
      if constexpr (HOW == CLUSTER) own[e] = count[k];
      if constexpr (HOW == GRID) p.exchange[blockIdx.x * experts + e] = count[k];
    }
  }
  if constexpr (HOW == CLUSTER) {
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const u32 e = thread * PER + k;
      if (e < experts) {
        count[k] = 0;
#pragma unroll 8
        for (u32 r = 0; r < parts; ++r) {
          u32 value = read_peer(own + e, r);
          count[k] += value;
          if (r < part) low[k] += value;
        }
      }
    }
    cluster_arrive_relaxed();  // waited for at the end: until then peers may read this block's shared memory
  } else if constexpr (HOW == GRID) {
    grid_barrier(p.barrier);
    const u32 lines = max(threads / experts, 1u), line = lines > 1 ? thread / experts : 0;
    for (u32 e = lines > 1 ? thread % experts : thread; e < experts && line < lines; e += lines > 1 ? experts : threads) {
      u32 all = 0, below = 0;
#pragma unroll 8
      for (u32 b = line; b < parts; b += lines) {
        u32 value = __ldcg(p.exchange + b * experts + e);
        all += value;
        if (b < part) below += value;
      }
      atomicAdd(own + e, all);
      atomicAdd(earlier + e, below);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const u32 e = thread * PER + k;
      count[k] = e < experts ? own[e] : 0;
      low[k] = e < experts ? earlier[e] : 0;
    }
  }

  // first slot of every expert: an exclusive scan over padded counts
  u32 padded[PER], sum = 0;
#pragma unroll
  for (int k = 0; k < PER; ++k) sum += padded[k] = blocks_of(count[k], p) * block_size;
  const u32 scan = scan_warp(sum, lane);
  if (lane == 31) warp_sums[warp] = scan;
  __syncthreads();
  const u32 through = scan_warp(lane < threads / 32 ? warp_sums[lane] : 0, lane);
  const u32 used = __shfl_sync(ALL, through, 31), earlier_warps = __shfl_sync(ALL, through, (warp - 1) & 31);
  u32 slot = scan - sum + (warp ? earlier_warps : 0);
  u32 begin[PER];
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const u32 e = thread * PER + k;
    begin[k] = slot;
    if (e < experts) {
      firsts[e] = slot + low[k];
      if constexpr (HOW == GRID) offsets[e] = slot;
    }
    slot += padded[k];
  }
  if (HOW == GRID && thread == 0) offsets[experts] = used;
  __syncthreads();

  // routes
  if (warp < warps) {
    u32* places = table + warp * experts;
    if constexpr (HOW == GRID) {
      for (u32 base = warp_start; base < warp_stop; base += BATCH * 32) {
        int id[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) id[k] = load_id(p.ids, base + k * 32 + lane, warp_stop, Id());
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
          u32 route = base + k * 32 + lane;
          if (base + k * 32 < warp_stop) {
            u32 bucket = bucket_of<MAPPED>(id[k], p), place = take_places(places, bucket, experts);
            if (bucket < experts) {
              place += firsts[bucket];
              p.sorted_token_ids[place] = route;
            }
            if (route < warp_stop) p.route_rows[route] = place;
          }
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < OWN; ++r) {
        u32 route = warp_start + r * 32 + lane;
        if (route < warp_stop) {
          u32 place = ALL;
          if (own_bucket[r] < experts) {
            place = firsts[own_bucket[r]] + places[own_bucket[r]] + own_rank[r];
            p.sorted_token_ids[place] = route;
          }
          p.route_rows[route] = place;
        }
      }
    }
  }

  // what belongs to one expert
  const bool writes_vectors = blockIdx.x == gridDim.x - 1;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const u32 e = thread * PER + k, filled = begin[k] + count[k], end = begin[k] + padded[k];
    const bool mine = e < experts && (HOW == SMALL || (e & static_cast<u32>(p.owners - 1)) == blockIdx.x);
    if (writes_vectors && e < experts) {
      p.expert_offsets[e] = begin[k];
      p.expert_counts[e] = count[k];
    }
    for (u32 todo = __ballot_sync(ALL, mine && filled < end); todo; todo &= todo - 1) {
      const u32 from = __ffs(todo) - 1, until = __shfl_sync(ALL, end, from);
      for (u32 s = __shfl_sync(ALL, filled, from) + lane; s < until; s += 32) p.sorted_token_ids[s] = num_routes;
    }
    if constexpr (HOW != GRID) {
      const u32 block = blocks_of(begin[k], p), blocks = blocks_of(padded[k], p);
      if (mine && blocks == 1) p.expert_ids[block] = e;
      for (u32 todo = __ballot_sync(ALL, mine && blocks > 1); todo; todo &= todo - 1) {
        const u32 from = __ffs(todo) - 1, number = __shfl_sync(ALL, blocks, from);
        const u32 at = __shfl_sync(ALL, block, from), expert = __shfl_sync(ALL, e, from);
        for (u32 b = lane; b < number; b += 32) p.expert_ids[at + b] = expert;
      }
    }
  }
  if (writes_vectors && thread == 0) {
    p.expert_offsets[experts] = used;
    *p.num_tokens_post_padded = used;
  }

  // the unused end
  const u32 grid_thread = blockIdx.x * threads + thread, grid_threads = gridDim.x * threads;
  for (u32 s = used + grid_thread; s < capacity; s += grid_threads) p.sorted_token_ids[s] = num_routes;
  const u32 used_blocks = blocks_of(used, p), num_blocks = blocks_of(capacity, p);
  for (u32 block = used_blocks + grid_thread; block < num_blocks; block += grid_threads) p.expert_ids[block] = -1;
  if constexpr (HOW == GRID) {
    for (u32 block = grid_thread; block < used_blocks; block += grid_threads) {
      u32 least = 0, most = experts;  // the expert whose segment holds the block: the last that starts at or before it
      while (most - least > 1) {
        u32 middle = (least + most) / 2;
        if (offsets[middle] <= block * block_size) least = middle;
        else most = middle;
      }
      p.expert_ids[block] = least;
    }
  }
  if constexpr (HOW == CLUSTER) cluster_wait();
}

// One kernel a compilation: EXCHANGE, ID, MAP and EXPERTS_A_THREAD are given on the command line.
extern "C" __global__ void __launch_bounds__(1024, 1) align_kernel(
    const void* ids, const int* expert_map, int* sorted_token_ids, int* expert_ids, int* num_tokens_post_padded,
    i64* expert_offsets, int* expert_counts, int* route_rows, u32* exchange, u32* barrier, i64 num_routes,
    i64 num_experts, i64 num_local, i64 block_size, i64 capacity, i64 block_magic, i64 block_shift, i64 owners,
    i64 warp_span, i64 warps) {
  align<EXCHANGE, ID, MAP, EXPERTS_A_THREAD>({ids, expert_map, sorted_token_ids, expert_ids, num_tokens_post_padded, expert_offsets,
                       expert_counts, route_rows, exchange, barrier, num_routes, num_experts, num_local, block_size,
                       capacity, block_magic, block_shift, owners, warp_span, warps});
}
