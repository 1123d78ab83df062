// What the kernels of four_bits.cu share: routes by expert, codes of 4 bits as float16, what a warp multiplies.
//
// Weights lie in tiles of 16 rows by 64 columns (`pack.py`). A step is a tile: 512 bytes of codes, the scales of its
// groups of columns, their zero points.

#pragma once

#include "activation.cuh"
#include "bulk.cuh"
#include "mma.cuh"
#include "nibbles.cuh"

// One model and one plan a compilation; launches say how many tokens there are, MOST_ROUTES routes at most.
typedef ID Id;                          // int or i64
constexpr bool MAPPED = MAP;            // whether there is an expert_map
constexpr int KIND_OF_ROWS = ROW_KIND;  // BFLOAT16 or FLOAT16
constexpr u32 TOP_K = NUM_TOP_K, ROUTES = MOST_ROUTES, EXPERTS = NUM_LOCAL;
constexpr u32 HIDDEN = HIDDEN_SIZE, SIZE = INTERMEDIATE_SIZE;
constexpr bool GATED = GATED_ROWS, INPUT_IS_WEIGHTED = WEIGHT_ON_INPUT;
constexpr bool UP_BIASED = W13_BIAS, DOWN_BIASED = W2_BIAS, CLAMPED = HAS_LIMIT;
constexpr int WHICH = ACTIVATION;  // of the curves of activation.cuh
constexpr u32 WARPS = WARPS_A_BLOCK, THREADS = 32 * WARPS;
constexpr bool E2M1 = CODES_ARE_E2M1, ZEROS = ZERO_POINTS, GLOBAL = GLOBAL_SCALES;
constexpr u32 GROUP = SCALE_COLUMNS;  // columns that share a scale; 0: all
constexpr int KIND_OF_SCALES = SCALE_KIND;  // those of nibbles.cuh, or FLOAT32, BFLOAT16, FLOAT16
constexpr u32 SCALE_BYTES = KIND_OF_SCALES == FLOAT32 ? 4 : KIND_OF_SCALES <= FLOAT16 ? 2 : 1;
constexpr u32 TILE_BYTES = 512, TILE_ROWS = 16, TILE_COLUMNS = 64, TOGETHER = 8;  // routes that are multiplied at once
constexpr u32 PARTS = GROUP && GROUP < TILE_COLUMNS ? TILE_COLUMNS / GROUP : 1;   // groups of a step
constexpr u32 PRODUCTS = 4 / PARTS;                                               // of a group, in a step
static_assert(HIDDEN % TILE_COLUMNS == 0 && SIZE % TILE_COLUMNS == 0, "tiles are whole");
static_assert(GROUP % TILE_COLUMNS == 0 || GROUP == 16 || GROUP == 32, "groups divide tiles, or the other way round");
static_assert(!ZEROS || !E2M1, "codes of int4 alone have zero points");

// The routes that have an expert here, by expert and then by number, in groups of one expert and 8 routes at most.
struct Routes {
  u32 found[ROUTES];  // of a route: its expert and its number there, or ALL
  u32 order[ROUTES];  // the route of each place
  u32 group_expert[ROUTES];
  u32 group_first[ROUTES + 1];  // its first place; behind the last one their number
  u32 places[EXPERTS];          // an expert's first place; before that its routes
  u32 groups;
};

// By the whole block. Loads go to the L2 cache: a kernel that has not waited yet may ask for what only the launch before
// the one before it wrote.
__device__ __forceinline__ void find_routes(Routes& routes, const void* ids, const int* expert_map, i64 num_experts,
                                            u32 count) {
  const u32 lane = threadIdx.x & 31;
  for (u32 e = threadIdx.x; e < EXPERTS; e += THREADS) routes.places[e] = 0;
  for (u32 r = threadIdx.x; r < count; r += THREADS) {
    const i64 id = __ldcg(static_cast<const Id*>(ids) + r);
    u32 expert = ALL;
    if (0 <= id && id < num_experts) expert = MAPPED ? __ldcg(expert_map + id) : static_cast<int>(id);
    routes.found[r] = expert < EXPERTS ? expert : ALL;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
#pragma unroll 1
    for (u32 base = 0; base < count; base += 32) {
      const u32 expert = base + lane < count ? routes.found[base + lane] : ALL;
      const u32 mask = __match_any_sync(ALL, expert), before = __popc(mask & lanes_below());
      const u32 held = expert == ALL ? 0 : routes.places[expert];
      __syncwarp();
      if (expert != ALL) {
        routes.found[base + lane] = expert << 16 | (held + before);
        if (before == 0) routes.places[expert] = held + __popc(mask);
      }
      __syncwarp();
    }
    u32 places = 0, groups = 0;
#pragma unroll 1
    for (u32 base = 0; base < EXPERTS; base += 32) {
      const u32 expert = base + lane, held = expert < EXPERTS ? routes.places[expert] : 0;
      const u32 mine = (held + TOGETHER - 1) / TOGETHER, both = scan_warp(mine << 16 | held, lane);
      const u32 first = places + (both & 0xffff) - held, first_group = groups + (both >> 16) - mine;
      if (expert < EXPERTS) routes.places[expert] = first;
      for (u32 i = 0; i < mine; ++i) {
        routes.group_expert[first_group + i] = expert;
        routes.group_first[first_group + i] = first + i * TOGETHER;
      }
      const u32 all = __shfl_sync(ALL, both, 31);
      places += all & 0xffff;
      groups += all >> 16;
    }
    if (lane == 0) {
      routes.groups = groups;
      routes.group_first[groups] = places;
    }
    __syncwarp();
#pragma unroll 1
    for (u32 r = lane; r < count; r += 32) {
      const u32 found = routes.found[r];
      if (found != ALL) routes.order[routes.places[found >> 16] + (found & 0xffff)] = r;
    }
  }
  __syncthreads();
}

