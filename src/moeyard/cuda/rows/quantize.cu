// permute that quantises to codes of 8 bits (float8_e4m3fn, int8) on its way: every row is read and quantised once and
// written to the slots of its routes, its scales beside it. scale = max(largest magnitude, 1e-10) / 448 (127), value /
// scale rounded to nearest even and saturated; all in float32. One scale a row: a team of threads has a row. One scale a
// group of 128: a warp has a piece. IN_PLACE: row r goes to row r. COUNTED: `route_rows` says how many rows there are.

#include "codes.cuh"

constexpr u32 WARPS = BLOCK / 32;
constexpr int KIND = ROW_KIND, BYTES = WORD, COUNT = LOADS;
constexpr int VALUES = values_of<KIND, BYTES>;  // and as many bytes of the result
constexpr int CODE = CODE_IS_INT8 ? INT8 : E4M3;
constexpr bool STAYS = IN_PLACE, COUNTS = COUNTED;
constexpr bool GROUPED = GROUPS, HELD = WHOLE_ROW;  // held: the row of a team is in its registers
constexpr u32 TEAM = GROUPED ? 32 : THREADS_A_ROW;  // threads that share a piece: whole warps
constexpr u32 REACH = TEAM * COUNT;
constexpr u32 GROUP_LANES = 128 / VALUES;   // grouped: lanes that hold the values of one scale,
constexpr u32 IN_WORD = 32 / GROUP_LANES > 0 ? 32 / GROUP_LANES : 1;  // and scales of 32 words

typedef typename WordOf<BYTES>::Type Word;
typedef typename WordOf<VALUES>::Type Result;

// Magnitudes are compared as integers, so that NaN is the largest: of float32, or of two 16-bit floats at a time.
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
  if constexpr (KIND == FLOAT32) return max(a, b);
  return larger_pair(a, b);
}

__device__ __forceinline__ u32 largest_of(const Piece<BYTES>& piece, u32 largest) {
  constexpr u32 MAGNITUDE = KIND == FLOAT32 ? 0x7fffffff : 0x7fff7fff;
  if constexpr (BYTES == 2) return larger(largest, piece.half & MAGNITUDE);
#pragma unroll
  for (int i = 0; i < BYTES / 4; ++i) largest = larger(largest, piece.words[i] & MAGNITUDE);
  return largest;
}

__device__ __forceinline__ u32 of_pair(u32 largest) {
  return KIND == FLOAT32 ? largest : max(largest & 0xffff, largest >> 16);
}

__device__ __forceinline__ float scale_of(u32 largest) {
  return scale_of_magnitude<CODE>(widen<KIND>(largest));
}

// Two floats as two bytes, the low one first.
__device__ __forceinline__ u32 pair_of_codes(float low, float high) {
  if constexpr (CODE == INT8) return to_int8(low) | to_int8(high) << 8;
  return to_e4m3(low, high);
}

