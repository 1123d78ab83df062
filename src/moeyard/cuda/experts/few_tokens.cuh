// What the two kernels of few_tokens.cu share: sizes, the routes of a batch, products and activations.

#pragma once

#include "activation.cuh"
#include "bulk.cuh"
#include "codes.cuh"

// One model, one plan and one batch size a compilation, or (TOKENS_GIVEN) one for all up to NUM_TOKENS: all that is known
// before comes as macros.
typedef ID Id;                                            // int or i64
constexpr bool MAPPED = MAP;                              // whether there is an expert_map
constexpr int KIND_OF_ROWS = ROW_KIND;                    // BFLOAT16 or FLOAT16
constexpr u32 TOKENS = NUM_TOKENS, TOP_K = NUM_TOP_K, ROUTES = TOKENS * TOP_K;
constexpr int WEIGHTS = WEIGHT_CODE, X_CODE = ACTIVATION_CODE;  // NO_CODE: 16-bit floats
constexpr bool QUANTISED = QUANTISED_WEIGHTS;
constexpr u32 HIDDEN = HIDDEN_SIZE, HIDDEN_WORDS = HIDDEN / 8;      // words: eight values
constexpr u32 SIZE = INTERMEDIATE_SIZE, SIZE_WORDS = SIZE / 8;
constexpr bool GATED = GATED_ROWS, INPUT_IS_WEIGHTED = WEIGHT_ON_INPUT;
constexpr bool UP_BIASED = W13_BIAS, DOWN_BIASED = W2_BIAS, CLAMPED = HAS_LIMIT;
constexpr int WHICH = ACTIVATION;  // of the curves of activation.cuh
constexpr u32 WARPS = WARPS_A_BLOCK, THREADS = 32 * WARPS;
constexpr u32 WORD_BYTES = QUANTISED ? 8 : 16;  // of weights
#if TOKENS_GIVEN
#define TOKEN_PARAMETER , i64 num_tokens
#define TOKENS_HERE static_cast<u32>(num_tokens)
#else
#define TOKEN_PARAMETER
#define TOKENS_HERE TOKENS
#endif
static_assert(0 < ROUTES && ROUTES <= 32, "a lane a route");
static_assert(HIDDEN * WORD_BYTES % 128 == 0 && SIZE * WORD_BYTES % 128 == 0, "rows are whole 16 bytes");
static_assert(QUANTISED == (WEIGHTS != NO_CODE) && (X_CODE == NO_CODE || X_CODE == WEIGHTS), "both have one code");

// Rows of WORDS words are cut in segments of SEGMENT, of which the last may be shorter.
template <u32 WORDS, u32 SEGMENT>
constexpr u32 segments_of = (WORDS + SEGMENT - 1) / SEGMENT;

template <u32 WORDS, u32 SEGMENT>
__device__ __forceinline__ u32 words_of(u32 segment) {
  return WORDS % SEGMENT == 0 ? SEGMENT : min(SEGMENT, WORDS - segment * SEGMENT);
}

// The routes that have an expert here, in the order of routes; others take no work at all.
struct Routes {
  u32 expert[32];
  u32 route[32];
  float factor[32];
  u32 starts[34];  // of each token; behind the last one that of all
};

// A lane a route of so many tokens, by one warp. Loads go to the L2 cache: a kernel that has not waited yet may ask for what only the
// launch before the one before it wrote.
__device__ __forceinline__ void find_routes(Routes& found, const void* ids, const int* expert_map,
                                            const float* topk_weights, i64 num_experts, i64 num_local, u32 tokens) {
  const u32 lane = threadIdx.x & 31;
  u32 expert = ALL;
  float factor = 0.0f;
  if (lane < tokens * TOP_K) {
    const i64 id = __ldcg(static_cast<const Id*>(ids) + lane);
    factor = __ldcg(topk_weights + lane);
    if (0 <= id && id < num_experts) expert = MAPPED ? __ldcg(expert_map + id) : static_cast<int>(id);
  }
  const bool held = expert < static_cast<u32>(num_local);
  const u32 mask = __ballot_sync(ALL, held), place = __popc(mask & lanes_below());
  if (held) {
    found.expert[place] = expert;
    found.route[place] = lane;
    found.factor[place] = factor;
  }
  if (lane < tokens) found.starts[lane] = __popc(mask & ((1u << lane * TOP_K) - 1));
  if (lane == 0) found.starts[tokens] = __popc(mask);
}

// The first of `total` units that belong to block `block`: every block has as many, or one more.
__device__ __forceinline__ u32 first_unit(u32 total, u32 block) {
  return static_cast<u64>(total) * block / gridDim.x;
}

__device__ __forceinline__ void widen_word(const uint4& word, float (&values)[8]) {
  Piece<16> piece;
  piece.word = word;
  widen_piece<KIND_OF_ROWS, 16>(piece, values);
}

// Two sums, so that neighbouring products do not wait for each other.
__device__ __forceinline__ void add_products(const uint4& word, const float (&x)[8], float (&sums)[2]) {
  float w[8];
  widen_word(word, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i & 1] = __fmaf_rn(w[i], x[i], sums[i & 1]);
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}

__device__ __forceinline__ float widen_one(const u16* from, u64 index) {
  return widen<KIND_OF_ROWS>(static_cast<u32>(__ldg(from + index)));
}

__device__ __forceinline__ u16 narrow_one(float value) {
  return static_cast<u16>(narrow_pair<KIND_OF_ROWS>(value, 0.0f));
}

__device__ __forceinline__ float activate(float gate, float up, const Curve& curve) {
  if constexpr (GATED) return bend<Accurate, WHICH, CLAMPED>(gate, up, curve);
  return bend<Accurate, WHICH, CLAMPED>(gate, curve);
}
