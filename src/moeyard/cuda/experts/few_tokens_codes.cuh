// What few_tokens.cu does with weights of 8 bits: their scales, rows that are quantised where they lie, products.

#pragma once

#include "few_tokens.cuh"
#include "mma.cuh"

// More macros of a compilation. Scales: weight rows and columns that share one (0: all), and in which block of a larger
// matrix the first row of w13 and the first column of w2 lie. Activations: their code, columns that share a scale (0:
// all), and whether scales are given.
constexpr u32 ROWS_A_SCALE = SCALE_ROWS, COLUMNS_A_SCALE = SCALE_COLUMNS, X_GROUP = ACTIVATION_GROUP;
constexpr int KIND_OF_SCALES = SCALE_KIND;
constexpr bool X_STATIC = STATIC_SCALES;
constexpr u32 GRID = BLOCKS;  // blocks of both launches
constexpr int KIND_OF_X = X_CODE == E4M3 ? FLOAT16 : KIND_OF_ROWS;
constexpr bool IN_PARTS = COLUMNS_A_SCALE || X_GROUP;  // sums of 128 columns have scales of their own
constexpr u32 GROUP_WORDS = 16;                        // of 128 columns
static_assert((COLUMNS_A_SCALE == 0 || COLUMNS_A_SCALE == 128) && (X_GROUP == 0 || X_GROUP == 128), "parts are equal");
static_assert(BLOCK_START % 8 == 0, "parts begin with words");

__device__ constexpr u32 least(u32 a, u32 b) { return a < b ? a : b; }
__device__ constexpr u32 parts(u32 size, u32 part) { return part ? (size + part - 1) / part : 1; }

// Units of a block at most, and how many runs of `run` units those touch, of `runs` in all.
__device__ constexpr u32 units_of_block(u32 total) { return (total + GRID - 1) / GRID; }
__device__ constexpr u32 touched(u32 units, u32 run, u32 runs) { return least(runs, (units + run - 2) / run + 1); }

// The scales of a matrix of HEIGHT rows and WIDTH columns.
template <u32 HEIGHT, u32 WIDTH, u32 FIRST_ROW, u32 FIRST_COLUMN>
struct Scales {
  static constexpr u32 ROWS = parts(FIRST_ROW + HEIGHT, ROWS_A_SCALE);
  static constexpr u32 COLUMNS = parts(FIRST_COLUMN + WIDTH, COLUMNS_A_SCALE);
  static constexpr u32 GROUPS = parts(FIRST_COLUMN + WIDTH, X_GROUP);  // of a row that it is multiplied by
  static constexpr u32 FIRST_WORD = IN_PARTS ? FIRST_COLUMN / 8 : 0;
  static constexpr u32 SHIFT = FIRST_WORD % 4;  // lanes that have nothing at first, so that four never share two parts

  static __device__ __forceinline__ u32 row_of(u32 row) {
    return ROWS_A_SCALE ? (FIRST_ROW + row) / parts(ROWS_A_SCALE, 1) : 0;
  }
  // Rows of scales that `rows` weight rows of so many matrices touch at most.
  static __device__ constexpr u32 rows_held(u32 rows, u32 matrices) {
    return ROWS_A_SCALE == 0 ? matrices : ROWS_A_SCALE == 1 ? rows : rows / parts(ROWS_A_SCALE, 1) + 2 * matrices;
  }
};

__device__ __forceinline__ float scale_at(const void* scales, u64 index) {
  if constexpr (KIND_OF_SCALES == FLOAT32) return __ldcg(static_cast<const float*>(scales) + index);
  return widen<KIND_OF_SCALES>(static_cast<u32>(__ldcg(static_cast<const u16*>(scales) + index)));
}

