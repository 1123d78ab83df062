// What experts.cu is compiled for, how shared memory is divided, and what all its threads know.

#pragma once

#include "experts_results.cuh"  // Curve
#include "experts_tiles.cuh"
#include "wgmma.cuh"

constexpr int BN = ROWS_A_TILE, CONSUMERS = CONSUMER_GROUPS, DEPTH = STAGES, KIND = ROW_KIND, CURVE = ACTIVATION;
constexpr bool GATED_RESULT = GATED, CLAMPS = CLAMPED, GATHERS = GATHER, BY_ROUTE = RESULTS_BY_ROUTE, BIASES = BIASED;
constexpr bool WEIGHS = WEIGHTED, READY_BEFORE = TABLE_READY, COPIES_ROWS = COPYING, STRAIGHT = DIRECT, PICKS = PICKING;
constexpr int CLUSTER = BLOCKS_A_CLUSTER;
constexpr u32 RUN = STEPS_A_RUN;  // stages whose weights are asked for together: 128 bytes of a weight row each
constexpr int TALL = PRODUCTS_A_GROUP;  // products of 64 weight rows in a warpgroup
constexpr int BM = 64 * TALL * CONSUMERS, BK = 64, THREADS = 128 * (1 + CONSUMERS);
constexpr int STEP = BN <= 16 ? BN : BN <= 64 ? 16 : 32;  // rows of a box
constexpr int FINE = ROWS_A_STEP;                         // and what multiplied rows are a multiple of
constexpr int GROUP = BN > 128 ? 8 : 16;
constexpr int WEIGHT_BYTES = BM * BK * 2, ROW_BYTES = BN * BK * 2, STAGE_BYTES = WEIGHT_BYTES + ROW_BYTES;
constexpr int SUMS = TALL * BN / 2;  // of a lane
constexpr bool MOVES_REGISTERS = SUMS >= 128;  // more registers than an even share
constexpr int LOADERS_REGISTERS = SUMS > 128 ? (COPIES_ROWS ? 56 : 40) : GATHERS ? 88 : 72;
constexpr int MULTIPLIERS_REGISTERS = (3 * 168 - LOADERS_REGISTERS) / 2;  // 168 is what each of 384 threads begins with
constexpr int COLUMNS_A_WARP = GATED_RESULT ? 8 : 16, COLUMNS_A_PRODUCT = 4 * COLUMNS_A_WARP;
constexpr int COLUMNS_A_GROUP = TALL * COLUMNS_A_PRODUCT;
constexpr int CHUNK = BN < 32 / TALL ? BN : 32 / TALL;  // rows of results that are written at a time
constexpr int PITCH = COLUMNS_A_GROUP * 2 + 16;  // bytes from row to row of a chunk: no two of 8 rows in one bank
constexpr int CHUNK_BYTES = STRAIGHT ? 0 : CHUNK * PITCH;
constexpr bool STAGGERS = CONSUMERS == 2;
constexpr u32 LEAD = DEPTH > 2 ? 2 : 1;  // the step of the first warpgroup after which the second begins; below DEPTH
constexpr int COPIES = BN < 16 ? 1 : BN / 16;  // 16-byte pieces that a thread gathers for a stage
constexpr int PICKS_A_THREAD = (BN + 127) / 128;         // rows
constexpr u32 PORTION = 8, SPAN = ROWS_A_SPAN;  // rows that a warp copies at a time, rows that are waited for together
constexpr int SPANS = (BN + SPAN - 2) / SPAN + 1;  // that a tile may reach into
using Work = Tiles<BN, FINE, GROUP, CLUSTER>;
static_assert(SPAN % PORTION == 0, "a portion is counted in one span");
static_assert(STEP % FINE == 0, "boxes bring the rows that are multiplied");
static_assert(RUN < DEPTH || RUN == 1, "a stage is given back when the one after it has been multiplied");
static_assert(!GATHERS || (CLUSTER == 1 && !COPIES_ROWS), "rows are gathered by each block for itself");
static_assert(!STRAIGHT || !(GATED_RESULT || BY_ROUTE), "results of a lane are side by side, and so are rows");
static_assert(!COPIES_ROWS || !READY_BEFORE, "what to copy is in the layout");

struct Stage {
  u32 number, parity;

  __device__ __forceinline__ void advance() {
    if (++number == DEPTH) {
      number = 0;
      parity ^= 1;
    }
  }
};

// Addresses in shared memory, in the order in which it is divided (`shared_bytes` in experts_plan.py).
struct Room {
  u32 stages, chunks, full, empty, lead;
  u32* routes;     // [CONSUMERS][BN]: target rows of the tile, where results are by route
  float* factors;  // [CONSUMERS][BN]
  u32* sums;
  Segment* table;
};

struct Arguments {
  const u8* rows;
  const u16* bias;
  const float* factors;
  const int* sorted_token_ids;
  u16* out;
  u8* ordered;    // rows in the order of experts, and
  u32* progress;  // portions that warps have taken, then of each SPAN of those rows how many there are (COPYING)
  u32 columns, steps, size, divisor, total_rows;
  i64 row_pitch;  // in bytes
  Curve curve;
};

__device__ __forceinline__ Room divide(u8* memory) {
  Room room;
  memory += -shared_address(memory) & 1023;
  room.stages = shared_address(memory);
  memory += DEPTH * STAGE_BYTES;
  room.chunks = shared_address(memory);
  memory += CONSUMERS * 2 * CHUNK_BYTES;
  room.full = shared_address(memory);
  room.empty = room.full + 8 * DEPTH;
  room.lead = room.empty + 8 * DEPTH;
  memory += 16 * DEPTH + 16;
  room.sums = reinterpret_cast<u32*>(memory);
  memory += 256;
  room.routes = reinterpret_cast<u32*>(memory);
  room.factors = reinterpret_cast<float*>(memory) + CONSUMERS * BN;
  if constexpr (BY_ROUTE) memory += CONSUMERS * BN * 8;
  room.table = reinterpret_cast<Segment*>(memory);
  return room;
}

__device__ __forceinline__ u32 boxed_rows(u32 rows) { return (rows + STEP - 1) / STEP * STEP; }
