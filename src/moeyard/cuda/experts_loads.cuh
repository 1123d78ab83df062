// The warpgroup of experts.cu that loads: weights and rows into stages, rows into the order of experts.

#pragma once

#include "experts_stages.cuh"

// The weights of one stage, and how many bytes the stage's barrier has to see: boxes count whole, zeros included.
__device__ __forceinline__ void load_weights(const TensorMap& map, const Room& room, const Tile& tile, u32 step,
                                             u32 stage) {
  const u32 barrier = room.full + 8 * stage, to = room.stages + stage * STAGE_BYTES;
  arrive_and_expect(barrier, WEIGHT_BYTES + (GATHERS ? 0 : (PICKS ? tile.rows : boxed_rows(tile.rows)) * BK * 2));
  const u32 column = step * BK, groups = tile.weight_tile * (BM / 16);  // of 16 weight rows
  if constexpr (GATED_RESULT || STRAIGHT) copy_box(to, map, barrier, column, 0, 0, groups, tile.expert);
  else copy_box(to, map, barrier, column, tile.weight_tile * BM, tile.expert);
}

__device__ __forceinline__ void load_rows(const TensorMap& map, const Room& room, const Tile& tile, u32 step,
                                          u32 stage, u32 rank) {
  const u32 to = room.stages + stage * STAGE_BYTES + WEIGHT_BYTES, barrier = room.full + 8 * stage;
  for (u32 row = rank * STEP; row < tile.rows; row += CLUSTER * STEP) {
    if constexpr (CLUSTER == 1) copy_box(to + row * BK * 2, map, barrier, step * BK, tile.first_row + row);
    else copy_box_to((1 << CLUSTER) - 1, to + row * BK * 2, map, barrier, step * BK, tile.first_row + row);
  }
}

// The weights of a tile, asked for RUN stages at a time.
struct Weights {
  const TensorMap& map;
  const Room& room;
  Stage stage = {0, 0};  // the next one
  u32 ahead = 0;         // stages whose weights are on their way already, those of the present step with them

  __device__ __forceinline__ void ask(const Tile& tile, u32 step) {
    await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);
    load_weights(map, room, tile, step, stage.number);
    stage.advance();
    ++ahead;
  }
  __device__ __forceinline__ void come_to(const Tile& tile, u32 step, u32 steps) {
    if (ahead == 0) {
      while (ahead < min(RUN, steps - step)) ask(tile, step + ahead);
    }
    --ahead;
  }
};

// Waits until all rows of a tile have been copied into the order of experts, by whatever blocks.
__device__ __forceinline__ void await_rows(const Arguments& a, const Tile& tile) {
  const u32 first = tile.first_row / SPAN, last = (tile.first_row + tile.rows - 1) / SPAN;
  bool missing = true;
  while (missing) {
    u32 there[SPANS];
#pragma unroll
    for (int i = 0; i < SPANS; ++i) there[i] = look_at(a.progress + 1 + min(first + i, last));
    missing = false;
#pragma unroll
    for (int i = 0; i < SPANS; ++i) missing |= there[i] < min(SPAN, a.total_rows - min(first + i, last) * SPAN);
  }
  see_what_others_wrote();
  show_memory_to_copies();
}

// One warp of several, of whatever blocks.
__device__ __forceinline__ void copy_rows(const Arguments& a) {
  constexpr int AT_ONCE = SUMS > 128 ? 3 : 8;  // as registers allow
  const u32 lane = threadIdx.x & 31, words = a.row_pitch / 16;
  while (true) {
    const u32 first = PORTION * __shfl_sync(ALL, lane == 0 ? atomicAdd(a.progress, 1) : 0, 0);
    if (first >= a.total_rows) return;
    const u32 rows = min(PORTION, a.total_rows - first);
    const u32 token = lane < rows ? __ldcg(a.sorted_token_ids + first + lane) / a.divisor : 0;
    for (u32 row = 0; row < rows; ++row) {
      const u8* from = a.rows + __shfl_sync(ALL, token, row) * a.row_pitch;
      uint4* to = reinterpret_cast<uint4*>(a.ordered + (first + row) * a.row_pitch);
      for (u32 word = lane; word < words; word += 32 * AT_ONCE) {
        uint4 held[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
          if (word + 32 * i < words) load_word(held[i], reinterpret_cast<u64>(from + (word + 32 * i) * 16));
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
          if (word + 32 * i < words) to[word + 32 * i] = held[i];
        }
      }
    }
    show_memory_to_copies();
    __threadfence();
    __syncwarp();
    if (lane == 0) add_for_others(a.progress + 1 + first / SPAN, rows);
  }
}

