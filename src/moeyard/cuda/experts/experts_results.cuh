// What becomes of the sums of a tile in experts.cu: scales, bias, activation, and the ways into memory.

#pragma once

#include "experts_nibbles.cuh"

#if VALUE_BYTES == 1

// Asks for the scales of a tile's rows and of its weights, which `Scaling` has when its products have ended.
__device__ __forceinline__ void ask_for_scales(const Room& room, const Arguments& a, const Tile& tile, u32 column) {
  const u32 thread = threadIdx.x & 127, group = threadIdx.x / 128 - 1;
  sync_warpgroup(group);  // the scales of the tile before have been read
  for (u32 row = thread; row < tile.rows; row += 128) {
    const u32 of = GATHERS ? __ldcg(a.sorted_token_ids + tile.first_row + row) / a.divisor : tile.first_row + row;
    copy_4_bytes(shared_address(room.scales + group * BN + row), a.row_scales + of);
  }
  if constexpr (CHANNELS) {
    const float* of_expert = a.weight_scales + static_cast<u64>(tile.expert) * (GATED_RESULT ? 2 : 1) * a.columns;
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      const float* mine = of_expert + min(column + m * COLUMNS_A_PRODUCT, a.columns - (GATED_RESULT ? 1 : 2));
      prefetch_line(mine);
      if constexpr (GATED_RESULT) prefetch_line(mine + a.columns);
    }
  }
}

// The scales of a tile of codes, one per row: those of the two weight rows that a lane has in each product, and where
// those of rows lie. Sums are scaled as they are read: were they written, the compiler would wait for every product.
struct Scaling {
  float2 of_weights[TALL];
  const float* of_rows;  // from the lane's first row on

  __device__ __forceinline__ void prepare(const Room& room, const Arguments& a, const Tile& tile, u32 column) {
    if constexpr (!ROW_SCALES) return;
    const u32 group = threadIdx.x / 128 - 1;
    await_copies();
    sync_warpgroup(group);
    of_rows = room.scales + group * BN + 2 * (threadIdx.x & 3);
    const u32 of_half = CHANNELS ? a.columns : 1;
    const float* of_expert = a.weight_scales + static_cast<u64>(tile.expert) * (GATED_RESULT ? 2 * of_half : of_half);
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      const u32 mine = CHANNELS ? min(column + m * COLUMNS_A_PRODUCT, a.columns - (GATED_RESULT ? 1 : 2)) : 0;
      of_weights[m].x = __ldg(of_expert + mine);
      of_weights[m].y =
          GATED_RESULT || CHANNELS ? __ldg(of_expert + mine + (GATED_RESULT ? of_half : 1)) : of_weights[m].x;
    }
  }
  // Of the lane's two rows in the eight from `start` on.
  __device__ __forceinline__ float2 pair(u32 start) const {
    if constexpr (ROW_SCALES) return *reinterpret_cast<const float2*>(of_rows + start);
    return {1.0f, 1.0f};
  }
  // Of one of the two.
  __device__ __forceinline__ float one(u32 start, u32 odd) const {
    if constexpr (ROW_SCALES) return of_rows[start + odd];
    return 1.0f;
  }
};

// A sum as a float, scaled where sums are of codes.
__device__ __forceinline__ float scaled(Sum sum, float scale) {
  if constexpr (ROW_SCALES) return float_of(sum) * scale;
  return float_of(sum);
}

#elif TILED

// What a tile's sums are multiplied by at their end: the global scales of gate and up, and what scales left.
struct Scaling {
  float2 of_weights[TALL];

  __device__ __forceinline__ void prepare(const Room&, const Arguments& a, const Tile& tile, u32) {
    const u32 first = tile.expert * (1 + GATED_RESULT);
    const float one = GLOBAL ? FOLDED * __ldg(a.weight_scales + first) : FOLDED;
    const float other = GLOBAL && GATED_RESULT ? FOLDED * __ldg(a.weight_scales + first + 1) : one;
#pragma unroll
    for (int m = 0; m < TALL; ++m) of_weights[m] = {one, other};
  }
  __device__ __forceinline__ float2 pair(u32) const { return {1.0f, 1.0f}; }
  __device__ __forceinline__ float one(u32, u32) const { return 1.0f; }
};

__device__ __forceinline__ float scaled(float sum, float scale) { return sum * scale; }

#else

// Sums of 16-bit floats have no scales.
struct Scaling {
  float2 of_weights[TALL];