// Scales of weights into shared memory, by the whole block: rows from number `first` on, WIDE of each. `index_of` says
// where column w of row r is; nowhere below 0.
template <u32 WIDE, typename IndexOf>
__device__ __forceinline__ void load_scales(float* to, const void* scales, u32 first, u32 end, IndexOf index_of) {
#pragma unroll 1
  for (u32 i = threadIdx.x; i < (end - first) * WIDE; i += THREADS) {
    const i64 index = index_of(first + i / WIDE, i % WIDE);
    if (index >= 0) to[i] = scale_at(scales, index);
  }
}

// The static scales of `count` rows, each of its place's expert.
__device__ __forceinline__ void load_static_scales(float* to, const float* scales, const u32* experts, u32 count) {
  if (X_STATIC && threadIdx.x < count) to[threadIdx.x] = __ldcg(scales + experts[threadIdx.x]);
}

// Eight values of a row as products take them: pairs of 16-bit floats (of e4m3 the values of codes), or eight bytes.
template <bool WEIGHTED>
__device__ __forceinline__ uint4 quantised(const uint4& word, float factor, float scale, float inverse) {
  float value[8];
  u32 made[4] = {};
  widen_word(word, value);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if constexpr (WEIGHTED) value[i] *= factor;
    if constexpr (X_CODE != NO_CODE) {
      value[i] = X_STATIC ? __fdiv_rn(value[i], scale) : quotient(value[i], scale, inverse);
    }
    if constexpr (X_CODE == INT8) made[i / 4] |= to_int8(value[i]) << 8 * (i % 4);
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    if constexpr (X_CODE == E4M3) {
      const u32 codes = to_e4m3(value[2 * i], value[2 * i + 1]) | to_e4m3(value[2 * i + 2], value[2 * i + 3]) << 16;
      halves_of_e4m3(codes, made[i], made[i + 1]);
    } else if constexpr (X_CODE == NO_CODE) {
      made[i] = narrow_pair<KIND_OF_ROWS>(value[2 * i], value[2 * i + 1]);
      made[i + 1] = narrow_pair<KIND_OF_ROWS>(value[2 * i + 2], value[2 * i + 3]);
    }
  }
  return {made[0], made[1], made[2], made[3]};
}

__device__ __forceinline__ u32 largest_of_word(const uint4& word) {
  constexpr u32 MAGNITUDE = 0x7fff7fff;
  const u32 pair = larger_pair(larger_pair(word.x & MAGNITUDE, word.y & MAGNITUDE),
                               larger_pair(word.z & MAGNITUDE, word.w & MAGNITUDE));
  return max(pair & 0xffff, pair >> 16);
}

