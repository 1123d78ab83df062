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

#include "few_tokens.cuh"

constexpr u32 MATRICES = GATED ? 2 : 1;
constexpr u32 UP_PIECES = segments_of<HIDDEN_WORDS, UP_SEGMENT>, UP_SLOT = MATRICES * UP_SEGMENT * WORD_BYTES;
constexpr u32 UP_RING = WARPS * UP_STAGES * UP_SLOT, UP_VECTORS = TOKENS * HIDDEN * 2;
static_assert(UP_BYTES == UP_RING + UP_VECTORS + sizeof(Routes) + 8 * (WARPS * UP_STAGES + 1), "as the host counts");

extern "C" __global__ void __launch_bounds__(THREADS, 2) few_tokens_up_kernel(
    const void* ids, const int* expert_map, const float* topk_weights, const u8* hidden_states, const u8* w13,
    const u16* bias, u16* act, i64 num_experts, i64 num_local, i64 token_stride, i64 expert_stride, i64 alpha, i64 beta,
    i64 limit) {
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
    if (lane == 0) expect_bytes(shared_address(vectors_here), UP_VECTORS);
    __syncwarp();
    see_earlier_writes();
    if (lane < TOKENS) {
      copy_in(shared_address(vectors + lane * HIDDEN * 2), hidden_states + lane * token_stride, HIDDEN * 2,
              shared_address(vectors_here));
    }
    find_routes(routes, ids, expert_map, topk_weights, num_experts, num_local);
  }
  __syncthreads();

  const u32 total = routes.starts[TOKENS] * SIZE, last = first_unit(total, blockIdx.x + 1);
  const u32 begin = first_unit(total, blockIdx.x) + warp;
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

  await_bytes(shared_address(vectors_here), 0);  // all warps do, so that no block ends before its copies
  const Curve curve = {__uint_as_float(alpha), __uint_as_float(beta), __uint_as_float(limit)};
  u32 slot = 0, parity = 0;
  float kept_gate = 0.0f, kept_up = 0.0f;  // of the unit whose number, modulo 32, is this lane's
#pragma unroll 1
  for (u32 n = 0; n < units; ++n) {
    const u32 place = (begin + n * WARPS) / SIZE, token = TOKENS == 1 ? 0 : routes.route[place] / TOP_K;
    const uint4* x_words = reinterpret_cast<const uint4*>(vectors) + token * HIDDEN_WORDS;
    const float factor = routes.factor[place];
    float gate[2] = {}, up[2] = {};
#pragma unroll 1
    for (u32 piece = 0; piece < UP_PIECES; ++piece) {
      await_bytes(barriers + 8 * slot, parity);
      const uint4* words = reinterpret_cast<const uint4*>(ring + slot * UP_SLOT);
      const u32 held = words_of<HIDDEN_WORDS, UP_SEGMENT>(piece);
#pragma unroll
      for (u32 i = 0; i < UP_SEGMENT; i += 32) {
        if (i + lane < held) {
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
constexpr u32 DOWN_RING = WARPS * DOWN_STAGES * DOWN_SLOT, DOWN_VECTORS = ROUTES * SIZE * 2;
static_assert(HIDDEN % ROWS == 0 && (ROWS == 1 || DOWN_SEGMENT == SIZE_WORDS), "several rows: whole ones");
static_assert(DOWN_BYTES >= DOWN_RING + DOWN_VECTORS + sizeof(Routes) + 8 * (WARPS * DOWN_STAGES + ROUTES), "room");

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
    u16* out, i64 num_experts, i64 num_local, i64 expert_stride) {
  extern __shared__ __align__(128) u8 shared[];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u8* vectors = shared + DOWN_RING;  // [ROUTES, SIZE], those that have an expert first
  Routes& routes = *reinterpret_cast<Routes*>(vectors + DOWN_VECTORS);
  u64* vectors_here = reinterpret_cast<u64*>(&routes + 1);  // [ROUTES]
  const u8* ring = shared + warp * (DOWN_STAGES * DOWN_SLOT);
  const u32 ring_address = shared_address(ring), barriers = shared_address(vectors_here + ROUTES + warp * DOWN_STAGES);
  const u64 policy = weight_policy();

  if (warp == 0) {
    open_barriers(vectors_here, ROUTES + WARPS * DOWN_STAGES);
    find_routes(routes, ids, expert_map, topk_weights, num_experts, num_local);
  }
  __syncthreads();

  constexpr u32 total = TOKENS * UNITS_A_TOKEN;
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

  await_previous_launch();
  allow_next_launch();
  if (warp == 0 && first < last) {  // act of this block's tokens, each of which some warp waits for
    const u32 from = routes.starts[first / UNITS_A_TOKEN], stop = routes.starts[(last - 1) / UNITS_A_TOKEN + 1];
    see_earlier_writes();
    if (from <= lane && lane < stop) {
      const u32 barrier = shared_address(vectors_here + lane);
      expect_bytes(barrier, SIZE * 2);
      copy_in(shared_address(vectors + lane * (SIZE * 2)), act + static_cast<u64>(routes.route[lane]) * (SIZE * 2),
              SIZE * 2, barrier);
    }
    __syncwarp();
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
      await_bytes(shared_address(vectors_here + place), 0);
      const uint4* x_words = reinterpret_cast<const uint4*>(vectors) + place * SIZE_WORDS;
      float products[ROWS][2] = {};
#pragma unroll 1
      for (u32 piece = 0; piece < DOWN_PIECES; ++piece) {
        await_bytes(barriers + 8 * slot, parity);
        const uint4* words = reinterpret_cast<const uint4*>(ring + slot * DOWN_SLOT);
        const u32 held = words_of<SIZE_WORDS, DOWN_SEGMENT>(piece);
#pragma unroll
        for (u32 i = 0; i < DOWN_SEGMENT; i += 32) {
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
      for (u32 r = 0; r < ROWS; ++r) sums[r] = __fmaf_rn(factor, products[r][0] + products[r][1], sums[r]);
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) {
      const float sum = sum_of_warp(sums[r]);
      if (lane == r) out[static_cast<u64>(token) * HIDDEN + row + r] = narrow_one(sum);
    }
  }
}
