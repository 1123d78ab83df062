// The warpgroup of experts.cu that loads weights and rows into stages, and tells the others which tile is next.

#pragma once

#include "experts_stages.cuh"

__device__ __forceinline__ void copy_weights(u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y, u32 z, u32 v, u32 w,
                                             u64 policy) {
  if constexpr (STREAMS) copy_box(to, map, barrier, x, y, z, v, w, policy);
  else copy_box(to, map, barrier, x, y, z, v, w);
}

// The weights of one stage, and how many bytes the stage's barrier has to see: boxes count whole, zeros included. With
// the first step comes the tile.
__device__ __forceinline__ void load_weights(const Weights& from, const Room& room, const Tile& tile, u32 step,
                                             u32 stage, u64 policy) {
  const u32 barrier = room.full + 8 * stage, to = room.stages + stage * STAGE_BYTES;
  if (step == 0) room.tiles[stage] = tile;
  arrive_and_expect(barrier, BROUGHT + (GATHERS ? 0 : boxed_rows(tile.rows) * BK * ITEM));
  const u32 column = step * BK, groups = tile.weight_tile * (BM / 16);
#if TILED
  const u32 group = PARTS > 1 ? step * PARTS : WIDTH ? column / WIDTH : 0;
  copy_weights(to, from.codes, barrier, step * (TILE_BYTES / 4), groups, tile.expert, 0, 0, policy);
  copy_weights(to + SCALES_AT, from.scales, barrier, group * LINE, groups, tile.expert, 0, 0, policy);
  if constexpr (ZEROS) copy_weights(to + ZEROS_AT, from.zeros, barrier, group * 16, groups, tile.expert, 0, 0, policy);
#else
  if constexpr (TURNS_WEIGHTS) {
    copy_weights(to, from.codes, barrier, 0, column, tile.weight_tile * (BM / 64), tile.expert, 0, policy);
  } else {
    copy_weights(to, from.codes, barrier, column, 0, 0, groups, tile.expert, policy);
  }
#endif
}

__device__ __forceinline__ void load_rows(const TensorMap& map, const Room& room, const Tile& tile, u32 step,
                                          u32 stage) {
  const u32 to = room.stages + stage * STAGE_BYTES + WEIGHT_BYTES, barrier = room.full + 8 * stage;
  for (u32 row = 0; row < tile.rows; row += STEP) {
    copy_box(to + row * BK * ITEM, map, barrier, step * BK, tile.first_row + row);
  }
}

// The stage behind a tile's last step, once it is free, is for the tile's results.
__device__ __forceinline__ void lend_stage(const Room& room, Stage& stage) {
  await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);
  arrive(room.full + 8 * stage.number);
  if (GATHERS && threadIdx.x == 0) arrive(room.full + 8 * stage.number);
  stage.advance();
}

// In place of a tile; the stage is free.
__device__ __forceinline__ void tell_end(const Room& room, u32 stage) {
  room.tiles[stage].rows = 0;
  arrive(room.full + 8 * stage);
}

// The step of a tile at which the next one is asked for: early enough for the answer, and as late as that allows, since
// a tile that is taken waits for its block while others may have nothing left.
__device__ __forceinline__ u32 last_call(u32 steps) { return steps > DEPTH ? steps - DEPTH : 0; }

// One thread loads everything by the copy engine.
__device__ __forceinline__ void load_by_boxes(const Weights& weights, const TensorMap& row_map, const Room& room,
                                              const Arguments& a, Work tiles, u32 total) {
  Stage stage = {0, 0};
  Turns turns = {a.turns};
  const u64 policy = soon_forgotten();
  u32 number = blockIdx.x;
  u32 ahead = 0;  // stages whose weights are on their way already
  if (READY_BEFORE) {
    if (number < total) {
      const Tile tile = tiles.find(number);
      for (; ahead < min(a.steps, u32(DEPTH)); ++ahead) load_weights(weights, room, tile, ahead, ahead, policy);
    }
    wait_for_previous_launch();
    show_memory_to_copies();
  }
  while (number < total) {
    const Tile tile = tiles.find(number);
    u32 following = 0;
    for (u32 step = 0; step < a.steps; ++step) {
      if (step == last_call(a.steps)) following = turns.next();
      if (ahead) {
        --ahead;
      } else {
        await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);
        load_weights(weights, room, tile, step, stage.number, policy);
      }
      load_rows(row_map, room, tile, step, stage.number);
      stage.advance();
    }
    if constexpr (IN_STAGE) lend_stage(room, stage);
    number = following;
  }
  await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);
  tell_end(room, stage.number);
  turns.leave();
}

#if VALUE_BYTES == 1

// The scales of blocks: thread t has those of row t, and multiplies them by those of the weights of either warpgroup.
// Where there is a gate both warpgroups have rows of both halves: then the scales of the halves lie behind the rows'.
// All are read a step ahead.
struct Scales {
  const float *of_row, *of_weights;
  u32 other;  // from the first block of weights to the second
  float row, first, second;

