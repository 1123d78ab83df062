// The experts of up to some 64 tokens with weights of 4 bits: each expert is read once for every 8 of its routes.
//
//   up    a unit is a tile of 16 rows of w13 (8 of gate, 8 of up) and up to 8 routes of one expert: products, bias,
//         activation -> act
//   down  a unit is 16 rows of w2 and up to 8 routes: products, bias -> one float32 row per route
//   sum   a token's rows, weighted, in k order, rounded once -> out
//
// Every block finds the routes by expert itself, from the ids. Units are dealt out evenly to blocks, one block a
// multiprocessor. A block's warps share the steps (tiles of 64 columns) of its units evenly: a warp has a run of
// consecutive steps, which are consecutive bytes. So a unit may be shared by warps, whose sums are added in their order.
// A block takes its units in rounds, each with as many routes as it holds rows of.
//
// A warp has a ring of its own in shared memory, as in few_tokens.cu: its first lane starts bulk copies of codes, scales
// and zero points, all lanes wait for a slot, multiply, and the slot is filled again, beyond the end of a round, too.

#include "four_bits.cuh"

// Of one of the two products: COLUMNS that are summed, tiles of 16 rows.
template <u32 COLUMNS, u32 ROWS, u32 SLOT_STEPS, u32 STAGES>
struct Product {
  static constexpr u32 STEPS = COLUMNS / TILE_COLUMNS, TILES = ROWS / TILE_ROWS, MOST_STEPS = SLOT_STEPS;
  static constexpr u32 WIDE = GROUP ? GROUP : COLUMNS, GROUPS = (COLUMNS + WIDE - 1) / WIDE;
  static constexpr u32 SLOT_GROUPS = PARTS > 1          ? SLOT_STEPS * PARTS
                                     : WIDE == TILE_COLUMNS ? SLOT_STEPS
                                                            : (SLOT_STEPS * TILE_COLUMNS + WIDE - 2) / WIDE + 1;
  static constexpr u32 SLOT_SCALES = SLOT_STEPS * TILE_BYTES, SLOT_ZEROS = SLOT_SCALES + 16 * SCALE_BYTES * SLOT_GROUPS;
  static constexpr u32 SLOT = SLOT_ZEROS + (ZEROS ? 16 * SLOT_GROUPS : 0), RING = STAGES * SLOT;
  static constexpr u32 X_STRIDE = 2 * COLUMNS + 16;  // a token's values lie 4 banks from the next one's
  static constexpr u32 X = WARPS * RING, WIDE_SCALES = X + HELD_ROWS * X_STRIDE;
  static constexpr u32 PARTIAL = WIDE_SCALES + WARPS * SLOT_GROUPS * 64, POWERS = PARTIAL + WARPS * 1024;
  static constexpr u32 MAXIMA = POWERS + 4 * HELD_ROWS, BARRIERS = MAXIMA + 4 * HELD_ROWS * WARPS;
  static constexpr u32 ROUTES_AT = BARRIERS + 8 * WARPS * STAGES, BYTES = ROUTES_AT + sizeof(Routes);

  static __device__ __forceinline__ u32 group_of(u32 step) {
    return PARTS > 1 ? step * PARTS : step * TILE_COLUMNS / WIDE;
  }
  static __device__ __forceinline__ u32 groups_of(u32 step, u32 count) {
    return PARTS > 1 ? count * PARTS : group_of(step + count - 1) - group_of(step) + 1;
  }
};

// Units of a block whose routes it holds at a time: from `first` to before `end`, of all to before `last`.
template <class P>
struct Round {
  u32 first, end, last;

  __device__ __forceinline__ void enter(const Routes& routes) {
    u32 group = first / P::TILES;
    const u32 place = routes.group_first[group];
    end = first;
#pragma unroll 1
    while (end < last && routes.group_first[group + 1] - place <= HELD_ROWS) end = min(last, ++group * P::TILES);
  }
};