// The first of `total` units that belong to block `block`: every block has as many, or one more.
__device__ __forceinline__ u32 first_unit(u32 total, u32 block) {
  return static_cast<u64>(total) * block / gridDim.x;
}

// What is left of the weights' scale for the end: e2m1 was taken times 2^-14.
constexpr float FOLDED = E2M1 ? 16384.0f : 1.0f;

// `count` scales, a multiple of 16, of shared memory as float32 there, by a warp.
__device__ __forceinline__ void widen_scales(const u8* from, float* to, u32 count) {
  const u32 lane = threadIdx.x & 31;
  if constexpr (SCALE_BYTES == 1) {
#pragma unroll 1
    for (u32 i = lane; i < count / 4; i += 32) {
      const u32 four = reinterpret_cast<const u32*>(from)[i];
      uint4 wide;
      if constexpr (KIND_OF_SCALES == E8M0_SCALES) {
        wide = {__float_as_uint(power_of_byte(four << 23)), __float_as_uint(power_of_byte(four << 15)),
                __float_as_uint(power_of_byte(four << 7)), __float_as_uint(power_of_byte(four >> 1))};
      } else {
        u32 low, high;
        halves_of_e4m3(four, low, high);
        wide = {__float_as_uint(widen<FLOAT16>(low & 0xffff)), __float_as_uint(widen<FLOAT16>(low >> 16)),
                __float_as_uint(widen<FLOAT16>(high & 0xffff)), __float_as_uint(widen<FLOAT16>(high >> 16))};
      }
      reinterpret_cast<uint4*>(to)[i] = wide;
    }
  } else {
#pragma unroll 1
    for (u32 i = lane; i < count; i += 32) {
      if constexpr (KIND_OF_SCALES == FLOAT32) to[i] = reinterpret_cast<const float*>(from)[i];
      else to[i] = widen<KIND_OF_SCALES>(static_cast<u32>(reinterpret_cast<const u16*>(from)[i]));
    }
  }
}

// One product of 16 x 16 codes: those s of the words of rows g (x, y) and g + 8 (z, w).
template <u32 S>
__device__ __forceinline__ void add_product(float (&sums)[4], const uint4& codes, const Masks& masks, u32 zero, u32 lower_zero,
                                            u32 x0, u32 x1) {
  auto wide = [&](u32 word, u32 of_row) { return widen_pair<E2M1, FLOAT16>(S, word, of_row, masks); };
  const u32 row[2] = {wide(codes.x, zero), wide(codes.y, zero)};
  const u32 lower[2] = {wide(codes.z, lower_zero), wide(codes.w, lower_zero)};
  multiply_tile<FLOAT16>(sums, row, lower, x0, x1);
}

// Adds a step. `x` are this lane's 16 values of its token, `scales` and `zeros` those of the first group of the step and
// of rows g and g + 8. Lane 4g + t has sums of rows g, then g + 8, of tokens 2t and 2t + 1.
__device__ __forceinline__ void add_step(float (&sums)[4], const uint4& codes, const Masks& masks, const uint4* x,
                                         const float2* scales, const u16* zeros) {
  const uint4 first = x[0], second = x[1];
#pragma unroll
  for (u32 part = 0; part < PARTS; ++part) {
    const u32 both = ZEROS ? zeros[part * 8] : 0x0808, zero = both & 0xff, lower_zero = both >> 8;
    float own[4] = {};
    const u32 s = part * PRODUCTS;
    if (s <= 0) add_product<0>(own, codes, masks, zero, lower_zero, first.x, first.y);
    if (s <= 1 && 1 < s + PRODUCTS) add_product<1>(own, codes, masks, zero, lower_zero, first.z, first.w);
    if (s <= 2 && 2 < s + PRODUCTS) add_product<2>(own, codes, masks, zero, lower_zero, second.x, second.y);
    if (3 < s + PRODUCTS) add_product<3>(own, codes, masks, zero, lower_zero, second.z, second.w);
    const float2 scale = scales[part * 8];
    sums[0] = __fmaf_rn(own[0], scale.x, sums[0]);
    sums[1] = __fmaf_rn(own[1], scale.x, sums[1]);
    sums[2] = __fmaf_rn(own[2], scale.y, sums[2]);
    sums[3] = __fmaf_rn(own[3], scale.y, sums[3]);
  }
}

