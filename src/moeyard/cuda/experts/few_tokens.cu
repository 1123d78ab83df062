// The experts of a few tokens: as fast as their weights can be read once. Two launches, no layout and no combine:
//
//   up    every (route, row of w13 or pair of gate and up rows) is a unit: x times the row, bias, activation -> act
//   down  every (token, few rows of w2) is a unit: act of all the token's routes times the rows, weighted, summed in
//         float32, rounded once -> out. A lane sums its columns of all routes in k order, then lanes are added up
//
// Units are dealt out evenly to the blocks, one block a multiprocessor, and inside a block to its warps in turn: so
// every multiprocessor reads as many bytes, give or take a unit.
//
// A warp has a ring of its own in shared memory. Its first lane starts bulk copies (weight rows are consecutive bytes,
// so a segment of a row is one instruction), all lanes wait for the segment, multiply, and the slot is filled again.
// No warp waits for another. What is in flight is the ring, up to 96 KB a multiprocessor, whatever the arithmetic does;
// by Little's law 4.5 TB/s at 1.2 us need 41 KB of each of 132. Loads into registers would leave that to how the warps
// happen to be staggered, and a launch could not have its first weights in place before it may start.
//
// The arithmetic stays below: a lane's 16 bytes of gate and of up take 44 instructions as compiled (3 loads from shared
// memory, 24 to widen, 16 multiply-adds), so 34 KB a microsecond are 1500 instructions of a warp, of the 7000 that a
// multiprocessor issues. Tensor cores would have nothing to add.
//
// `down` is placed while `up` drains (programmatic dependent launch), fills its rings with w2, which `up` does not
// write, and only then waits for act: so that memory need not be idle between the two. `up` lets it in when its last
// copies are under way, or TRIGGER copies of a warp before that, but never before it has waited itself for the launch
// before it: so `down` finds ids and factors without waiting.

// Weights of 8 bits (few_tokens_codes.cuh) have the same rings. A block holds the rows of its own units alone and
// quantises them where they lie, once; their scales and those of its weights are in shared memory, too. 8 bytes of gate
// and of up take 18 instructions as compiled (3 loads, 8 to widen to float16, 2 products of tensor cores, which are
// there to save instructions, the rest of the loop), so 34 KB a microsecond are 1200 instructions of a warp.

#include "few_tokens_codes.cuh"

#if QUANTISED_WEIGHTS
#define SCALE_PARAMETERS const void *weight_scales, const float *static_scales,
#define GIVEN_SCALES weight_scales, static_scales
#else
#define SCALE_PARAMETERS
#define GIVEN_SCALES nullptr, nullptr
#endif
struct GivenScales {
  const void* of_weights;
  const float* of_rows;  // one per expert, if they are static
};

constexpr u32 MATRICES = GATED ? 2 : 1;
constexpr u32 UP_PIECES = segments_of<HIDDEN_WORDS, UP_SEGMENT>, UP_SLOT = MATRICES * UP_SEGMENT * WORD_BYTES;
using UpScales = Scales<SIZE, HIDDEN, BLOCK_START, 0>;
constexpr u32 UP_UNITS = units_of_block(ROUTES * SIZE), UP_PLACES = touched(UP_UNITS, SIZE, ROUTES);
constexpr u32 UP_HELD = QUANTISED ? UP_PLACES : TOKENS;  // rows of a block's own routes, or all
constexpr u32 UP_SCALES = UpScales::rows_held(UP_UNITS, UP_PLACES) * MATRICES * UpScales::COLUMNS;
constexpr u32 UP_EXTRA = QUANTISED ? 4 * (UP_SCALES + UP_HELD * (UpScales::GROUPS + WARPS)) : 0;
constexpr u32 UP_RING = WARPS * UP_STAGES * UP_SLOT, UP_VECTORS = UP_HELD * HIDDEN * 2;
static_assert(UP_BYTES == UP_RING + UP_VECTORS + sizeof(Routes) + 8 * (WARPS * UP_STAGES + 1) + UP_EXTRA, "as counted");
static_assert(!IN_PARTS || UP_PIECES == 1 || UP_SEGMENT % 4 == 0, "segments begin with four lanes");

