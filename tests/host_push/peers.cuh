// On a host: memory of ranks that write to each other. Stores arrive late, in any order; a release brings all that its
// block stored before, and then its flag.

#pragma once

#include "rows.cuh"

u64* shared_words();
void store_there(uint4* to, uint4 word);
void store_there(u32* to, u32 word);
void release_there(u32* flag, u32 epoch);
u32 acquire_here(const u32* flag);
u32 arrive_last(u32* count);
u64 nanoseconds();
void give_up(u64* trouble, u64 what);

inline uint4 load_arrived(u64 from) { return *reinterpret_cast<const uint4*>(from); }
inline void load_word(uint4& word, u64 from) { word = *reinterpret_cast<const uint4*>(from); }
inline u32 atomicOr(u32* to, u32 bits) {
  const u32 before = *to;
  *to |= bits;
  return before;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

template <int KIND, int BYTES>
constexpr int values_of = 8;

template <int KIND, int BYTES>
void narrow_piece(const float (&values)[8], Piece<BYTES>& piece) {
  for (int i = 0; i < 4; ++i) piece.words[i] = narrow_pair<KIND>(values[2 * i], values[2 * i + 1]);
}