  __device__ __forceinline__ void read() {
    row = __ldg(of_row++);
    first = __ldg(of_weights);
    second = __ldg(of_weights++ + other);
  }
  __device__ __forceinline__ void begin(const Arguments& a, const Tile& tile) {
    u32 slot = tile.first_row + min(u32(threadIdx.x), tile.rows - 1);
    if constexpr (GATHERS) slot = __ldcg(a.sorted_token_ids + slot) / a.divisor;
    const u32 blocks = (a.columns + 127) / 128;  // of a half
    const u32 column = tile.weight_tile * CONSUMERS * COLUMNS_A_GROUP, last = blocks - 1;
    const u32 block = min(column / 128, last), next = min((column + (CONSUMERS - 1) * COLUMNS_A_GROUP) / 128, last);
    of_row = a.row_scales + static_cast<u64>(slot) * a.steps;
    of_weights = a.weight_scales + (static_cast<u64>(tile.expert) * (GATED_RESULT ? 2 : 1) * blocks + block) * a.steps;
    other = (GATED_RESULT ? blocks : next - block) * a.steps;
    read();
  }
  __device__ __forceinline__ void leave(u32 to, bool more) {
    const u32 mine = to + 4 * threadIdx.x;
    if (threadIdx.x < BN) {
      store_shared(mine, GATED_RESULT ? row : row * first);
      if constexpr (!GATED_RESULT) store_shared(mine + 4 * BN, row * second);
    }
    if (GATED_RESULT && threadIdx.x < 2) store_shared(mine + 4 * BN, threadIdx.x == 0 ? first : second);
    if (more) read();
  }
};

#endif

// What each thread loaded for a stage has come, or will be told of.
__device__ __forceinline__ void arrive_when_loaded(u32 full) {
  if constexpr (GATHERS) arrive_after_copies(full);
  if constexpr (BLOCK_SCALES) arrive(full);
}

// All threads of the warpgroup load. Where rows are gathered, thread t brings piece t % 8 of rows t / 8, t / 8 + 16, ...,
// to where the swizzle wants it; else the first one has boxes of rows brought.
__device__ __forceinline__ void load_by_many(const Weights& weights, const TensorMap& row_map, const Room& room,
                                             const Arguments& a, Work tiles, u32 total) {
  const u32 piece = threadIdx.x & 7, first = threadIdx.x >> 3 & 15;
  const u32 to = first * BK * ITEM + ((piece ^ (first & 7)) << 4);
  Stage stage = {0, 0};
  Turns turns = {a.turns};
  const u64 policy = soon_forgotten();
  u32 number = blockIdx.x, odd = 0;
  while (number < total) {
    const Tile tile = tiles.find(number);
    const u32 used = (tile.rows + FINE - 1) / FINE * FINE;
    u32 following = 0;
    u32 token[COPIES];
    if constexpr (GATHERS) {
#pragma unroll
      for (int i = 0; i < COPIES; ++i) {
        const u32 row = first + 16 * i;
        token[i] = row < tile.rows ? __ldcg(a.sorted_token_ids + tile.first_row + row) : 0;
      }
    }
#if VALUE_BYTES == 1
    Scales scales;
    if constexpr (BLOCK_SCALES) scales.begin(a, tile);
#endif
    for (u32 step = 0; step < a.steps; ++step) {
      await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);
      if (threadIdx.x == 0) {
        if (step == last_call(a.steps)) following = turns.next();
        load_weights(weights, room, tile, step, stage.number, policy);
      }
#if VALUE_BYTES == 1
      if constexpr (BLOCK_SCALES) scales.leave(room.stage_scales + stage.number * SCALE_BYTES, step + 1 < a.steps);
#endif
      if constexpr (!GATHERS) {
        if (threadIdx.x == 0) load_rows(row_map, room, tile, step, stage.number);
      } else {
        if (step == 0) {
#pragma unroll
          for (int i = 0; i < COPIES; ++i) token[i] /= a.divisor;
        }
        const u32 column = step * BK + piece * (16 / ITEM);
        const u32 there = room.stages + stage.number * STAGE_BYTES + WEIGHT_BYTES + to;
        const u8* from = a.rows + (column < a.size ? column * ITEM : 0);
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
          const u32 row = first + 16 * i;
          if (row < used) {
            const bool there_is = row < tile.rows && column < a.size;
            copy_16_bytes(there + i * 16 * BK * ITEM, from + token[i] * a.row_pitch, there_is ? 16 : 0);
          }
        }
      }
      arrive_when_loaded(room.full + 8 * stage.number);
      stage.advance();
    }
    if constexpr (IN_STAGE) lend_stage(room, stage);
    if (threadIdx.x == 0) room.following[odd] = following;
    sync_loaders();
    number = room.following[odd];
    odd ^= 1;  // the slot is written again when all have read it
  }
  await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);
  arrive_when_loaded(room.full + 8 * stage.number);
  if (threadIdx.x == 0) {
    tell_end(room, stage.number);
    turns.leave();
  }
  await_copies();  // a thread outlives its copies
}