// Where a warp is in its steps: the next `count` of them, which lie in one unit.
template <class P>
struct Walk {
  Round<P> round;
  u32 at, stop;  // steps of the round
  u32 unit, step, count, group, group_end;

  __device__ __forceinline__ bool more() const { return round.first < round.last; }
  static __device__ __forceinline__ u32 begin_of(const Round<P>& round, u32 warp) {
    return static_cast<u64>((round.end - round.first) * P::STEPS) * warp / WARPS;
  }
  __device__ __forceinline__ void cut() { count = min(min(P::MOST_STEPS, stop - at), P::STEPS - step); }
  // To the steps of a round that are this warp's; false if it has none.
  __device__ __forceinline__ bool begin(u32 warp) {
    at = begin_of(round, warp);
    stop = begin_of(round, warp + 1);
    unit = round.first + at / P::STEPS;
    step = at % P::STEPS;
    group = unit / P::TILES;
    group_end = (group + 1) * P::TILES;
    cut();
    return at < stop;
  }
  // False at the end of the round.
  __device__ __forceinline__ bool next() {
    at += count;
    step += count;
    if (step == P::STEPS) {
      step = 0;
      if (++unit == group_end) {
        ++group;
        group_end += P::TILES;
      }
    }
    cut();
    return at < stop;
  }
  // To this warp's first steps from the round at `round.first` on.
  __device__ __forceinline__ void enter(const Routes& routes, u32 warp) {
#pragma unroll 1
    for (; more(); round.first = round.end) {
      round.enter(routes);
      if (begin(warp)) return;
    }
  }
  __device__ __forceinline__ void advance(const Routes& routes, u32 warp) {
    if (next()) return;
    round.first = round.end;
    enter(routes, warp);
  }
};

struct Given {
  const u8 *codes, *scales, *zeros;
};

// All of a block's work. `bring` brings the rows of a round, whose first place is given, and waits for them; `finish`
// takes the sums of a unit.
template <class P, u32 STAGES, typename Started, typename Bring, typename Finish>
__device__ __forceinline__ void multiply_units(u8* shared, const Routes& routes, const Given& given, bool lets_in,
                                               Started started, Bring bring, Finish finish) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
  const u8* ring = shared + warp * P::RING;
  u64* own_barriers = reinterpret_cast<u64*>(shared + P::BARRIERS) + warp * STAGES;
  const u32 ring_address = shared_address(ring), barriers = shared_address(own_barriers);
  float* wide_scales = reinterpret_cast<float*>(shared + P::WIDE_SCALES) + warp * P::SLOT_GROUPS * 16;
  float4* partial = reinterpret_cast<float4*>(shared + P::PARTIAL);
  const u64 policy = weight_policy();
  const Masks masks = {unknown(0x000f000f), unknown(0x00f000f0)};

  const u32 total = routes.groups * P::TILES;
  Round<P> round = {first_unit(total, blockIdx.x), 0, first_unit(total, blockIdx.x + 1)};
  Walk<P> ahead = {round};
  ahead.enter(routes, warp);
  auto fill = [&](u32 slot) {
    if (!ahead.more()) return;
    if (lane == 0) {
      const u32 step = ahead.step, groups = P::groups_of(step, ahead.count), bytes = ahead.count * TILE_BYTES;
      const u64 tile = routes.group_expert[ahead.group] * P::TILES + (ahead.unit + P::TILES - ahead.group_end);
      const u64 first = tile * P::GROUPS + P::group_of(step);
      const u32 to = ring_address + slot * P::SLOT, barrier = barriers + 8 * slot;
      expect_bytes(barrier, bytes + groups * 16 * (SCALE_BYTES + ZEROS));
      copy_weights_in(to, given.codes + (tile * P::STEPS + step) * TILE_BYTES, bytes, barrier, policy);
      copy_weights_in(to + P::SLOT_SCALES, given.scales + first * (16 * SCALE_BYTES), groups * 16 * SCALE_BYTES, barrier,
                      policy);
      if constexpr (ZEROS) copy_weights_in(to + P::SLOT_ZEROS, given.zeros + first * 16, groups * 16, barrier, policy);
    }
    ahead.advance(routes, warp);
    if (lets_in && !ahead.more()) allow_next_launch();
  };