__device__ __forceinline__ Result quantised(const Piece<BYTES>& piece, float scale, float inverse) {
  float value[VALUES];
  widen_piece<KIND, BYTES>(piece, value);
#pragma unroll
  for (int v = 0; v < VALUES; ++v) value[v] = quotient(value[v], scale, inverse);
  union {
    Result whole;
    u32 words[(VALUES + 3) / 4];
    u16 half;
    u8 byte;
  } result;
  if constexpr (VALUES == 1) {
    result.byte = pair_of_codes(value[0], 0.0f);
  } else if constexpr (VALUES == 2) {
    result.half = pair_of_codes(value[0], value[1]);
  } else {
#pragma unroll
    for (int i = 0; i < VALUES / 4; ++i) {
      result.words[i] = pair_of_codes(value[4 * i], value[4 * i + 1]) | pair_of_codes(value[4 * i + 2], value[4 * i + 3]) << 16;
    }
  }
  return result.whole;
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCK < 512 ? 768 / BLOCK : 1) quantize_kernel(
    const u8* rows, const int* route_rows, u8* out, float* scales, i64 num_tokens, i64 pieces, i64 magic, i64 shift,
    i64 top_k_, i64 words_, i64 stride) {
  extern __shared__ u32 largest_of_warp[];  // [32]
  const u32 words = words_, team = threadIdx.x / TEAM, lane = threadIdx.x & 31, member = threadIdx.x % TEAM;
  u32 token = blockIdx.x * (BLOCK / TEAM) + team, piece = 0;
  if (GROUPED && !find_piece({num_tokens, pieces, magic, shift}, WARPS, token, piece)) return;
  if constexpr (STAYS) wait_for_previous_launch();
  if constexpr (STAYS && COUNTS) num_tokens = min(num_tokens, i64(max(__ldcg(route_rows), 0)));
  const bool spare = token >= num_tokens;  // a team past the last row goes along for the barriers
  if (STAYS && GROUPED && spare) return;
  const u32 top_k = spare ? 0 : top_k_;
  if (spare) token = 0;
  if constexpr (!STAYS) wait_for_previous_launch();
  const u64 from = reinterpret_cast<u64>(rows) + token * stride;
  const int* own = route_rows + static_cast<i64>(token) * top_k;
  int place = STAYS ? (spare ? -1 : int(token)) : lane < top_k ? __ldg(own + lane) : -1;
  const u32 first = piece * REACH + member;
  Piece<BYTES> held[COUNT];
  auto load = [&](u32 start) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      held[i].word = Word();
      if (start + i * TEAM < words) load_word(held[i].word, from + (start + i * TEAM) * u64(BYTES));
    }
  };

  float scale = 0.0f, inverse = 0.0f;
  if constexpr (!GROUPED) {
    u32 largest = 0;
    load(first);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) largest = largest_of(held[i], largest);
#pragma unroll 1
    for (u32 start = first + REACH; !HELD && start < words; start += REACH) {
      load(start);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) largest = largest_of(held[i], largest);
    }
    largest = __reduce_max_sync(ALL, of_pair(largest));
    if constexpr (TEAM > 32) {
      if (lane == 0) largest_of_warp[threadIdx.x >> 5] = largest;
      __syncthreads();
      largest = __reduce_max_sync(ALL, lane < TEAM / 32 ? largest_of_warp[team * (TEAM / 32) + lane] : 0);
    }
    scale = scale_of(largest);
    inverse = __frcp_rn(scale);
    for (u32 k = member; k < top_k; k += TEAM) {
      const int there = STAYS ? place : __ldg(own + k);
      if (there >= 0) scales[there] = scale;
    }
  }

#pragma unroll 1
  for (u32 turn = 0; turn < (GROUPED ? 1 : words); turn += REACH) {
    const u32 start = first + turn;
    if (GROUPED || !HELD) load(start);
    Result result[COUNT];
    float stored_scale = 0.0f;  // grouped: lane i has the scale of group i of this piece
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if constexpr (GROUPED) {
        u32 largest = of_pair(largest_of(held[i], 0));
#pragma unroll
        for (u32 step = 1; step < GROUP_LANES; step *= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, step));
        scale = scale_of(largest);
        inverse = __frcp_rn(scale);
        const float moved = __shfl_sync(ALL, scale, lane % IN_WORD * GROUP_LANES);
        if (lane / IN_WORD == i) stored_scale = moved;
      }
      result[i] = quantised(held[i], scale, inverse);
    }
    const u32 groups = (words + GROUP_LANES - 1) / GROUP_LANES, group = piece * (COUNT * IN_WORD) + lane;
    const bool stores_scale = GROUPED && lane < COUNT * IN_WORD && group < groups;
#pragma unroll 1
    for (u32 base = 0; base < top_k; base += 32) {  // a lane a route
      if (base) place = base + lane < top_k ? __ldg(own + base + lane) : -1;
      const u32 stop = min(top_k - base, 32u);
#pragma unroll 2
      for (u32 k = 0; k < stop; ++k) {
        const int there = __shfl_sync(ALL, place, k);
        if (there < 0) continue;
        Result* to = reinterpret_cast<Result*>(out) + static_cast<u64>(there) * words + start;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          if (start + i * TEAM < words) STORE(to + i * TEAM, result[i]);
        }
        if (stores_scale) scales[static_cast<u64>(there) * groups + group] = stored_scale;
      }
      if (base + 32 >= top_k && !GROUPED && !HELD && !STAYS) place = lane < top_k ? __ldg(own + lane) : -1;
    }
  }
}
