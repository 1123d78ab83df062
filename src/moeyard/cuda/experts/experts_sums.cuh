// The warpgroups of experts.cu that multiply: all products of a tile, whose sums stay in registers.

#pragma once

#include "experts_stages.cuh"

// What one thread of a warp tells others while it multiplies.
struct Signals {
  bool releases;  // stages that the warp has read
  u32 lead;       // the step after which the other warpgroup may begin, or one that never comes
  u32 held;       // the `empty` barrier of the stage from which results are still being copied, or 0
};

// The stage from which this warp had results copied is free.
__device__ __forceinline__ void give_back(const Signals& signals) {
  await_copies_out();
  __syncwarp();
  if (signals.releases) arrive(signals.held);
}

// From 16 values of a tile of weights to the next 16, in a descriptor's units of 16 bytes.
constexpr int ALONG = TURNS_WEIGHTS ? 16 * 128 >> 4 : 2;

// All products of a tile for N of its rows.
template <int N>
__device__ __forceinline__ void multiply_tile(Sum (&sums)[TALL][BN / 2], const Room& room, Stage& stage, u32 steps,
                                              u32 group, const Signals& signals) {
  u32 before = 0;
  for (u32 step = 0; step < steps; ++step) {
    await_phase(room.full + 8 * stage.number, stage.parity);
    if constexpr (GATHERS) show_shared_writes();
    const u32 here = room.stages + stage.number * STAGE_BYTES;
    const u64 weights = tile_descriptor(here + group * 64 * TALL * BK * ITEM);
    const u64 rows = tile_descriptor(here + WEIGHT_BYTES);
    begin_products();
#pragma unroll
    for (int i = 0; i < BK * ITEM / 32; ++i) {
#pragma unroll
      for (int m = 0; m < TALL; ++m) {
        multiply<N>(sums[m], weights + m * (64 * BK * ITEM >> 4) + ALONG * i, rows + 2 * i, step | i);
      }
    }
    commit_products();
    if (STAGGERS && step == signals.lead) arrive(room.lead);
    if (IN_STAGE && step == 0 && signals.held) give_back(signals);
    await_products<1>();  // those of the step before have ended
    if (step > 0 && signals.releases) arrive(room.empty + 8 * before);
    before = stage.number;
    stage.advance();
  }
  await_products<0>();
  if (signals.releases) arrive(room.empty + 8 * before);
#pragma unroll
  for (int m = 0; m < TALL; ++m) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) settle(sums[m][i]);
  }
}

template <int N = BN>
__device__ __forceinline__ void multiply_used(Sum (&sums)[TALL][BN / 2], const Room& room, Stage& stage, u32 steps,
                                              u32 group, const Signals& signals, u32 rows) {
  if constexpr (N > FINE) {
    if (rows <= N - FINE) return multiply_used<N - FINE>(sums, room, stage, steps, group, signals, rows);
  }
  multiply_tile<N>(sums, room, stage, steps, group, signals);
}

#if VALUE_BYTES == 1

// The same of codes in blocks of 128 x 128 and rows in groups of 128: a step's products have sums of their own, which
// are multiplied by the scales of both and added. While one warpgroup adds, the tensor cores work for the other.
template <int N>
__device__ __forceinline__ void multiply_blocks(Sum (&sums)[TALL][BN / 2], const Room& room, Stage& stage, u32 steps,
                                                u32 group, const Signals& signals) {
#pragma unroll
  for (int m = 0; m < TALL; ++m) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[m][i] = 0;
  }
  const u32 mine = 8 * (threadIdx.x & 3) + (GATED_RESULT ? 0 : 4 * BN * group);  // of a lane's two rows in eight
  for (u32 step = 0; step < steps; ++step) {
    await_phase(room.full + 8 * stage.number, stage.parity);
    if constexpr (GATHERS) show_shared_writes();
    const u32 here = room.stages + stage.number * STAGE_BYTES;
    const u32 scales = room.stage_scales + stage.number * SCALE_BYTES + mine;
    float2 halves = {1.0f, 1.0f};
    if constexpr (GATED_RESULT) halves = load_shared_pair(room.stage_scales + stage.number * SCALE_BYTES + 4 * BN);
    const u64 weights = tile_descriptor(here + group * 64 * TALL * BK * ITEM);
    const u64 rows = tile_descriptor(here + WEIGHT_BYTES);
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      Sum batch[N / 2];
      begin_products();
#pragma unroll
      for (int i = 0; i < BK * ITEM / 32; ++i) {
        multiply<N>(batch, weights + m * (64 * BK * ITEM >> 4) + 2 * i, rows + 2 * i, i);
      }
      commit_products();
      if (STAGGERS && m == 0 && step == signals.lead) arrive(room.lead);
      await_products<0>();
#pragma unroll
      for (int i = 0; i < N / 2; ++i) settle(batch[i]);
#pragma unroll
      for (int i = 0; i < N / 8; ++i) {
        const float2 of_rows = load_shared_pair(scales + 32 * i);
        float2 of_gate = of_rows, of_up = of_rows;
        if constexpr (GATED_RESULT) {
          of_gate = {of_rows.x * halves.x, of_rows.y * halves.x};
          of_up = {of_rows.x * halves.y, of_rows.y * halves.y};
        }
        sums[m][4 * i] = fmaf(of_gate.x, batch[4 * i], sums[m][4 * i]);
        sums[m][4 * i + 1] = fmaf(of_gate.y, batch[4 * i + 1], sums[m][4 * i + 1]);
        sums[m][4 * i + 2] = fmaf(of_up.x, batch[4 * i + 2], sums[m][4 * i + 2]);
        sums[m][4 * i + 3] = fmaf(of_up.y, batch[4 * i + 3], sums[m][4 * i + 3]);
      }
    }
    __syncwarp();  // all lanes have read the scales
    if (signals.releases) arrive(room.empty + 8 * stage.number);
    stage.advance();
  }
}

template <int N = BN>
__device__ __forceinline__ void multiply_used_blocks(Sum (&sums)[TALL][BN / 2], const Room& room, Stage& stage,
                                                     u32 steps, u32 group, const Signals& signals, u32 rows) {
  if constexpr (N > FINE) {
    if (rows <= N - FINE) return multiply_used_blocks<N - FINE>(sums, room, stage, steps, group, signals, rows);
  }
  multiply_blocks<N>(sums, room, stage, steps, group, signals);
}

#endif
