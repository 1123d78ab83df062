// What experts.cu is compiled for, how shared memory is divided, and what all its threads know.

#pragma once

#include "activation.cuh"
#include "experts_tiles.cuh"
#include "wgmma.cuh"
#if VALUE_BYTES == 1
#include "codes.cuh"
#endif
#ifndef TILED  // weights of 4 bits in tiles
#define TILED false
#endif
#if TILED
#include "nibbles.cuh"
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
constexpr int FINE = BN <= (TILED ? 64 : 16) ? BN : BN < 128 ? 16 : FINE_FROM_128;  // multiplied rows are a multiple of it
constexpr int GROUP = BN > 128 ? 8 : 16;
#if TILED
// Of a stage: tiles of 16 weight rows by 64 values (`pack.py`), the scales of their groups, their zero points.
constexpr bool E2M1 = CODES_ARE_E2M1, ZEROS = ZERO_POINTS, GLOBAL = GLOBAL_SCALES, INTERLEAVES = INTERLEAVED;
constexpr u32 WIDTH = SCALE_COLUMNS;         // columns that share a scale; 0: all
constexpr int KIND_OF_SCALES = SCALE_KIND;  // those of nibbles.cuh, or FLOAT32, BFLOAT16, FLOAT16
constexpr u32 SCALE_SIZE = KIND_OF_SCALES == FLOAT32 ? 4 : KIND_OF_SCALES <= FLOAT16 ? 2 : 1;
constexpr u32 TILE_BYTES = 512, PARTS = WIDTH && WIDTH < BK ? BK / WIDTH : 1;  // groups of a step
constexpr u32 LINE = 16 * SCALE_SIZE;                                          // scales of a group of a tile
constexpr u32 SCALES_AT = BM * BK / 2, ZEROS_AT = SCALES_AT + BM / 16 * PARTS * LINE;
constexpr u32 BROUGHT = ZEROS_AT + (ZEROS ? BM * PARTS : 0);  // bytes that come
constexpr int WEIGHT_BYTES = (BROUGHT + 1023) / 1024 * 1024;
// Weights are scaled where a code times its scale is a value of KIND; else the sums of a group are.
constexpr bool SCALES_WEIGHTS =
    E2M1 && (KIND_OF_SCALES == E4M3_SCALES || (KIND_OF_SCALES == E8M0_SCALES && KIND == BFLOAT16));
static_assert(ITEM == 2 && BN % 16 == 0 && !GATHERS && !BY_ROUTE && !TURNS_WEIGHTS, "rows lie in order, interleaved");
static_assert(CONSUMERS == 2 && BLOCKS_A_PROCESSOR <= 2, "registers are shared out for blocks of 384 threads");
static_assert(ZEROS_AT % 128 == 0 || !ZEROS, "boxes begin at multiples of 128 bytes");
#else
constexpr bool SCALES_WEIGHTS = true;
constexpr int WEIGHT_BYTES = BM * BK * ITEM, BROUGHT = WEIGHT_BYTES;
#endif
constexpr int ROW_BYTES = BN * BK * ITEM, STAGE_BYTES = WEIGHT_BYTES + ROW_BYTES;
constexpr bool ROW_SCALES = SCALED == BY_ROWS, BLOCK_SCALES = SCALED == BY_BLOCKS, CHANNELS = CHANNEL_SCALES;
constexpr int SUMS = TALL * BN / 2 + (BLOCK_SCALES || !SCALES_WEIGHTS ? BN / 2 : 0);  // of a lane
constexpr int FEW_SUMS = TILED ? 64 : 128;                          // that leave registers for biases
constexpr bool MOVES_REGISTERS = SUMS >= 128 || TILED;  // more registers than an even share
constexpr int LOADERS_REGISTERS = SUMS > 128 || TILED ? (BLOCKS_A_PROCESSOR == 2 ? 32 : 40) : GATHERS ? 88 : 72;
constexpr bool MANY_LOAD = GATHERS || BLOCK_SCALES;             // all threads of the warpgroup that loads do
constexpr int SCALE_BYTES = BLOCK_SCALES ? BN * 8 : 0;          // of a stage: its rows' scales times two of weights
constexpr int EVEN_REGISTERS = BLOCKS_A_PROCESSOR == 1 ? 168 : 80;       // what each of 384 threads begins with
constexpr int MULTIPLIERS_REGISTERS = (3 * EVEN_REGISTERS - LOADERS_REGISTERS) / 16 * 8;
constexpr int COLUMNS_A_WARP = GATED_RESULT ? 8 : 16, COLUMNS_A_PRODUCT = 4 * COLUMNS_A_WARP;
constexpr int COLUMNS_A_GROUP = TALL * COLUMNS_A_PRODUCT;
constexpr bool IN_STAGE = GATED && BN > 128 && !TILED;    // how results leave: through a stage,
constexpr bool IN_CHUNKS = GATED && !IN_STAGE;  // or through memory of their own, or straight from registers
constexpr bool AS_CODES = RESULTS_AS_CODES;     // quantised on their way, in groups of 128 columns, which a tile has
constexpr int CHUNK = BN < 32 / TALL ? BN : BN % (32 / TALL) ? 16 : 32 / TALL;  // rows that are written at a time
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
static_assert(BN % STEP == 0 && (TILED || STEP % FINE == 0), "boxes bring the rows that are multiplied");
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

struct Weights {
  const TensorMap& codes;  // or 16-bit values
#if TILED
  const TensorMap &scales, &zeros;
#endif
};

struct Arguments {
  const u8* rows;
  const u16* bias;
  const float* factors;
  const int* sorted_token_ids;
  u16* out;
  u32* turns;
  const float *weight_scales, *row_scales;  // of codes; in tiles weights have one more per matrix
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
