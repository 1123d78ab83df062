// What experts.cu is compiled for, how shared memory is divided, and what all its threads know.

#pragma once

#include "activation.cuh"
#include "experts_tiles.cuh"
#include "wgmma.cuh"
#if VALUE_BYTES == 1
#include "codes.cuh"
#endif

constexpr int BN = ROWS_A_TILE, CONSUMERS = CONSUMER_GROUPS, DEPTH = STAGES, KIND = ROW_KIND, CURVE = ACTIVATION;
constexpr bool GATED_RESULT = GATED, CLAMPS = CLAMPED, GATHERS = GATHER, BY_ROUTE = RESULTS_BY_ROUTE, BIASES = BIASED;
constexpr bool WEIGHS = WEIGHTED, READY_BEFORE = TABLE_READY, STREAMS = STREAMING;
constexpr bool TURNS_WEIGHTS = TURNED;  // which lie as [experts, size, columns]
constexpr bool KNOWS_ROUTES = BY_ROUTE || WEIGHS;
constexpr int UNSCALED = 0, BY_ROWS = 1, BY_BLOCKS = 2;  // what scales codes have
constexpr int TALL = PRODUCTS_A_GROUP;  // products of 64 weight rows in a warpgroup
constexpr int ITEM = VALUE_BYTES;       // bytes of a value in shared memory: of 16-bit floats, or of codes of 8 bits
constexpr int BM = 64 * TALL * CONSUMERS, BK = 128 / ITEM, THREADS = 128 * (1 + CONSUMERS);
constexpr int STEP = BN <= 16 ? BN : BN <= 64 ? 16 : 32;  // rows of a box
#ifndef FINE_FROM_128
#define FINE_FROM_128 16
#endif
constexpr int FINE = BN <= 16 ? BN : BN < 128 ? 16 : FINE_FROM_128;  // and what multiplied rows are a multiple of
constexpr int GROUP = BN > 128 ? 8 : 16;
constexpr int WEIGHT_BYTES = BM * BK * ITEM, ROW_BYTES = BN * BK * ITEM, STAGE_BYTES = WEIGHT_BYTES + ROW_BYTES;
constexpr bool ROW_SCALES = SCALED == BY_ROWS, BLOCK_SCALES = SCALED == BY_BLOCKS, CHANNELS = CHANNEL_SCALES;
constexpr int SUMS = TALL * BN / 2 + (BLOCK_SCALES ? BN / 2 : 0);  // of a lane
constexpr bool MOVES_REGISTERS = SUMS >= 128;  // more registers than an even share
constexpr int LOADERS_REGISTERS = SUMS > 128 ? 40 : GATHERS ? 88 : 72;
constexpr bool MANY_LOAD = GATHERS || BLOCK_SCALES;             // all threads of the warpgroup that loads do
constexpr int SCALE_BYTES = BLOCK_SCALES ? BN * 8 : 0;          // of a stage: its rows' scales times two of weights
constexpr int MULTIPLIERS_REGISTERS = (3 * 168 - LOADERS_REGISTERS) / 2;  // 168 is what each of 384 threads begins with
constexpr int COLUMNS_A_WARP = GATED_RESULT ? 8 : 16, COLUMNS_A_PRODUCT = 4 * COLUMNS_A_WARP;
constexpr int COLUMNS_A_GROUP = TALL * COLUMNS_A_PRODUCT;
constexpr bool IN_STAGE = GATED && BN > 128;    // how results leave: through a stage,
constexpr bool IN_CHUNKS = GATED && !IN_STAGE;  // or through memory of their own, or straight from registers
constexpr bool AS_CODES = RESULTS_AS_CODES;     // quantised on their way, in groups of 128 columns, which a tile has
constexpr int CHUNK = BN < 32 / TALL ? BN : 32 / TALL;  // rows of results that are written at a time
constexpr int PITCH = COLUMNS_A_GROUP * 2 + 16;  // bytes from row to row of results: no two of 8 rows in one bank
constexpr int CHUNK_BYTES = IN_CHUNKS ? CHUNK * PITCH : 0;
constexpr bool STAGGERS = CONSUMERS == 2;
constexpr u32 LEAD = DEPTH > 2 ? 2 : 1;  // the step of the first warpgroup after which the second begins; below DEPTH
constexpr int COPIES = BN < 16 ? 1 : BN / 16;  // 16-byte pieces that a thread gathers for a stage
using Work = Tiles<FINE, GROUP>;
static_assert(!IN_STAGE || (TALL == 2 && DEPTH >= 2 && CONSUMERS * BN * PITCH <= STAGE_BYTES), "a stage holds results");
static_assert(4 * DEPTH + 2 <= 64, "tiles lie where sums lay");
static_assert(!(MANY_LOAD && READY_BEFORE), "one thread loads before the launch ahead has ended");
static_assert(!BLOCK_SCALES || (ITEM == 1 && BN <= 128), "a second set of sums fits; a step is a block of 128 values");
static_assert(!AS_CODES || (IN_CHUNKS && BLOCK_SCALES && BM == 256), "two warpgroups have the 128 columns of a scale");
static_assert(!TURNS_WEIGHTS || (ITEM == 2 && !GATED_RESULT && !BIASES && !WEIGHS && CURVE == IDENTITY),
              "products of transposed weights are no more than that");