extern "C" __global__ void __launch_bounds__(THREADS, 2) few_tokens_up_kernel(
    const void* ids, const int* expert_map, const float* topk_weights, const u8* hidden_states, const u8* w13,
    const u16* bias, SCALE_PARAMETERS u16* act, i64 num_experts, i64 num_local, i64 token_stride, i64 expert_stride,
    i64 alpha, i64 beta, i64 limit TOKEN_PARAMETER) {
  extern __shared__ __align__(128) u8 shared[];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u8* vectors = shared + UP_RING;
  Routes& routes = *reinterpret_cast<Routes*>(vectors + UP_VECTORS);
  u64* vectors_here = reinterpret_cast<u64*>(&routes + 1);
  const u8* ring = shared + warp * (UP_STAGES * UP_SLOT);
  const u32 ring_address = shared_address(ring), barriers = shared_address(vectors_here + 1 + warp * UP_STAGES);
  const u64 policy = weight_policy();

  if (warp == 0) open_barriers(vectors_here, 1 + WARPS * UP_STAGES);
  await_previous_launch();
  if (warp == 0) {
    if constexpr (!QUANTISED) {
      if (lane == 0) expect_bytes(shared_address(vectors_here), TOKENS_HERE * HIDDEN * 2);
      __syncwarp();
      see_earlier_writes();
      if (lane < TOKENS_HERE) {
        copy_in(shared_address(vectors + lane * HIDDEN * 2), hidden_states + lane * token_stride, HIDDEN * 2,
                shared_address(vectors_here));
      }
    }
    find_routes(routes, ids, expert_map, topk_weights, num_experts, num_local, TOKENS_HERE);
  }
  __syncthreads();

  const u32 total = routes.starts[TOKENS_HERE] * SIZE, last = first_unit(total, blockIdx.x + 1);
  const u32 first = first_unit(total, blockIdx.x), begin = first + warp;
  const u32 first_place = first / SIZE, held = first < last ? (last - 1) / SIZE + 1 - first_place : 0;
  if (QUANTISED && warp == 0 && held) {
    if (lane == 0) expect_bytes(shared_address(vectors_here), held * HIDDEN * 2);
    __syncwarp();
    see_earlier_writes();
    if (lane < held) {
      const u8* from = hidden_states + routes.route[first_place + lane] / TOP_K * token_stride;
      copy_in(shared_address(vectors + lane * HIDDEN * 2), from, HIDDEN * 2, shared_address(vectors_here));
    }
  }
  const u32 units = begin < last ? (last - begin + WARPS - 1) / WARPS : 0;
  u32 left = units * UP_PIECES, ahead = begin, ahead_piece = 0;
  const u32 trigger = left ? min(static_cast<u32>(TRIGGER), left - 1) : 0;

  auto fill = [&](u32 slot) {
    if (left == 0) return;
    if (lane == 0) {
      const u32 place = ahead / SIZE, row = ahead - place * SIZE;
      const u8* from = w13 + routes.expert[place] * expert_stride +
                       (static_cast<u64>(row) * HIDDEN_WORDS + ahead_piece * UP_SEGMENT) * WORD_BYTES;
      const u32 bytes = words_of<HIDDEN_WORDS, UP_SEGMENT>(ahead_piece) * WORD_BYTES;
      const u32 to = ring_address + slot * UP_SLOT, barrier = barriers + 8 * slot;
      expect_bytes(barrier, MATRICES * bytes);
      copy_weights_in(to, from, bytes, barrier, policy);
      if constexpr (GATED) {
        const u8* from_up = from + static_cast<u64>(SIZE) * HIDDEN_WORDS * WORD_BYTES;
        copy_weights_in(to + UP_SEGMENT * WORD_BYTES, from_up, bytes, barrier, policy);
      }
    }
    if (++ahead_piece == UP_PIECES) {
      ahead_piece = 0;
      ahead += WARPS;
    }
    if (--left == trigger) allow_next_launch();
  };
#pragma unroll 1
  for (u32 slot = 0; slot < UP_STAGES; ++slot) fill(slot);

  const GivenScales given = {GIVEN_SCALES};
  float* scales = reinterpret_cast<float*>(vectors_here + 1 + WARPS * UP_STAGES);  // of rows from first_row on
  float* x_scales = scales + UP_SCALES;
  const u32 first_row = first_place * UpScales::ROWS + UpScales::row_of(first % SIZE);
  if constexpr (QUANTISED) {
    const u32 last_row = (last - 1) / SIZE * UpScales::ROWS + UpScales::row_of((last - 1) % SIZE);
    load_scales<MATRICES * UpScales::COLUMNS>(
        scales, given.of_weights, first_row, held ? last_row + 1 : first_row, [&](u32 row, u32 column) {
          const u32 matrix = routes.expert[row / UpScales::ROWS] * MATRICES + column / UpScales::COLUMNS;
          return (static_cast<i64>(matrix) * UpScales::ROWS + row % UpScales::ROWS) * UpScales::COLUMNS +
                 column % UpScales::COLUMNS;
        });
    load_static_scales(x_scales, given.of_rows, routes.expert + first_place, held);
    __syncthreads();
  }

  if (!QUANTISED || held) {
    await_bytes(shared_address(vectors_here), 0);  // all warps do, so that no block ends before its copies
  }
  if constexpr (QUANTISED && (X_CODE != NO_CODE || INPUT_IS_WEIGHTED)) {
    u32* maxima = reinterpret_cast<u32*>(x_scales + UP_HELD * UpScales::GROUPS);
    quantise_rows<UpScales, HIDDEN_WORDS, 1, INPUT_IS_WEIGHTED>(
        reinterpret_cast<uint4*>(vectors), held, x_scales, maxima,
        [&](u32 v) { return routes.factor[first_place + v]; });
  }
  const Curve curve = {__uint_as_float(alpha), __uint_as_float(beta), __uint_as_float(limit)};
  u32 slot = 0, parity = 0;
  float kept_gate = 0.0f, kept_up = 0.0f;  // of the unit whose number, modulo 32, is this lane's
#pragma unroll 1
  for (u32 n = 0; n < units; ++n) {
    const u32 place = (begin + n * WARPS) / SIZE;
    const u32 vector = QUANTISED ? place - first_place : TOKENS == 1 ? 0 : routes.route[place] / TOP_K;
    const uint4* x_words = reinterpret_cast<const uint4*>(vectors) + vector * HIDDEN_WORDS;
    const float factor = routes.factor[place];
    float gate[2] = {}, up[2] = {};
    const u32 row_here = (begin + n * WARPS) % SIZE, scale_row = place * UpScales::ROWS + UpScales::row_of(row_here);
    const float* own_scales = scales + (scale_row - first_row) * MATRICES * UpScales::COLUMNS;
    const float* own_x_scales = x_scales + vector * UpScales::GROUPS;
    CodeSums<UpScales, MATRICES> sums;
#pragma unroll 1
    for (u32 piece = 0; piece < UP_PIECES; ++piece) {
      await_bytes(barriers + 8 * slot, parity);
      const uint4* words = reinterpret_cast<const uint4*>(ring + slot * UP_SLOT);
      const u32 here = words_of<HIDDEN_WORDS, UP_SEGMENT>(piece);
      if constexpr (QUANTISED) {
        sums.template add<HIDDEN_WORDS, UP_SEGMENT, UpScales::COLUMNS>(reinterpret_cast<const uint2*>(words),
                                                         x_words + piece * UP_SEGMENT, here, piece * UP_SEGMENT,
                                                         own_scales, own_x_scales);
      }
#pragma unroll
      for (u32 i = 0; !QUANTISED && i < UP_SEGMENT; i += 32) {
        if (i + lane < here) {
          float x[8];
          widen_word(x_words[piece * UP_SEGMENT + i + lane], x);
          if constexpr (INPUT_IS_WEIGHTED) {  // rounded, as a row of its own would be
#pragma unroll
            for (int v = 0; v < 8; v += 2) {
              const u32 pair = narrow_pair<KIND_OF_ROWS>(x[v] * factor, x[v + 1] * factor);
              x[v] = widen<KIND_OF_ROWS>(pair & 0xffff);
              x[v + 1] = widen<KIND_OF_ROWS>(pair >> 16);
            }
          }
          add_products(words[i + lane], x, gate);
          if constexpr (GATED) add_products(words[UP_SEGMENT + i + lane], x, up);
        }
      }
      __syncwarp();  // all lanes have read the slot
      fill(slot);
      if (++slot == UP_STAGES) {
        slot = 0;
        parity ^= 1;
      }
    }
    if constexpr (QUANTISED) {
      gate[0] = sums.scaled(0, own_scales[0], own_x_scales[0]);
      if constexpr (GATED) up[0] = sums.scaled(1, own_scales[UpScales::COLUMNS], own_x_scales[0]);
    }
    const float whole_gate = sum_of_warp(gate[0] + gate[1]), whole_up = GATED ? sum_of_warp(up[0] + up[1]) : 0.0f;
    const u32 number = n & 31;
    if (lane == number) {
      kept_gate = whole_gate;
      kept_up = whole_up;
    }
    if ((number == 31 || n == units - 1) && lane <= number) {
      const u32 unit = begin + (n - number + lane) * WARPS, mine = unit / SIZE, row = unit - mine * SIZE;
      if constexpr (UP_BIASED) {
        const u64 first = static_cast<u64>(routes.expert[mine]) * (MATRICES * SIZE) + row;
        kept_gate += widen_one(bias, first);
        if constexpr (GATED) kept_up += widen_one(bias, first + SIZE);
      }
      act[static_cast<u64>(routes.route[mine]) * SIZE + row] = narrow_one(activate(kept_gate, kept_up, curve));
    }
  }
}

