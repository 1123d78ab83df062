// The warpgroups of experts.cu that multiply, beside weights of 4 bits in tiles: codes become 16-bit floats in registers,
// from where the tensor cores take them. Warp w of a warpgroup has rows 16 w to 16 w + 15 of a product of 64, which is one
// tile; a lane's 16 bytes of it are its values of four products of 16 values each.
//
// A lane's values of a product are those of four columns side by side, 4 t to 4 t + 3. The tensor cores take them for
// columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. So rows come *interleaved*: in each 16 columns first the even pairs, then
// the odd ones (interleave.cu; results of a first product are written so).

#pragma once

#include "experts_sums.cuh"

#if TILED

// What is left of the scales of weights for the end. Codes of e2m1 times 2^-126 (bfloat16) or 2^-14 (float16) meet
// scales of e8m0 times 2^126, or of e4m3 times 2^118 or 2^6, which hold them; where sums are scaled, bfloat16 meet 2^126.
constexpr float FOLDED = !E2M1 || (KIND == BFLOAT16 && (!SCALES_WEIGHTS || KIND_OF_SCALES == E8M0_SCALES)) ? 1.0f
                         : SCALES_WEIGHTS                                                                  ? 256.0f
                                                                                                           : 16384.0f;
constexpr u32 OWN = PARTS * LINE, PRODUCTS = 4 / PARTS;  // bytes of scales of a tile, products of a group in a step
// Products of 16 values that end together: as many as registers hold the values of twice, beside sums.
constexpr int BATCH = SUMS + 16 * TALL <= (BLOCKS_A_PROCESSOR == 2 ? 48 : 120) ? 2 : 1;

// Where a lane finds its share of its warp's first tile in a stage; the next one is four tiles further.
struct Share {
  u32 codes, scales, zeros;
};

__device__ __forceinline__ Share share_of(u32 group) {
  const u32 lane = threadIdx.x & 31, tile = group * TALL * 4 + (threadIdx.x >> 5 & 3);
  return {kept(tile * TILE_BYTES + lane * 16), SCALES_AT + tile * OWN + lane / 4 * 2 * SCALE_SIZE,
          ZEROS_AT + tile * PARTS * 16 + lane / 4 * 2};
}

// Scales of a lane's two rows as pairs of 16-bit floats that have both halves alike.
struct Factors {
  u32 row, lower;
};

__device__ __forceinline__ u32 twice_bfloat(float value) { return __byte_perm(__float_as_uint(value), 0, 0x3232); }

// From two bytes: of e8m0 times 2^126, and 2^-128 where that is more than bfloat16 holds; of e4m3 times 2^118 or 2^6.
__device__ __forceinline__ Factors factors_of(u32 bytes) {
  if constexpr (KIND_OF_SCALES == E8M0_SCALES) {
    const u32 small = bytes & 0x7f7f;
    return {__byte_perm(small, 0, 0x4040) * 128 + 0x3f003f00, __byte_perm(small, 0, 0x4141) * 128 + 0x3f003f00};
  } else {
    u32 pair, none;
    halves_of_e4m3(bytes, pair, none);
    if constexpr (KIND == FLOAT16) {
      pair = multiply_pairs<FLOAT16>(pair, 0x54005400);
      return {__byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232)};
    }
    const float power = __uint_as_float((118 + 127) << 23);
    return {twice_bfloat(widen<FLOAT16>(pair & 0xffff) * power), twice_bfloat(widen<FLOAT16>(pair >> 16) * power)};
  }
}

// What those of e8m0 miss, to be multiplied twice: 2^64 for bytes of 128 and more, NaN for 255.
__device__ __forceinline__ u32 rest_of(u32 byte) { return byte == 255 ? 0x7fc07fc0 : byte > 127 ? 0x5f805f80 : 0x3f803f80; }
__device__ __forceinline__ Factors rests_of(u32 bytes) { return {rest_of(bytes & 0xff), rest_of(bytes >> 8)}; }

// A lane's values of product s of a tile.
__device__ __forceinline__ void widen_tile(u32 (&values)[4], u32 s, const uint4& codes, u32 zero, u32 lower_zero,
                                           const Masks& masks) {
  values[0] = widen_pair<E2M1, KIND>(s, codes.x, zero, masks);
  values[1] = widen_pair<E2M1, KIND>(s, codes.z, lower_zero, masks);
  values[2] = widen_pair<E2M1, KIND>(s, codes.y, zero, masks);
  values[3] = widen_pair<E2M1, KIND>(s, codes.w, lower_zero, masks);
}