#pragma unroll 1
  for (u32 slot = 0; slot < STAGES; ++slot) fill(slot);
  started();

  u32 slot = 0, parity = 0;
#pragma unroll 1
  for (; round.first < round.last; round.first = round.end) {
    round.enter(routes);
    const u32 first_place = routes.group_first[round.first / P::TILES];
    bring(first_place, routes.group_first[(round.end - 1) / P::TILES + 1] - first_place);
    Walk<P> here = {round};
    bool held_here = here.begin(warp);
    const u32 begin = here.at;
    float sums[4] = {};
#pragma unroll 1
    while (held_here) {
      const u32 unit = here.unit, step = here.step, count = here.count, start = here.at - step;
      const u32 place = routes.group_first[here.group], held = routes.group_first[here.group + 1] - place;
      const u8* x = shared + P::X + (place - first_place + min(g, held - 1)) * P::X_STRIDE + step * 128 + t * 32;
      await_bytes(barriers + 8 * slot, parity);
      const u8* codes = ring + slot * P::SLOT;
      widen_scales(codes + P::SLOT_SCALES, wide_scales, P::groups_of(step, count) * 16);
      __syncwarp();
#pragma unroll 2
      for (u32 i = 0; i < count; ++i) {
        const u32 own = P::group_of(step + i) - P::group_of(step);
        const u16* zeros = reinterpret_cast<const u16*>(codes + P::SLOT_ZEROS) + own * 8 + g;
        add_step(sums, reinterpret_cast<const uint4*>(codes)[i * 32 + lane], masks,
                 reinterpret_cast<const uint4*>(x + i * 128), reinterpret_cast<const float2*>(wide_scales) + own * 8 + g, zeros);
      }
      __syncwarp();  // all lanes have read the slot, and the scales
      fill(slot);
      if (++slot == STAGES) {
        slot = 0;
        parity ^= 1;
      }
      held_here = here.next();
      if (step + count == P::STEPS || !held_here) {
        if (step + count == P::STEPS && begin <= start) {
          finish(unit, first_place, sums);
        } else {
          partial[(warp * 2 + (begin <= start)) * 32 + lane] = {sums[0], sums[1], sums[2], sums[3]};
        }
#pragma unroll
        for (float& sum : sums) sum = 0.0f;
      }
    }
    __syncthreads();  // all sums are there, and rows were read; `bring` meets before it writes what `finish` reads
    const u32 of_round = here.stop;  // the unit that this warp began last may be ended by others
    if (begin < of_round && of_round % P::STEPS && begin <= of_round / P::STEPS * P::STEPS) {
      const u32 unit_end = (of_round / P::STEPS + 1) * P::STEPS;
      const float4 mine = partial[(warp * 2 + 1) * 32 + lane];
      float all[4] = {mine.x, mine.y, mine.z, mine.w};
#pragma unroll 1
      for (u32 other = warp + 1; other < WARPS && Walk<P>::begin_of(round, other) < unit_end; ++other) {
        if (Walk<P>::begin_of(round, other) == Walk<P>::begin_of(round, other + 1)) continue;
        const float4 more = partial[other * 64 + lane];
        all[0] += more.x;
        all[1] += more.y;
        all[2] += more.z;
        all[3] += more.w;
      }
      finish(round.first + of_round / P::STEPS, first_place, all);
    }
  }
}

__device__ __forceinline__ float widen_one(const u16* from, u64 index) {
  return widen<KIND_OF_ROWS>(static_cast<u32>(__ldg(from + index)));
}

__device__ __forceinline__ u16 narrow_one(float value) {
  return static_cast<u16>(narrow_pair<KIND_OF_ROWS>(value, 0.0f));
}