constexpr u32 ROWS = DOWN_ROWS, UNITS_A_TOKEN = HIDDEN / ROWS;  // consecutive rows of w2 that one copy brings
constexpr u32 DOWN_PIECES = segments_of<SIZE_WORDS, DOWN_SEGMENT>, DOWN_SLOT = ROWS * DOWN_SEGMENT * WORD_BYTES;
using DownScales = Scales<HIDDEN, SIZE, 0, BLOCK_START>;
constexpr u32 DOWN_UNITS = units_of_block(TOKENS * UNITS_A_TOKEN);
constexpr u32 DOWN_TOKENS = touched(DOWN_UNITS, UNITS_A_TOKEN, TOKENS);
constexpr u32 DOWN_HELD = QUANTISED ? DOWN_TOKENS * TOP_K : ROUTES;
constexpr u32 DOWN_SCALES = DownScales::rows_held(DOWN_UNITS * ROWS, DOWN_TOKENS) * TOP_K * DownScales::COLUMNS;
constexpr u32 DOWN_EXTRA = QUANTISED ? 4 * (DOWN_SCALES + DOWN_HELD * (DownScales::GROUPS + WARPS)) : 0;
constexpr u32 DOWN_RING = WARPS * DOWN_STAGES * DOWN_SLOT, DOWN_VECTORS = DOWN_HELD * SIZE * 2;
static_assert(HIDDEN % ROWS == 0 && (ROWS == 1 || DOWN_SEGMENT == SIZE_WORDS), "several rows: whole ones");
static_assert(DOWN_BYTES >= DOWN_RING + DOWN_VECTORS + sizeof(Routes) + 8 * (WARPS * DOWN_STAGES + ROUTES) + DOWN_EXTRA,
              "room");