// Quantises `count` rows of WORDS words where they lie in shared memory, by the whole block; `factor_of` are what they
// are multiplied by before. Leaves scales, [count, GROUPS], which hold the given ones before if they are static.
// `maxima` are words for WARPS times `count`. USUAL: how many rows there mostly are.
template <class Scales, u32 WORDS, u32 USUAL, bool WEIGHTED, typename FactorOf>
__device__ __forceinline__ void quantise_rows(uint4* rows, u32 count, float* scales, u32* maxima, FactorOf factor_of) {
  constexpr u32 SHARE = WARPS / USUAL ? WARPS / USUAL : 1, TEAMS = WARPS / SHARE;  // warps that have a row, and such teams
  constexpr bool MEASURED = X_CODE != NO_CODE && !X_GROUP && (!X_STATIC || X_CODE == INT8);
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, member = warp % SHARE, team = warp / SHARE;
  const u32 first = team < TEAMS ? team : count;
  auto magnitude_of = [&](u32 v) {
    u32 largest = 0;
#pragma unroll
    for (u32 i = 0; i < SHARE; ++i) largest = max(largest, maxima[v * SHARE + i]);
    return widen<KIND_OF_ROWS>(largest) * (WEIGHTED ? fabsf(factor_of(v)) : 1.0f);
  };

  if constexpr (MEASURED) {
#pragma unroll 1
    for (u32 v = first; v < count; v += TEAMS) {
      u32 largest = 0;
#pragma unroll 4
      for (u32 w = member * 32 + lane; w < WORDS; w += 32 * SHARE) {
        largest = max(largest, largest_of_word(rows[v * WORDS + w]));
      }
      largest = __reduce_max_sync(ALL, largest);
      if (lane == 0) maxima[v * SHARE + member] = largest;
    }
    __syncthreads();
  }
#pragma unroll 1
  for (u32 v = first; v < count; v += TEAMS) {
    const float factor = WEIGHTED ? factor_of(v) : 1.0f;
    uint4* row = rows + v * WORDS;
    if constexpr (X_GROUP) {
      constexpr u32 FIRST = Scales::FIRST_WORD;
#pragma unroll 2
      for (u32 w = member * 32 + lane; w < (FIRST + WORDS + 31) / 32 * 32; w += 32 * SHARE) {
        const bool here = w - FIRST < WORDS;
        const uint4 word = here ? row[w - FIRST] : uint4{};
        u32 largest = largest_of_word(word);
#pragma unroll
        for (u32 step = 1; step < GROUP_WORDS; step *= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, step));
        const float scale = scale_of_magnitude<X_CODE>(widen<KIND_OF_ROWS>(largest) * (WEIGHTED ? fabsf(factor) : 1.0f));
        if (here) row[w - FIRST] = quantised<WEIGHTED>(word, factor, scale, __frcp_rn(scale));
        if (lane % GROUP_WORDS == 0 && w / GROUP_WORDS < Scales::GROUPS) {
          scales[v * Scales::GROUPS + w / GROUP_WORDS] = scale;
        }
      }
    } else {
      float scale = 1.0f;
      if constexpr (X_STATIC) scale = scales[v];
      else if constexpr (MEASURED) scale = scale_of_magnitude<X_CODE>(magnitude_of(v));
      const float inverse = X_STATIC ? 0.0f : __frcp_rn(scale);
#pragma unroll 2
      for (u32 w = member * 32 + lane; w < WORDS; w += 32 * SHARE) {
        row[w] = quantised<WEIGHTED>(row[w], factor, scale, inverse);
      }
      if (!X_STATIC && X_CODE != NO_CODE && member == 0 && lane == 0) scales[v] = scale;
    }
  }
  __syncthreads();
  if constexpr (MEASURED && X_STATIC) {  // no byte is NaN: the scale is, where the row has one
#pragma unroll 1
    for (u32 v = threadIdx.x; v < count; v += THREADS) {
      const float magnitude = magnitude_of(v);
      if (magnitude != magnitude) scales[v] = magnitude;
    }
    __syncthreads();
  }
}

// The sums of COUNT rows of codes, as far as a lane has them. Rows are multiplied by tensor cores, two at a time: lanes
// stay with the words that they read, and the sums stand on a diagonal (mma.cuh). Bytes by bytes are summed as integers.
template <class Scales, u32 COUNT>
struct CodeSums {
  static constexpr bool BYTES = X_CODE == INT8;
  static constexpr u32 PAIRS = (COUNT + 1) / 2, CHAINS = IN_PARTS ? 1 : 2;
  float tiles[PAIRS][CHAINS][4] = {};
  int numbers[COUNT] = {};
  float whole[COUNT] = {};  // in parts: what has its scales