__device__ __forceinline__ void scale_values(u32 (&values)[4], const Factors& by) {
  values[0] = multiply_pairs<KIND>(values[0], by.row);
  values[1] = multiply_pairs<KIND>(values[1], by.lower);
  values[2] = multiply_pairs<KIND>(values[2], by.row);
  values[3] = multiply_pairs<KIND>(values[3], by.lower);
}

// A batch of products for as many rows as a tile has, in steps of FINE. N varies here and not around the loops that make
// values: the compiler would keep registers for each of them, and then wait for every product (C7512).
template <int N = BN>
__device__ __forceinline__ void multiply_batch(Sum (&sums)[TALL][BN / 2], const u32 (&values)[BATCH][TALL][4], u64 rows,
                                               u32 adds, u32 used) {
  if constexpr (N > FINE) {
    if (used <= N - FINE) return multiply_batch<N - FINE>(sums, values, rows, adds, used);
  }
  begin_products();
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
#pragma unroll
    for (int m = 0; m < TALL; ++m) multiply_held<N>(sums[m], values[i][m], rows + 2 * i, adds | i);
  }
  commit_products();
}

// All products of a tile, of weights that are scaled: while the products of a batch run, the values of the next are made.
__device__ __forceinline__ void multiply_scaled_weights(Sum (&sums)[TALL][BN / 2], const Room& room, Stage& stage,
                                                        u32 steps, u32 group, const Signals& signals, u32 rows_) {
  const Share share = share_of(group);
  const u32 used = __reduce_max_sync(ALL, rows_);  // which the compiler then knows to be one for all lanes
  const Masks masks = {};
  u32 before = 0;
  u32 values[2][BATCH][TALL][4];
  for (u32 step = 0; step < steps; ++step) {
    await_phase(room.full + 8 * stage.number, stage.parity);
    const u32 here = room.stages + stage.number * STAGE_BYTES;
    const u64 rows = tile_descriptor(here + WEIGHT_BYTES);
    uint4 codes[TALL];
    u32 bytes[TALL][PARTS];
    u32 all = 0;
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      codes[m] = load_shared(here + share.codes + m * 4 * TILE_BYTES);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        bytes[m][part] = load_shared_half(here + share.scales + m * 4 * OWN + part * LINE);
        all |= bytes[m][part];
      }
    }
    const bool large = KIND_OF_SCALES == E8M0_SCALES && __any_sync(ALL, all & 0x8080);
    Factors factors[TALL];
#pragma unroll
    for (int batch = 0; batch < 4 / BATCH; ++batch) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int s = batch * BATCH + i, part = s / PRODUCTS;
#pragma unroll
        for (int m = 0; m < TALL; ++m) {
          u32(&own)[4] = values[batch & 1][i][m];
          widen_tile(own, s, codes[m], 0, 0, masks);
          if (s % PRODUCTS == 0) factors[m] = factors_of(bytes[m][part]);
          scale_values(own, factors[m]);
        }
      }
      if (large) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
#pragma unroll
          for (int m = 0; m < TALL; ++m) {
            const Factors rests = rests_of(bytes[m][(batch * BATCH + i) / PRODUCTS]);
            scale_values(values[batch & 1][i][m], rests);
            scale_values(values[batch & 1][i][m], rests);
          }
        }
      }
      multiply_batch(sums, values[batch & 1], rows + 2 * batch * BATCH, step | batch, used);
      if (STAGGERS && batch == 0 && step == signals.lead) arrive(room.lead);
      await_products<1>();  // those of the batch before have ended, which were the last of the step before
      if (batch == 0 && step > 0 && signals.releases) arrive(room.empty + 8 * before);
    }
    before = stage.number;
    stage.advance();
  }
  await_products<0>();
  if (signals.releases) arrive(room.empty + 8 * before);
#pragma unroll
  for (int m = 0; m < TALL; ++m) {
#pragma unroll
    for (int i = 0; i < BN / 2; ++i) settle(sums[m][i]);
  }
}