using Up = Product<HIDDEN, GATED ? 2 * SIZE : SIZE, UP_STEPS, UP_STAGES>;
using Down = Product<SIZE, HIDDEN, DOWN_STEPS, DOWN_STAGES>;
static_assert(UP_BYTES == Up::BYTES && DOWN_BYTES == Down::BYTES, "as counted");

extern "C" __global__ void __launch_bounds__(THREADS, 2) four_bits_up_kernel(
    const void* ids, const int* expert_map, const float* topk_weights, const u8* hidden_states, const u8* w13,
    const u16* bias, const u8* scales, const u8* zeros, const float* globals, u16* act, i64 num_tokens, i64 num_experts,
    i64 token_stride, i64 alpha, i64 beta, i64 limit) {
  extern __shared__ __align__(128) u8 shared[];
  const u32 lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  Routes& routes = *reinterpret_cast<Routes*>(shared + Up::ROUTES_AT);
  if (threadIdx.x < 32) open_barriers(reinterpret_cast<u64*>(shared + Up::BARRIERS), WARPS * UP_STAGES);
  await_previous_launch();
  find_routes(routes, ids, expert_map, num_experts, num_tokens * TOP_K);

  float* powers = reinterpret_cast<float*>(shared + Up::POWERS);
  const Curve curve = {__uint_as_float(alpha), __uint_as_float(beta), __uint_as_float(limit)};
  auto activate = [&](float gate, float up) {
    if constexpr (GATED) return bend<Accurate, WHICH, CLAMPED>(gate, up, curve);
    return bend<Accurate, WHICH, CLAMPED>(gate, curve);
  };
  multiply_units<Up, UP_STAGES>(
      shared, routes, {w13, scales, zeros}, true, [] {},
      [&](u32 first, u32 count) {
        auto route_of = [&](u32 v) { return routes.order[first + v]; };
        bring_rows<HIDDEN, Up::X_STRIDE, INPUT_IS_WEIGHTED>(
            shared + Up::X, powers, reinterpret_cast<u32*>(shared + Up::MAXIMA), count,
            [&](u32 v) { return hidden_states + route_of(v) / TOP_K * token_stride; },
            [&](u32 v) { return INPUT_IS_WEIGHTED ? __ldcg(topk_weights + route_of(v)) : 1.0f; });
      },
      [&](u32 unit, u32 first_place, const float (&sums)[4]) {
        const u32 group = unit / Up::TILES, tile = unit - group * Up::TILES, expert = routes.group_expert[group];
        const u32 place = routes.group_first[group], held = routes.group_first[group + 1] - place;
        constexpr u32 OWN_ROWS = GATED ? 8 : 16, BELOW = GATED ? SIZE : 8, WIDE = GATED ? 2 * SIZE : SIZE;
        const u32 row = tile * OWN_ROWS + g;
        const float scale = FOLDED * (GLOBAL ? __ldg(globals + expert * (1 + GATED)) : 1.0f);
        const float lower_scale = GATED && GLOBAL ? FOLDED * __ldg(globals + expert * 2 + 1) : scale;
        float first_bias = 0.0f, second_bias = 0.0f;
        if constexpr (UP_BIASED) {
          first_bias = widen_one(bias, static_cast<u64>(expert) * WIDE + row);
          second_bias = widen_one(bias, static_cast<u64>(expert) * WIDE + row + BELOW);
        }
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
          const u32 token = 2 * t + i;
          if (token >= held) continue;
          const float power = powers[place - first_place + token];
          const float gate = sums[i] * scale * power + first_bias, up = sums[2 + i] * lower_scale * power + second_bias;
          u16* to = act + static_cast<u64>(routes.order[place + token]) * SIZE + row;
          to[0] = narrow_one(activate(gate, up));
          if constexpr (!GATED) to[8] = narrow_one(activate(up, gate));
        }
      });
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) four_bits_down_kernel(
    const void* ids, const int* expert_map, const u8* act, const u8* w2, const u16* bias, const u8* scales,
    const u8* zeros, const float* globals, float* results, i64 num_tokens, i64 num_experts) {
  extern __shared__ __align__(128) u8 shared[];
  const u32 lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  Routes& routes = *reinterpret_cast<Routes*>(shared + Down::ROUTES_AT);
  if (threadIdx.x < 32) open_barriers(reinterpret_cast<u64*>(shared + Down::BARRIERS), WARPS * DOWN_STAGES);
  find_routes(routes, ids, expert_map, num_experts, num_tokens * TOP_K);

  float* powers = reinterpret_cast<float*>(shared + Down::POWERS);
  multiply_units<Down, DOWN_STAGES>(
      shared, routes, {w2, scales, zeros}, false,
      [] {
        await_previous_launch();
        allow_next_launch();
      },
      [&](u32 first, u32 count) {
        bring_rows<SIZE, Down::X_STRIDE, false>(
            shared + Down::X, powers, reinterpret_cast<u32*>(shared + Down::MAXIMA), count,
            [&](u32 v) { return act + static_cast<u64>(routes.order[first + v]) * (2 * SIZE); },
            [](u32) { return 1.0f; });
      },
      [&](u32 unit, u32 first_place, const float (&sums)[4]) {
        const u32 group = unit / Down::TILES, tile = unit - group * Down::TILES, expert = routes.group_expert[group];
        const u32 place = routes.group_first[group], held = routes.group_first[group + 1] - place;
        const u32 row = tile * TILE_ROWS + g;
        const float scale = FOLDED * (GLOBAL ? __ldg(globals + expert) : 1.0f);
        float first_bias = 0.0f, second_bias = 0.0f;
        if constexpr (DOWN_BIASED) {
          first_bias = widen_one(bias, static_cast<u64>(expert) * HIDDEN + row);
          second_bias = widen_one(bias, static_cast<u64>(expert) * HIDDEN + row + 8);
        }
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
          const u32 token = 2 * t + i;
          if (token >= held) continue;
          const float power = powers[place - first_place + token];
          float* to = results + static_cast<u64>(routes.order[place + token]) * HIDDEN + row;
          to[0] = sums[i] * scale * power + first_bias;
          to[8] = sums[2 + i] * scale * power + second_bias;
        }
      });
}