// A value times the router's weight, rounded as a row of its own would be.
__device__ __forceinline__ u32 weighted_pair(u32 pair, float factor) {
  return narrow_pair<KIND_OF_ROWS>(widen<KIND_OF_ROWS>(pair & 0xffff) * factor, widen<KIND_OF_ROWS>(pair >> 16) * factor);
}

template <bool WEIGHTED>
__device__ __forceinline__ uint4 word_of_row(const u8* row, u32 word, float factor) {
  uint4 made = __ldcg(reinterpret_cast<const uint4*>(row) + word);
  if constexpr (WEIGHTED) {
    made = {weighted_pair(made.x, factor), weighted_pair(made.y, factor), weighted_pair(made.z, factor),
            weighted_pair(made.w, factor)};
  }
  return made;
}

__device__ __forceinline__ u32 scaled_pair(u32 pair, float factor) {
  if constexpr (KIND_OF_ROWS == FLOAT16) return pair;
  return narrow_pair<FLOAT16>(widen<BFLOAT16>(pair & 0xffff) * factor, widen<BFLOAT16>(pair >> 16) * factor);
}

// Brings `count` rows of COLUMNS values into shared memory as float16, by the whole block; `row_of` says where a row
// is, `factor_of` what multiplies it before. bfloat16 rows are multiplied by a power of two that takes their largest
// magnitude to [2^14, 2^15); `powers` becomes its inverse. Of a step a lane's 16 values are side by side: value p of
// product s of lanes t is column 16s + 4t + p.
template <u32 COLUMNS, u32 STRIDE, bool WEIGHTED, typename RowOf, typename FactorOf>
__device__ __forceinline__ void bring_rows(u8* to, float* powers, u32* maxima, u32 count, RowOf row_of,
                                           FactorOf factor_of) {
  constexpr u32 WORDS = COLUMNS / 8, MAGNITUDE = 0x7fff7fff;
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if constexpr (KIND_OF_ROWS == BFLOAT16) {
#pragma unroll 1
    for (u32 v = 0; v < count; ++v) {
      u32 largest = 0;
#pragma unroll 2
      for (u32 w = threadIdx.x; w < WORDS; w += THREADS) {
        const uint4 word = word_of_row<WEIGHTED>(row_of(v), w, factor_of(v));
        const u32 pair = larger_pair(larger_pair(word.x & MAGNITUDE, word.y & MAGNITUDE),
                                     larger_pair(word.z & MAGNITUDE, word.w & MAGNITUDE));
        largest = max(largest, max(pair & 0xffff, pair >> 16));
      }
      largest = __reduce_max_sync(ALL, largest);
      if (lane == 0) maxima[v * WARPS + warp] = largest;
    }
    __syncthreads();
  }
#pragma unroll 1
  for (u32 v = 0; v < count; ++v) {
    u32 exponent = 141;  // of float32: the power is 1
    if constexpr (KIND_OF_ROWS == BFLOAT16) {
      u32 largest = 0;
#pragma unroll
      for (u32 i = 0; i < WARPS; ++i) largest = max(largest, maxima[v * WARPS + i]);
      exponent = max(largest >> 7, 15u);
    }
    const float factor = __uint_as_float((268 - exponent) << 23);
    if (threadIdx.x == 0) powers[v] = __uint_as_float((exponent - 14) << 23);
#pragma unroll 2
    for (u32 w = threadIdx.x; w < WORDS; w += THREADS) {
      const uint4 word = word_of_row<WEIGHTED>(row_of(v), w, factor_of(v));
      uint2* at = reinterpret_cast<uint2*>(to + v * STRIDE + w / 8 * 128) + (w % 2 * 8 + w % 8 / 2);
      at[0] = {scaled_pair(word.x, factor), scaled_pair(word.y, factor)};
      at[4] = {scaled_pair(word.z, factor), scaled_pair(word.w, factor)};
    }
  }
  __syncthreads();
}