  __device__ __forceinline__ void prepare(const Room&, const Arguments&, const Tile&, u32) {}
  __device__ __forceinline__ float2 pair(u32) const { return {1.0f, 1.0f}; }
  __device__ __forceinline__ float one(u32, u32) const { return 1.0f; }
};

__device__ __forceinline__ float scaled(float sum, float) { return sum; }

#endif

// What becomes of the sums of a row and of the two weight rows that a lane has in a product: 32 bits of two columns, or
// with a gate a value of one.
__device__ __forceinline__ u32 finish_pair(const Sum* sums, const float2 bias, const Arguments& a, float factor,
                                           float of_row, const float2 of_weights) {
  const float first = scaled(sums[0], of_row * of_weights.x), second = scaled(sums[2], of_row * of_weights.y);
  return narrow_pair<KIND>(bend<Quick, CURVE, CLAMPS>(first + bias.x, a.curve) * factor,
                           bend<Quick, CURVE, CLAMPS>(second + bias.y, a.curve) * factor);
}

// With a gate: of two rows, to be transposed.
__device__ __forceinline__ float finish_gated(const Sum* sums, const float2 bias, const Arguments& a, float of_row,
                                              const float2 of_weights) {
  const float gate = scaled(sums[0], of_row * of_weights.x), up = scaled(sums[2], of_row * of_weights.y);
  return bend<Quick, CURVE, CLAMPS>(gate + bias.x, up + bias.y, a.curve);
}

__device__ __forceinline__ u32 finish_two_gated(const Sum* sums, const float2 bias, const Arguments& a,
                                                const float2 of_rows, const float2 of_weights) {
  return narrow_pair<KIND>(finish_gated(sums, bias, a, of_rows.x, of_weights),
                           finish_gated(sums + 1, bias, a, of_rows.y, of_weights));
}

// Results of all rows of a tile, straight to memory: two columns side by side of each product of a lane.
__device__ __forceinline__ void write_results(const Sum (&sums)[TALL][BN / 2], const float2 (&bias)[TALL],
                                              const Scaling& scaling, const Room& room, const Arguments& a, const Tile& tile, u32 column) {
  const u32 first = 2 * (threadIdx.x & 3), group = threadIdx.x / 128 - 1;
  u16* of_row = a.out + static_cast<i64>(tile.first_row + first) * a.columns + column;
#pragma unroll
  for (int start = 0; start < BN; start += 8, of_row += 8 * a.columns) {
    if (start >= tile.rows) break;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const u32 row = start + first + odd;
      if (row >= tile.rows) continue;
      u16* to = of_row + odd * a.columns;
      float factor = 1.0f;
      if constexpr (KNOWS_ROUTES) {
        const u32 route = room.routes[group * BN + row];
        if constexpr (BY_ROUTE) to = a.out + static_cast<i64>(route) * a.columns + column;
        if constexpr (WEIGHS) factor = __ldg(a.factors + route);
      }
      const int at = start / 2 + odd;
#pragma unroll
      for (int m = 0; m < TALL; ++m) {
        if (column + m * COLUMNS_A_PRODUCT >= a.columns) continue;
        *reinterpret_cast<u32*>(to + m * COLUMNS_A_PRODUCT) =
            finish_pair(sums[m] + at, bias[m], a, factor, scaling.one(start, odd), scaling.of_weights[m]);
      }
    }
  }
}

// The same of transposed weights, of which a lane has columns 8 apart, each of two rows. Lanes of neighbouring columns
// exchange: then the even one has two columns side by side of the first row, and the odd one of the second. `halves` says
// which of both lanes' values stay: 0x5410 the first, 0x3276 the second.
__device__ __forceinline__ u32 exchanged_pair(const Sum* sums, u32 halves) {
  const u32 own = narrow_pair<KIND>(float_of(sums[0]), float_of(sums[1]));
  return __byte_perm(own, __shfl_xor_sync(ALL, own, 4), halves);
}

__device__ __forceinline__ void write_exchanged_results(const Sum (&sums)[TALL][BN / 2], const Room& room,
                                                        const Arguments& a, const Tile& tile, u32 first_column) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, group = threadIdx.x / 128 - 1;
  const u32 odd = lane >> 2 & 1, halves = odd ? 0x3276 : 0x5410;
  const u32 column = first_column + warp * 16 + (lane / 8) * 2, first = 2 * (lane & 3) + odd;
  const u32* routes = room.routes + group * BN + first;
  const int left = static_cast<int>(tile.rows) - static_cast<int>(first);