extern "C" __global__ void __launch_bounds__(THREADS) four_bits_sum_kernel(
    const void* ids, const int* expert_map, const float* topk_weights, const float4* results, uint2* out,
    i64 num_tokens, i64 num_experts) {
  constexpr u32 WORDS = HIDDEN / 4;
  await_previous_launch();
  allow_next_launch();
  for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < num_tokens * WORDS; i += gridDim.x * THREADS) {
    const u32 token = i / WORDS, word = i - token * WORDS;
    float sums[4] = {};
#pragma unroll 4
    for (u32 k = 0; k < TOP_K; ++k) {
      const u32 route = token * TOP_K + k;
      const i64 id = __ldcg(static_cast<const Id*>(ids) + route);
      u32 expert = ALL;
      if (0 <= id && id < num_experts) expert = MAPPED ? __ldcg(expert_map + id) : static_cast<int>(id);
      if (expert >= EXPERTS) continue;
      const float factor = INPUT_IS_WEIGHTED ? 1.0f : __ldcg(topk_weights + route);
      const float4 row = __ldcg(results + static_cast<u64>(route) * WORDS + word);
      sums[0] = __fmaf_rn(factor, row.x, sums[0]);
      sums[1] = __fmaf_rn(factor, row.y, sums[1]);
      sums[2] = __fmaf_rn(factor, row.z, sums[2]);
      sums[3] = __fmaf_rn(factor, row.w, sums[3]);
    }
    out[i] = {narrow_pair<KIND_OF_ROWS>(sums[0], sums[1]), narrow_pair<KIND_OF_ROWS>(sums[2], sums[3])};
  }
}