static_assert(BN % STEP == 0 && STEP % FINE == 0, "boxes bring the rows that are multiplied");
static_assert(!(GATED_RESULT && KNOWS_ROUTES), "the first product of a layer knows rows alone");

struct Stage {
  u32 number, parity;

  __device__ __forceinline__ void advance() {
    if (++number == DEPTH) {
      number = 0;
      parity ^= 1;
    }
  }
};

// Addresses in shared memory, as `divide` and `shared_bytes` (plan.py) have them.
struct Room {
  u32 stages, chunks, full, empty, lead, stage_scales;
  u32* routes;     // [CONSUMERS][BN]: those of the tile's rows, where results are by route or weighted
  float* scales;   // [CONSUMERS][BN]: those of the tile's rows, where a row has one
  u32* sums;       // 64 words, for the table; after that
  Tile* tiles;     // [DEPTH]: the one whose first step is in a stage, and
  u32* following;  // [2]: what one thread that loads tells the others
  u32* table;
};

struct Arguments {
  const u8* rows;
  const u16* bias;
  const float* factors;
  const int* sorted_token_ids;
  u16* out;
  u32* turns;
  const float *weight_scales, *row_scales;  // of codes
  float* result_scales;
  u32 columns, steps, size, divisor;
  i64 row_pitch;  // in bytes
  Curve curve;
};

__device__ __forceinline__ Room divide(u8* memory) {
  Room room;
  if (shared_address(memory) % 1024) __trap();  // stages begin where the swizzle does
  room.stages = shared_address(memory);
  memory += DEPTH * STAGE_BYTES;
  room.chunks = shared_address(memory);
  memory += CONSUMERS * 2 * CHUNK_BYTES;
  room.full = shared_address(memory);
  room.empty = room.full + 8 * DEPTH;
  room.lead = room.empty + 8 * DEPTH;
  memory += 16 * DEPTH + 16;
  room.sums = reinterpret_cast<u32*>(memory);
  room.tiles = reinterpret_cast<Tile*>(memory);
  room.following = room.sums + 4 * DEPTH;
  memory += 256;
  room.routes = reinterpret_cast<u32*>(memory);
  if constexpr (KNOWS_ROUTES) memory += CONSUMERS * BN * 4;
  room.scales = reinterpret_cast<float*>(memory);
  if constexpr (ROW_SCALES) memory += CONSUMERS * BN * 4;
  room.stage_scales = shared_address(memory);
  memory += DEPTH * SCALE_BYTES;
  room.table = reinterpret_cast<u32*>(memory);
  return room;
}

__device__ __forceinline__ u32 boxed_rows(u32 rows) { return (rows + STEP - 1) / STEP * STEP; }