// One thread loads everything by the copy engine.
__device__ __forceinline__ void load_by_boxes(const TensorMap& weight_map, const TensorMap& row_map, const Room& room,
                                              const Arguments& a, Work tiles, u32 total) {
  Stage stage = {0, 0};
  Weights weights = {weight_map, room};
  if (READY_BEFORE) {
    if (const u32 first = Walk<CLUSTER>().number(); first < total) {
      const Tile tile = tiles.find(first);
      while (weights.ahead < min(a.steps, u32(DEPTH))) weights.ask(tile, weights.ahead);
    }
    wait_for_previous_launch();
    show_memory_to_copies();
  }
  for (Walk<CLUSTER> walk; walk.number() < total; walk.advance()) {
    const Tile tile = tiles.find(walk.number());
    for (u32 step = 0; step < a.steps; ++step) {
      weights.come_to(tile, step, a.steps);
      if (COPIES_ROWS && step == 0) await_rows(a, tile);
      load_rows(row_map, room, tile, step, stage.number, tiles.rank);
      stage.advance();
    }
  }
}

// The copy engine loads everything, rows from wherever the tokens lie: a box of one row lands where a row of a larger one
// would, since the swizzle goes by addresses. Every thread asks for one row or two, the first also for the weights. Rows
// that a tile multiplies and does not have stay as they were.
__device__ __forceinline__ void load_by_picking(const TensorMap& weight_map, const TensorMap& row_map, const Room& room,
                                                const Arguments& a, Work tiles, u32 total) {
  Stage stage = {0, 0};
  Weights weights = {weight_map, room};
  for (Walk<CLUSTER> walk; walk.number() < total; walk.advance()) {
    const Tile tile = tiles.find(walk.number());
    u32 token[PICKS_A_THREAD];
#pragma unroll
    for (int i = 0; i < PICKS_A_THREAD; ++i) {
      const u32 row = threadIdx.x + 128 * i;
      token[i] = row < tile.rows ? __ldcg(a.sorted_token_ids + tile.first_row + row) / a.divisor : 0;
    }
    for (u32 step = 0; step < a.steps; ++step) {
      if (threadIdx.x == 0) weights.come_to(tile, step, a.steps);
      await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);
      const u32 barrier = room.full + 8 * stage.number, to = room.stages + stage.number * STAGE_BYTES + WEIGHT_BYTES;
#pragma unroll
      for (int i = 0; i < PICKS_A_THREAD; ++i) {
        const u32 row = threadIdx.x + 128 * i;
        if (row < tile.rows) copy_box(to + row * BK * 2, row_map, barrier, step * BK, token[i]);
      }
      stage.advance();
    }
  }
}

// Thread t of the warpgroup brings piece t % 8 of rows t / 8, t / 8 + 16, ..., to where the swizzle wants it.
__device__ __forceinline__ void load_by_gathering(const TensorMap& weight_map, const Room& room, const Arguments& a,
                                                  Work tiles, u32 total) {
  const u32 piece = threadIdx.x & 7, first = threadIdx.x >> 3 & 15;
  const u32 to = first * BK * 2 + ((piece ^ (first & 7)) << 4);
  Stage stage = {0, 0};
  Weights weights = {weight_map, room};
  for (Walk<CLUSTER> walk; walk.number() < total; walk.advance()) {
    const Tile tile = tiles.find(walk.number());
    const u32 used = boxed_rows(tile.rows);
    u32 token[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      const u32 row = first + 16 * i;
      token[i] = row < tile.rows ? __ldcg(a.sorted_token_ids + tile.first_row + row) : 0;
    }
    for (u32 step = 0; step < a.steps; ++step) {
      await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);
      if (threadIdx.x == 0) weights.come_to(tile, step, a.steps);
      if (step == 0) {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) token[i] /= a.divisor;
      }
      const u32 column = step * BK + piece * 8, there = room.stages + stage.number * STAGE_BYTES + WEIGHT_BYTES + to;
      const u8* from = a.rows + (column < a.size ? column * 2 : 0);
#pragma unroll
      for (int i = 0; i < COPIES; ++i) {
        const u32 row = first + 16 * i;
        if (row < used) {
          const bool there_is = row < tile.rows && column < a.size;
          copy_16_bytes(there + i * 16 * BK * 2, from + token[i] * a.row_pitch, there_is ? 16 : 0);
        }
      }
      arrive_after_copies(room.full + 8 * stage.number);
      stage.advance();
    }
  }
  await_copies();  // a thread outlives its copies
}
