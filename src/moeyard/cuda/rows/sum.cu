// Rows of a token's routes, weighted and added up in k order. A warp has a piece of a token's row, so sums need no word
// between threads; products and sums are rounded one by one, as eager float32 arithmetic does, so the bits are its.
// Absent rows (dropped routes) are neither read nor weighed.

#include "rows.cuh"

constexpr u32 WARPS = BLOCK / 32;
constexpr int KIND = ROW_KIND, BYTES = WORD, COUNT = LOADS;  // COUNT words of a row in every lane
constexpr u32 REACH = 32 * COUNT;  // words of a piece
constexpr int TOP_K = STATIC_TOP_K;       // 0: known at run time
constexpr int BATCH = TOP_K ? TOP_K : 8;  // rows on their way at the same time: __launch_bounds__ leaves 64 registers,
                                          // and with no bound on blocks the compiler would not take as many
constexpr bool WEIGHTED = WEIGHTS;
constexpr int MAPPED = 0, ALL_ROUTES = 1, BY_ID = 2, BY_MAP = 3, HOW = ROUTES;  // which rows are added
typedef ID Id;  // by id, by map: int or i64

constexpr int VALUES = values_of<KIND, BYTES>;

// The row of a route, or -1. Mapped: route_rows says so. Otherwise row k of the token's own rows, unless its id or the
// map drops it.
__device__ __forceinline__ int row_of(const void* routes, const int* expert_map, u32 num_experts, i64 route, u32 k) {
  if constexpr (HOW == MAPPED) return __ldg(static_cast<const int*>(routes) + route);
  if constexpr (HOW == ALL_ROUTES) return k;
  const i64 id = __ldg(static_cast<const Id*>(routes) + route);
  if (id < 0 || id >= num_experts) return -1;
  if constexpr (HOW == BY_ID) return k;
  const int local = __ldg(expert_map + id);
  return local < 0 || local == 0x7fffffff ? -1 : static_cast<int>(k);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1024 / BLOCK) sum_kernel(
    const u8* rows, const void* routes, const float* weights, const int* expert_map, u8* out, i64 num_tokens,
    i64 pieces, i64 magic, i64 shift, i64 top_k_, i64 words_, i64 token_stride, i64 row_stride, i64 num_experts) {
  typedef typename WordOf<BYTES>::Type Word;
  u32 token, piece;
  if (!find_piece({num_tokens, pieces, magic, shift}, WARPS, token, piece)) return;
  const u32 lane = threadIdx.x & 31, top_k = TOP_K ? TOP_K : top_k_, first = piece * REACH + lane, words = words_;
  wait_for_previous_launch();

  float total[COUNT][VALUES] = {};
#pragma unroll 1
  for (u32 start = 0; start < top_k; start += 32) {  // a lane a route
    const i64 route = static_cast<i64>(token) * top_k + start + lane;
    const bool mine = start + lane < top_k;
    const int row = mine ? row_of(routes, expert_map, num_experts, route, start + lane) : -1;
    const float weight = WEIGHTED && mine ? __ldg(weights + route) : 1.0f, own_factor = row < 0 ? 0.0f : weight;
    const u64 address = row < 0 ? 0 : reinterpret_cast<u64>(rows) + token * token_stride + row * row_stride;
    const u32 stop = min(top_k - start, 32u);
#pragma unroll 1
    for (u32 k = 0; k < stop; k += BATCH) {
      Piece<BYTES> taken[BATCH][COUNT];
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const u64 there = __shfl_sync(ALL, address, k + b & 31), from = there + first * u64(BYTES);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          taken[b][i].word = Word();
          if (there && k + b < stop && first + i * 32 < words) load_word(taken[b][i].word, from + i * 32 * BYTES);
        }
      }
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const float factor = __shfl_sync(ALL, own_factor, k + b & 31);
        if (k + b < stop) {  // an absent row adds 0, which changes no sum that began as +0
#pragma unroll
          for (int i = 0; i < COUNT; ++i) {
            float value[VALUES];
            widen_piece<KIND, BYTES>(taken[b][i], value);
#pragma unroll
            for (int v = 0; v < VALUES; ++v) {
              total[i][v] = __fadd_rn(total[i][v], WEIGHTED ? __fmul_rn(value[v], factor) : value[v]);
            }
          }
        }
      }
    }
  }

  Word* to = reinterpret_cast<Word*>(out) + static_cast<i64>(token) * words + first;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    Piece<BYTES> result;
    narrow_piece<KIND, BYTES>(total[i], result);
    if (first + i * 32 < words) STORE(to + i * 32, result.word);
  }
}