#pragma unroll
  for (int start = 0; start < BN; start += 8) {
    if (start >= tile.rows) continue;  // lanes that exchange may not leave a loop: they would meet again at its end
    const bool there = start < left;
    const u32 result = BY_ROUTE ? routes[start] : tile.first_row + first + start;  // of no use if not there
    u16* to = a.out + static_cast<i64>(result) * a.columns + column;
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const u32 pair = exchanged_pair(sums[m] + start / 2 + 2 * eight, halves);
        if (there && column + m * COLUMNS_A_PRODUCT < a.columns) {  // columns are a multiple of 64
          *reinterpret_cast<u32*>(to + m * COLUMNS_A_PRODUCT + 8 * eight) = pair;
        }
      }
    }
  }
}

// The column of the first of the two weight rows that a lane has in a product, and how far the other is.
constexpr u32 OTHER_COLUMN = TILED ? 8 : 1;
__device__ __forceinline__ u32 column_of(u32 warp, u32 lane) {
  return warp * COLUMNS_A_WARP + lane / 4 * (GATED_RESULT || TILED ? 1 : 2);
}

// The biases of those: gate and up, or columns side by side.
__device__ __forceinline__ float2 load_bias(const Arguments& a, const Tile& tile, u32 column) {
  float2 bias = {0.0f, 0.0f};
  if constexpr (BIASES) {
    const u16* of_expert = a.bias + static_cast<i64>(tile.expert) * (GATED_RESULT ? 2 * a.columns : a.columns);
    if (column < a.columns) bias.x = widen<KIND>(__ldg(of_expert + column));
    if (column < a.columns) bias.y = widen<KIND>(__ldg(of_expert + column + (GATED_RESULT ? a.columns : OTHER_COLUMN)));
  }
  return bias;
}

__device__ __forceinline__ void load_biases(float2 (&bias)[TALL], const Arguments& a, const Tile& tile, u32 column) {
#pragma unroll
  for (int m = 0; m < TALL; ++m) bias[m] = load_bias(a, tile, column + m * COLUMNS_A_PRODUCT);
}

#if TILED

// Results of weights in tiles without a gate, of which a lane has columns 8 apart: exchanged as those of transposed weights
// are. Where they are rows of the next product they go where `interleave.cu` would put them.
__device__ __forceinline__ void write_tiled_results(const Sum (&sums)[TALL][BN / 2], const float2 (&bias)[TALL],
                                                    const Scaling& scaling, const Room& room, const Arguments& a,
                                                    const Tile& tile, u32 first_column) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, group = threadIdx.x / 128 - 1;
  const u32 odd = lane >> 2 & 1, halves = odd ? 0x3276 : 0x5410, tile_column = first_column + warp * 16;
  const u32 first = 2 * (lane & 3);
  const int left = static_cast<int>(tile.rows) - static_cast<int>(first + odd);
  u16* of_row = a.out + static_cast<i64>(tile.first_row + first + odd) * a.columns + tile_column;
#pragma unroll
  for (int start = 0; start < BN; start += 8, of_row += 8 * a.columns) {
    if (start >= tile.rows) continue;  // lanes that exchange may not leave a loop: they would meet again at its end
    float2 factors = {1.0f, 1.0f};
    if constexpr (WEIGHS) {
      const u32* routes = room.routes + group * BN + start + first;
      if (start + first < tile.rows) factors.x = __ldg(a.factors + routes[0]);
      if (start + first + 1 < tile.rows) factors.y = __ldg(a.factors + routes[1]);
    }
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      const float scale = scaling.of_weights[m].x;
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const Sum* own = sums[m] + start / 2 + 2 * eight;
        const float of_column = eight ? bias[m].y : bias[m].x;
        const u32 pair = narrow_pair<KIND>(
            bend<Quick, CURVE, CLAMPS>(scaled(own[0], scale) + of_column, a.curve) * factors.x,
            bend<Quick, CURVE, CLAMPS>(scaled(own[1], scale) + of_column, a.curve) * factors.y);
        const u32 both = __byte_perm(pair, __shfl_xor_sync(ALL, pair, 4), halves), number = lane / 8 + 4 * eight;
        const u32 at = INTERLEAVES ? (number & 1) * 8 + (number & ~1u) : number * 2;
        if (start < left && tile_column + m * COLUMNS_A_PRODUCT < a.columns) {  // columns are a multiple of 64
          *reinterpret_cast<u32*>(of_row + m * COLUMNS_A_PRODUCT + at) = both;
        }
      }
    }
  }
}