  __device__ __forceinline__ void multiply(const uint2 (&codes)[COUNT], const uint4& x) {
    if constexpr (BYTES) {
#pragma unroll
      for (u32 r = 0; r < COUNT; ++r) {
        numbers[r] = __dp4a(static_cast<int>(codes[r].x), static_cast<int>(x.x), numbers[r]);
        numbers[r] = __dp4a(static_cast<int>(codes[r].y), static_cast<int>(x.y), numbers[r]);
      }
    } else {
#pragma unroll
      for (u32 p = 0; p < PAIRS; ++p) {
        u32 a[2][2], b[2][2] = {};
        widen_codes<WEIGHTS, KIND_OF_X>(codes[2 * p].x, a[0][0], a[0][1]);
        widen_codes<WEIGHTS, KIND_OF_X>(codes[2 * p].y, a[1][0], a[1][1]);
        if (2 * p + 1 < COUNT) {
          const uint2& other = codes[least(2 * p + 1, COUNT - 1)];
          widen_codes<WEIGHTS, KIND_OF_X>(other.x, b[0][0], b[0][1]);
          widen_codes<WEIGHTS, KIND_OF_X>(other.y, b[1][0], b[1][1]);
        }
        multiply_tile<KIND_OF_X>(tiles[p][0], a[0], b[0], x.x, x.y);
        multiply_tile<KIND_OF_X>(tiles[p][CHAINS - 1], a[1], b[1], x.z, x.w);
      }
    }
  }

  __device__ __forceinline__ float sum(u32 r) const {
    if constexpr (BYTES) return static_cast<float>(numbers[r]);
    const float first = on_diagonal(tiles[r / 2][0], r % 2);
    return CHAINS == 1 ? first : first + on_diagonal(tiles[r / 2][CHAINS - 1], r % 2);
  }

  // A segment of `held` words of rows of WORDS, SEGMENT from one to the next; its first word is number `first` of its
  // row.
  // In parts `weight_scales` are those of the first row, the other rows' STRIDE from each other.
  template <u32 WORDS, u32 SEGMENT, u32 STRIDE>
  __device__ __forceinline__ void add(const uint2* codes, const uint4* x_words, u32 held, u32 first,
                                      const float* weight_scales, const float* x_scales) {
    constexpr bool FULL = Scales::SHIFT == 0 && SEGMENT % 32 == 0 && WORDS % SEGMENT == 0;  // no lane goes past the end
    const u32 lane = threadIdx.x & 31, first_part = (Scales::FIRST_WORD - Scales::SHIFT + first + lane) / GROUP_WORDS;
    auto part = [&](u32 i, u32 parts) {  // past the end: the last
      return FULL ? first_part + i / GROUP_WORDS : min(first_part + i / GROUP_WORDS, parts - 1);
    };
#pragma unroll
    for (u32 i = 0; i < SEGMENT + Scales::SHIFT; i += 32) {
      const u32 at = i + lane - Scales::SHIFT;
      uint4 x = {};
      uint2 word[COUNT] = {};
      if (at < held) {
        x = x_words[at];
#pragma unroll
        for (u32 r = 0; r < COUNT; ++r) word[r] = codes[r * SEGMENT + at];
      }
      multiply(word, x);
      if constexpr (IN_PARTS) {
        const float of_x = Scales::GROUPS > 1 ? x_scales[part(i, Scales::GROUPS)] : 1.0f;
#pragma unroll
        for (u32 r = 0; r < COUNT; ++r) {
          float scale = of_x;
          if (Scales::COLUMNS > 1) scale *= weight_scales[r * STRIDE + part(i, Scales::COLUMNS)];
          whole[r] = __fmaf_rn(sum(r), scale, whole[r]);
        }
#pragma unroll
        for (u32 r = 0; r < COUNT; ++r) {
          numbers[r] = 0;
#pragma unroll
          for (float& value : tiles[r / 2][0]) value = 0.0f;
        }
      }
    }
  }

  // This lane's share of row r, with all scales; `weight_scale` and `x_scale` are the first of theirs.
  __device__ __forceinline__ float scaled(u32 r, float weight_scale, float x_scale) const {
    float result = IN_PARTS ? whole[r] : sum(r);
    if (!BYTES && !has_diagonal()) result = 0.0f;
    if (X_CODE != NO_CODE && Scales::GROUPS == 1) result *= x_scale;
    return Scales::COLUMNS == 1 ? result * weight_scale : result;
  }
};