// The scales of a lane's two rows.
__device__ __forceinline__ float2 load_scales(u32 address) {
  if constexpr (SCALE_SIZE == 4) return load_shared_pair(address);
  if constexpr (SCALE_SIZE == 2) {
    const u32 both = load_shared_word(address);
    return {widen<KIND_OF_SCALES>(both & 0xffff), widen<KIND_OF_SCALES>(both >> 16)};
  }
  const u32 bytes = load_shared_half(address);
  if constexpr (KIND_OF_SCALES == E8M0_SCALES) return {power_of_byte(bytes << 23), power_of_byte(bytes << 15)};
  u32 pair, none;
  halves_of_e4m3(bytes, pair, none);
  return {widen<FLOAT16>(pair & 0xffff), widen<FLOAT16>(pair >> 16)};
}

// The products of a group, which are scaled and added to the others.
template <int N = BN>
__device__ __forceinline__ void add_group(Sum (&sums)[BN / 2], const u32 (&values)[PRODUCTS][4], u64 rows,
                                          const float2& scales, u32 used) {
  if constexpr (N > FINE) {
    if (used <= N - FINE) return add_group<N - FINE>(sums, values, rows, scales, used);
  }
  Sum own[N / 2];
  begin_products();
#pragma unroll
  for (int i = 0; i < PRODUCTS; ++i) multiply_held<N>(own, values[i], rows + 2 * i, i);
  commit_products();
  await_products<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) settle(own[i]);
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    sums[4 * i] = fmaf(scales.x, own[4 * i], sums[4 * i]);
    sums[4 * i + 1] = fmaf(scales.x, own[4 * i + 1], sums[4 * i + 1]);
    sums[4 * i + 2] = fmaf(scales.y, own[4 * i + 2], sums[4 * i + 2]);
    sums[4 * i + 3] = fmaf(scales.y, own[4 * i + 3], sums[4 * i + 3]);
  }
}

// The same of weights that are not: the products of a group have sums of their own, which are scaled and added to the
// others. While one warpgroup makes values or adds, the tensor cores work for another.
__device__ __forceinline__ void multiply_scaled_sums(Sum (&sums)[TALL][BN / 2], const Room& room, Stage& stage,
                                                     u32 steps, u32 group, const Signals& signals, u32 rows_) {
  const Share share = share_of(group);
  const u32 used = __reduce_max_sync(ALL, rows_);
  const Masks masks = {unknown(0x000f000f), unknown(0x00f000f0)};
#pragma unroll
  for (int m = 0; m < TALL; ++m) {
#pragma unroll
    for (int i = 0; i < BN / 2; ++i) sums[m][i] = 0;
  }
  for (u32 step = 0; step < steps; ++step) {
    await_phase(room.full + 8 * stage.number, stage.parity);
    const u32 here = room.stages + stage.number * STAGE_BYTES;
    const u64 rows = tile_descriptor(here + WEIGHT_BYTES);
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      const uint4 codes = load_shared(here + share.codes + m * 4 * TILE_BYTES);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const u32 zeros = ZEROS ? load_shared_half(here + share.zeros + (m * 4 * PARTS + part) * 16) : 0x0808;
        u32 values[PRODUCTS][4];
#pragma unroll
        for (int i = 0; i < PRODUCTS; ++i) {
          widen_tile(values[i], part * PRODUCTS + i, codes, zeros & 0xff, zeros >> 8, masks);
          if (E2M1 && KIND == BFLOAT16) scale_values(values[i], {0x7e807e80, 0x7e807e80});
        }
        add_group(sums[m], values, rows + 2 * part * PRODUCTS,
                  load_scales(here + share.scales + m * 4 * OWN + part * LINE), used);
        if (STAGGERS && m == 0 && part == 0 && step == signals.lead) arrive(room.lead);
      }
    }
    if (signals.releases) arrive(room.empty + 8 * stage.number);
    stage.advance();
  }
}

__device__ __forceinline__ void multiply_used_codes(Sum (&sums)[TALL][BN / 2], const Room& room, Stage& stage,
                                                    u32 steps, u32 group, const Signals& signals, u32 rows) {
  if constexpr (SCALES_WEIGHTS) multiply_scaled_weights(sums, room, stage, steps, group, signals, rows);
  else multiply_scaled_sums(sums, room, stage, steps, group, signals, rows);
}

#endif