#endif

// A piece of 16 bytes of a row of results, as it goes to memory: of interleaved ones every other pair of 32 bytes.
__device__ __forceinline__ uint4 piece_of(u32 row, u32 piece) {
#if TILED
  if constexpr (INTERLEAVES) {
    const uint4 first = load_shared(row + (piece & ~1u) * 16), second = load_shared(row + (piece | 1) * 16);
    if (piece & 1) return {first.y, first.w, second.y, second.w};
    return {first.x, first.z, second.x, second.z};
  }
#endif
  return load_shared(row + piece * 16);
}

// Results of a tile with a gate, CHUNK rows at a time through shared memory.
__device__ __forceinline__ void write_gated_results(const Sum (&sums)[TALL][BN / 2], const float2 (&bias)[TALL],
                                                    const Scaling& scaling, const Room& room, const Arguments& a, const Tile& tile,
                                                    u32 first_column, u32& turn) {
  constexpr u32 PIECES = COLUMNS_A_GROUP / 8;
  const u32 thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5, group = threadIdx.x / 128 - 1;
  const u32 in_chunk = (lane & 7) * PITCH + warp * COLUMNS_A_WARP * 2, piece = thread % PIECES;
  const u32 column = first_column + piece * 8;
#pragma unroll
  for (int start = 0; start < BN; start += CHUNK) {
    if (start >= tile.rows) break;
    const u32 chunk = room.chunks + (2 * group + (turn & 1)) * CHUNK_BYTES;  // the other may still be read
    ++turn;
#pragma unroll
    for (int i = 0; i < CHUNK; i += 8) {
      const float2 of_rows = scaling.pair(start + i);
#pragma unroll
      for (int m = 0; m < TALL; ++m) {
        const u32 to = chunk + in_chunk + i * PITCH + m * COLUMNS_A_PRODUCT * 2;
        const Sum* of_eight = sums[m] + (start + i) / 2;
        store_transposed(to, finish_two_gated(of_eight, bias[m], a, of_rows, scaling.of_weights[m]));
      }
    }
    sync_warpgroup(group);
    for (u32 row = thread / PIECES; row < min(u32(CHUNK), tile.rows - start); row += 128 / PIECES) {
      if (column < a.columns) {
        *reinterpret_cast<uint4*>(a.out + static_cast<i64>(tile.first_row + start + row) * a.columns + column) =
            piece_of(chunk + row * PITCH, piece);
      }
    }
  }
}

// Results of a tile with a gate through the stage that is lent for them, transposed to rows with columns side by side;
// the copy engine takes them from there. Returns the stage's `empty` barrier, which wants to hear when that is done.
__device__ __forceinline__ u32 send_gated_results(const Sum (&sums)[TALL][BN / 2], const float2 (&bias)[TALL],
                                                  const Scaling& scaling, const Room& room, const Arguments& a, const Tile& tile,
                                                  u32 first_column, Stage& stage) {
  const u32 thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5, group = threadIdx.x / 128 - 1;
  const u32 held = room.empty + 8 * stage.number;
  const u32 there = room.stages + stage.number * STAGE_BYTES + group * BN * PITCH;
  const u32 column = warp * COLUMNS_A_WARP + (lane >> 4) * COLUMNS_A_PRODUCT;
  const u32 to = there + (lane & 15) * PITCH + column * 2;  // of the lane's row in 16 rows of both products
  await_phase(room.full + 8 * stage.number, stage.parity);
  stage.advance();
#pragma unroll
  for (int start = 0; start < BN; start += 16) {
    if (start >= tile.rows) break;
    const Sum *first = sums[0] + start / 2, *second = sums[1] + start / 2;
    const float2 of_rows = scaling.pair(start), of_next = scaling.pair(start + 8);
    const float2 *of = scaling.of_weights;
    const uint4 values = {
        finish_two_gated(first, bias[0], a, of_rows, of[0]), finish_two_gated(first + 4, bias[0], a, of_next, of[0]),
        finish_two_gated(second, bias[1], a, of_rows, of[1]), finish_two_gated(second + 4, bias[1], a, of_next, of[1])};
    store_transposed(to + start * PITCH, values);
  }
  show_shared_writes();
  sync_warpgroup(group);
  if (first_column < a.columns) {
    u16* out = a.out + static_cast<i64>(tile.first_row) * a.columns + first_column;
    const u32 bytes = min(u32(COLUMNS_A_GROUP), a.columns - first_column) * 2;
    for (u32 row = thread; row < tile.rows; row += 128) {
      copy_out(out + static_cast<i64>(row) * a.columns, there + row * PITCH, bytes);
    }
  }
  commit_copies_out();
  return held;
}

