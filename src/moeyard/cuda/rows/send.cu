// Rows to where they belong. permute: every row is read once, a warp a piece of it, and written to the slots of its
// routes; its scales go with the first piece. shuffle: a warp a piece of a result, gathered by a map.
// Both move bytes: words of WORD bytes, LOADS of them in flight in every lane.

#include "rows.cuh"

constexpr u32 WARPS = BLOCK / 32;
constexpr int SENT = WORD;          // bytes of a word of a row
constexpr int SCALED = SCALE_WORD;  // bytes of a word of its scales; 0: there are none
constexpr int COUNT = LOADS;
constexpr u32 REACH = 32 * COUNT;   // words of a piece
typedef MAP_TYPE Index;             // shuffle: int or i64

// Words [first, first + 32 * N) of a row, as far as it goes, to the same words of rows `route_rows` of `out`.
template <int BYTES, int N>
__device__ __forceinline__ void send_words(const u8* row, u32 first, u32 words, const int* route_rows, u32 top_k,
                                           u8* out) {
  typedef typename WordOf<BYTES>::Type Word;
  const u32 lane = threadIdx.x & 31, begin = first + lane;
  int place = lane < top_k ? __ldg(route_rows + lane) : -1;
  Word word[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (begin + i * 32 < words) load_word(word[i], reinterpret_cast<u64>(row) + (begin + i * 32) * u64(BYTES));
  }
#pragma unroll 1
  for (u32 start = 0; start < top_k; start += 32) {  // a lane a route
    if (start) place = start + lane < top_k ? __ldg(route_rows + start + lane) : -1;
    const u64 address = place < 0 ? 0 : reinterpret_cast<u64>(out) + place * (u64(words) * BYTES);
    const u32 stop = min(top_k - start, 32u);
#pragma unroll 2
    for (u32 k = 0; k < stop; ++k) {
      const u64 there = __shfl_sync(ALL, address, k);
      if (there == 0) continue;
      Word* target = reinterpret_cast<Word*>(there) + begin;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (begin + i * 32 < words) STORE(target + i * 32, word[i]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK) permute_kernel(
    const u8* rows, const int* route_rows, u8* out, const u8* scales, u8* out_scales, i64 num_tokens, i64 pieces,
    i64 magic, i64 shift, i64 top_k, i64 words, i64 stride, i64 scale_words, i64 scale_stride) {
  u32 token, piece;
  if (!find_piece({num_tokens, pieces, magic, shift}, WARPS, token, piece)) return;
  wait_for_previous_launch();
  const int* own = route_rows + static_cast<i64>(token) * top_k;
  send_words<SENT, COUNT>(rows + token * stride, piece * REACH, words, own, top_k, out);
  if constexpr (SCALED > 0) {
    if (piece) return;
#pragma unroll 1
    for (u32 first = 0; first < scale_words; first += 32) {
      send_words<SCALED, 1>(scales + token * scale_stride, first, scale_words, own, top_k, out_scales);
    }
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK) shuffle_kernel(
    const u8* rows, const Index* dst2src_map, u8* out, i64 num_results, i64 pieces, i64 magic, i64 shift, i64 num_rows,
    i64 words_, i64 stride) {
  typedef typename WordOf<SENT>::Type Word;
  const u32 words = words_;
  u32 result, piece;
  if (!find_piece({num_results, pieces, magic, shift}, WARPS, result, piece)) return;
  wait_for_previous_launch();
  const i64 source = __ldg(dst2src_map + result);
  const bool there = 0 <= source && source < num_rows;
  const u32 begin = piece * REACH + (threadIdx.x & 31);
  const u64 from = reinterpret_cast<u64>(rows) + (there ? source : 0) * stride + begin * u64(SENT);
  Word* to = reinterpret_cast<Word*>(out) + static_cast<i64>(result) * words + begin;
  Word word[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    word[i] = Word();
    if (there && begin + i * 32 < words) load_word(word[i], from + i * 32 * SENT);
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (begin + i * 32 < words) STORE(to + i * 32, word[i]);
  }
}