static_assert(!IN_PARTS || DOWN_PIECES == 1 || DOWN_SEGMENT % 4 == 0, "segments begin with four lanes");

// Where a warp is in the copies it makes: units, the routes of their token, the segments of their rows.
struct Walk {
  u32 unit, place, stop, piece;

  // To the first unit from `unit` on that has work.
  __device__ __forceinline__ void enter(const Routes& routes, u32 last) {
#pragma unroll 1
    for (; unit < last; unit += WARPS) {
      const u32 token = TOKENS == 1 ? 0 : unit / UNITS_A_TOKEN;
      place = routes.starts[token];
      stop = routes.starts[token + 1];
      if (place < stop) return;
    }
  }
  __device__ __forceinline__ void advance(const Routes& routes, u32 last) {
    if (++piece < DOWN_PIECES) return;
    piece = 0;
    if (++place < stop) return;
    unit += WARPS;
    enter(routes, last);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) few_tokens_down_kernel(
    const void* ids, const int* expert_map, const float* topk_weights, const u8* act, const u8* w2, const u16* bias,
    SCALE_PARAMETERS u16* out, i64 num_experts, i64 num_local, i64 expert_stride TOKEN_PARAMETER) {
  extern __shared__ __align__(128) u8 shared[];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u8* vectors = shared + DOWN_RING;  // [DOWN_HELD, SIZE], those that have an expert first
  Routes& routes = *reinterpret_cast<Routes*>(vectors + DOWN_VECTORS);
  u64* vectors_here = reinterpret_cast<u64*>(&routes + 1);  // [ROUTES]
  const u8* ring = shared + warp * (DOWN_STAGES * DOWN_SLOT);
  const u32 ring_address = shared_address(ring), barriers = shared_address(vectors_here + ROUTES + warp * DOWN_STAGES);
  const u64 policy = weight_policy();

  if (warp == 0) {
    open_barriers(vectors_here, ROUTES + WARPS * DOWN_STAGES);
    find_routes(routes, ids, expert_map, topk_weights, num_experts, num_local, TOKENS_HERE);
  }
  __syncthreads();

  const u32 total = TOKENS_HERE * UNITS_A_TOKEN;
  const u32 first = first_unit(total, blockIdx.x), last = first_unit(total, blockIdx.x + 1);
  Walk ahead = {first + warp, 0, 0, 0};
  ahead.enter(routes, last);
  auto fill = [&](u32 slot) {
    if (ahead.unit >= last) return;
    if (lane == 0) {
      const u32 row = (TOKENS == 1 ? ahead.unit : ahead.unit % UNITS_A_TOKEN) * ROWS;
      const u8* from = w2 + routes.expert[ahead.place] * expert_stride +
                       (static_cast<u64>(row) * SIZE_WORDS + ahead.piece * DOWN_SEGMENT) * WORD_BYTES;
      const u32 bytes = ROWS * words_of<SIZE_WORDS, DOWN_SEGMENT>(ahead.piece) * WORD_BYTES;
      expect_bytes(barriers + 8 * slot, bytes);
      copy_weights_in(ring_address + slot * DOWN_SLOT, from, bytes, barriers + 8 * slot, policy);
    }
    ahead.advance(routes, last);
  };
#pragma unroll 1
  for (u32 slot = 0; slot < DOWN_STAGES; ++slot) fill(slot);

  const GivenScales given = {GIVEN_SCALES};
  float* scales = reinterpret_cast<float*>(vectors_here + ROUTES + WARPS * DOWN_STAGES);  // [row of scales, k, column]
  float* x_scales = scales + DOWN_SCALES;
  const u32 first_row = first / UNITS_A_TOKEN * DownScales::ROWS + DownScales::row_of(first % UNITS_A_TOKEN * ROWS);
  u32 first_vector = 0, vectors_held = ROUTES;
  if constexpr (QUANTISED) {
    const u32 end = last * ROWS - 1, last_row = end / HIDDEN * DownScales::ROWS + DownScales::row_of(end % HIDDEN);
    if (first < last) first_vector = routes.starts[first / UNITS_A_TOKEN];
    vectors_held = first < last ? routes.starts[(last - 1) / UNITS_A_TOKEN + 1] - first_vector : 0;
    load_scales<TOP_K * DownScales::COLUMNS>(
        scales, given.of_weights, first_row, first < last ? last_row + 1 : first_row, [&](u32 row, u32 column) -> i64 {
          const u32 token = row / DownScales::ROWS, place = routes.starts[token] + column / DownScales::COLUMNS;
          if (place >= routes.starts[token + 1]) return -1;
          return (static_cast<i64>(routes.expert[place]) * DownScales::ROWS + row % DownScales::ROWS) *
                     DownScales::COLUMNS + column % DownScales::COLUMNS;
        });
    load_static_scales(x_scales, given.of_rows, routes.expert + first_vector, vectors_held);
    __syncthreads();
  }

  await_previous_launch();
  allow_next_launch();
  if (warp == 0 && first < last) {  // act of this block's tokens, each of which some warp waits for
    const u32 from = routes.starts[first / UNITS_A_TOKEN], stop = routes.starts[(last - 1) / UNITS_A_TOKEN + 1];
    see_earlier_writes();
    if (from <= lane && lane < stop) {
      const u32 barrier = shared_address(vectors_here + lane);
      expect_bytes(barrier, SIZE * 2);
      copy_in(shared_address(vectors + (lane - first_vector) * (SIZE * 2)),
              act + static_cast<u64>(routes.route[lane]) * (SIZE * 2), SIZE * 2, barrier);
    }
    __syncwarp();
  }
  if constexpr (X_CODE != NO_CODE) {
#pragma unroll 1
    for (u32 v = 0; v < vectors_held; ++v) await_bytes(shared_address(vectors_here + first_vector + v), 0);
    quantise_rows<DownScales, SIZE_WORDS, TOP_K, false>(
        reinterpret_cast<uint4*>(vectors), vectors_held, x_scales,
        reinterpret_cast<u32*>(x_scales + DOWN_HELD * DownScales::GROUPS), [](u32) { return 1.0f; });
  }

  u32 slot = 0, parity = 0;
#pragma unroll 1
  for (u32 unit = first + warp; unit < last; unit += WARPS) {
    const u32 token = TOKENS == 1 ? 0 : unit / UNITS_A_TOKEN, row = (unit - token * UNITS_A_TOKEN) * ROWS;
    const u32 start = routes.starts[token], stop = routes.starts[token + 1];
    float sums[ROWS] = {};
    if (DOWN_BIASED && start + lane < stop) {  // a lane a route: all lanes are added up at the end
      const float factor = INPUT_IS_WEIGHTED ? 1.0f : routes.factor[start + lane];
      const u64 index = static_cast<u64>(routes.expert[start + lane]) * HIDDEN + row;
#pragma unroll
      for (u32 r = 0; r < ROWS; ++r) sums[r] = factor * widen_one(bias, index + r);
    }
#pragma unroll 1
    for (u32 place = start; place < stop; ++place) {
      if constexpr (X_CODE == NO_CODE) await_bytes(shared_address(vectors_here + place), 0);
      const uint4* x_words = reinterpret_cast<const uint4*>(vectors) + (place - first_vector) * SIZE_WORDS;
      float products[ROWS][2] = {};
      const u32 scale_row = token * DownScales::ROWS + DownScales::row_of(row) - first_row;
      const float* own_scales = scales + (scale_row * TOP_K + place - start) * DownScales::COLUMNS;
      const float* own_x_scales = x_scales + (place - first_vector) * DownScales::GROUPS;
      CodeSums<DownScales, ROWS> code_sums;
#pragma unroll 1
      for (u32 piece = 0; piece < DOWN_PIECES; ++piece) {
        await_bytes(barriers + 8 * slot, parity);
        const uint4* words = reinterpret_cast<const uint4*>(ring + slot * DOWN_SLOT);
        const u32 held = words_of<SIZE_WORDS, DOWN_SEGMENT>(piece);
        if constexpr (QUANTISED) {
          code_sums.template add<SIZE_WORDS, DOWN_SEGMENT, 0>(reinterpret_cast<const uint2*>(words),
                                                              x_words + piece * DOWN_SEGMENT, held,
                                                              piece * DOWN_SEGMENT, own_scales, own_x_scales);
        }
#pragma unroll
        for (u32 i = 0; !QUANTISED && i < DOWN_SEGMENT; i += 32) {
          if (i + lane < held) {
            float x[8];
            widen_word(x_words[piece * DOWN_SEGMENT + i + lane], x);
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) add_products(words[r * DOWN_SEGMENT + i + lane], x, products[r]);
          }
        }
        __syncwarp();  // all lanes have read the slot
        fill(slot);
        if (++slot == DOWN_STAGES) {
          slot = 0;
          parity ^= 1;
        }
      }
      const float factor = INPUT_IS_WEIGHTED ? 1.0f : routes.factor[place];
#pragma unroll
      for (u32 r = 0; QUANTISED && r < ROWS; ++r) {
        const u32 other = ROWS_A_SCALE == 1 ? r * TOP_K * DownScales::COLUMNS : 0;
        products[r][0] = code_sums.scaled(r, own_scales[other], own_x_scales[0]);
      }
#pragma unroll
      for (u32 r = 0; r < ROWS; ++r) sums[r] = __fmaf_rn(factor, products[r][0] + products[r][1], sums[r]);
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) {
      const float sum = sum_of_warp(sums[r]);
      if (lane == r) out[static_cast<u64>(token) * HIDDEN + row + r] = narrow_one(sum);
    }
  }
}