#if VALUE_BYTES == 1

// Results of a tile with a gate as codes, CHUNK rows at a time: rounded to 16 bits, gathered in shared memory by both
// warpgroups, and quantised by 16 threads per row.
__device__ __forceinline__ void write_codes(const Sum (&sums)[TALL][BN / 2], const float2 (&bias)[TALL],
                                            const Scaling& scaling, const Room& room, const Arguments& a,
                                            const Tile& tile, u32& turn) {
  constexpr u32 COLUMNS = 128, BETWEEN = COLUMNS * 2 + 16, PIECES = COLUMNS / 8;
  static_assert(!AS_CODES || (CHUNK * BETWEEN <= CONSUMERS * CHUNK_BYTES && CHUNK * PIECES == 256), "a piece a thread");
  const u32 thread = threadIdx.x - 128, lane = thread & 31, warp = thread >> 5 & 3, group = thread >> 7;
  const u32 in_chunk = (lane & 7) * BETWEEN + (group * COLUMNS_A_GROUP + warp * COLUMNS_A_WARP) * 2;
  const u32 piece = thread % PIECES, own = thread / PIECES, column = tile.weight_tile * COLUMNS + piece * 8;
#pragma unroll
  for (int start = 0; start < BN; start += CHUNK) {
    if (start >= tile.rows) break;
    const u32 chunk = room.chunks + (turn & 1) * CHUNK * BETWEEN;  // the other may still be read
    ++turn;
#pragma unroll
    for (int i = 0; i < CHUNK; i += 8) {
#pragma unroll
      for (int m = 0; m < TALL; ++m) {
        const Sum* of_eight = sums[m] + (start + i) / 2;
        store_transposed(chunk + in_chunk + i * BETWEEN + m * COLUMNS_A_PRODUCT * 2,
                         finish_two_gated(of_eight, bias[m], a, scaling.pair(start + i), scaling.of_weights[m]));
      }
    }
    sync_multipliers();
    const uint4 word = load_shared(chunk + own * BETWEEN + piece * 16);
    const u32 pairs[4] = {word.x, word.y, word.z, word.w};
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = larger_pair(largest, pairs[i] & 0x7fff7fff);
    largest = max(largest & 0xffff, largest >> 16);
#pragma unroll
    for (u32 step = 1; step < PIECES; step *= 2) largest = max(largest, __shfl_xor_sync(0xffffffff, largest, step));
    const float scale = scale_of_magnitude<E4M3>(widen<KIND>(largest)), inverse = __frcp_rn(scale);
    u32 codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = to_e4m3(quotient(widen<KIND>(pairs[i] & 0xffff), scale, inverse),
                         quotient(widen<KIND>(pairs[i] >> 16), scale, inverse));
    }
    if (start + own < tile.rows && column < a.columns) {
      const u64 row = tile.first_row + start + own;
      const uint2 both = {codes[0] | codes[1] << 16, codes[2] | codes[3] << 16};
      *reinterpret_cast<uint2*>(reinterpret_cast<u8*>(a.out) + row * a.columns + column) = both;
      if (piece == 0) a.result_scales[row * ((a.columns + COLUMNS - 1) / COLUMNS) + tile.weight_tile] = scale;
    }
  }
}

#endif

// What a warpgroup has to know of a tile whose results go to routes, or are weighted by them.
__device__ __forceinline__ void look_up_routes(const Room& room, const Arguments& a, const Tile& tile) {
  const u32 thread = threadIdx.x & 127, group = threadIdx.x / 128 - 1;
  sync_warpgroup(group);  // the routes of the tile before have been read
  for (u32 row = thread; row < tile.rows; row += 128) {
    room.routes[group * BN + row] = __ldcg(a.sorted_token_ids + tile.first_row + row);
  }
  sync_warpgroup(group);
}
