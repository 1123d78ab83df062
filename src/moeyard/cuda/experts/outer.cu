// Sums of outer products, the gradients of expert weights: out[e] = the sum over the rows r of expert e of
// grads[r / divisor] x rows[r / row_divisor]: sm_90a alone. Columns of grads are the M side of the tensor cores' products
// and columns of rows their N side; the rows of an expert are what is summed over.
//
// A block is a warpgroup that loads and two that multiply, 128 columns of grads each. It works through tiles (BM columns
// of grads x BN columns of rows of one expert). Both operands come by cp.async from wherever their rows lie, 64 rows a
// stage: blocks of 64 columns, 128 bytes of each row, in the 128-byte swizzle. The tensor cores take both transposed. A
// tile sums over all rows of its expert, in their order; an expert without rows has zeros.

#define OUTER true
#include "wgmma.cuh"

constexpr int BN = COLUMNS_A_TILE, CONSUMERS = 2, TALL = 2, DEPTH = STAGES, KIND = ROW_KIND;
constexpr bool WIDE = WIDE_RESULTS;  // float32, otherwise of the kind of rows
constexpr int BM = 64 * TALL * CONSUMERS, BK = 64, THREADS = 128 * (1 + CONSUMERS);
constexpr int BLOCK_BYTES = 64 * BK * 2;  // of 64 columns
constexpr int GRAD_BYTES = BM / 64 * BLOCK_BYTES, STAGE_BYTES = GRAD_BYTES + BN / 64 * BLOCK_BYTES;
constexpr int GROUP = 12;  // tiles of grads that run side by side
constexpr int LOADERS_REGISTERS = 56, MULTIPLIERS_REGISTERS = (3 * 168 - LOADERS_REGISTERS) / 2;

struct Arguments {
  const u8 *grads, *rows;
  const int* slots;  // null: slots are entries
  const i64* first_rows;
  const int* row_counts;
  u8* out;
  u32 columns, size, divisor, row_divisor;
  i64 grad_pitch, row_pitch;  // in bytes
};

struct Stage {
  u32 number, parity;

  __device__ __forceinline__ void advance() {
    if (++number == DEPTH) {
      number = 0;
      parity ^= 1;
    }
  }
};

// Addresses in shared memory: stages, then barriers of what has come and of what has been read.
struct Room {
  u32 stages, full, empty;
};

struct Tile {
  u32 expert, column, other, rows;  // its first columns
};

__device__ __forceinline__ Tile tile_of(const Arguments& a, u32 number) {
  const u32 down = (a.columns + BM - 1) / BM, across = (a.size + BN - 1) / BN, all = down * across;
  const u32 expert = number / all, inside = number % all, group = inside / (GROUP * across);
  const u32 in_group = inside % (GROUP * across), height = min(u32(GROUP), down - group * GROUP);
  const u32 column = (group * GROUP + in_group % height) * BM, other = in_group / height * BN;
  return {expert, column, other, static_cast<u32>(max(__ldg(a.row_counts + expert), 0))};
}

// The entries of four rows of a stage, 16 apart; 0 past the last row.
__device__ __forceinline__ void find_entries(u32 (&entries)[4], const Arguments& a, const Tile& tile, i64 first, u32 row) {
#pragma unroll
  for (int i = 0; i < 4; ++i, row += 16) {
    entries[i] = 0;
    if (row < tile.rows) entries[i] = a.slots ? static_cast<u32>(__ldg(a.slots + first + row)) : first + row;
  }
}

// COUNT blocks of 64 columns of one row, a piece of 16 bytes each; zeros where there is no row or column.
template <int COUNT>
__device__ __forceinline__ void load_blocks(u32 to, const u8* from, bool there, u32 column, u32 columns) {
#pragma unroll
  for (int block = 0; block < COUNT; ++block, column += 64, to += BLOCK_BYTES) {
    const bool inside = there && column < columns;
    copy_16_bytes(to, from + (inside ? column * 2 : 0), inside ? 16 : 0);
  }
}

// Thread t brings piece t % 8 of rows t / 8, t / 8 + 16, ... of every block.
__device__ __forceinline__ void load(const Room& room, const Arguments& a, u32 total) {
  const u32 piece = threadIdx.x & 7, own = threadIdx.x >> 3;
  const u32 to = own * 128 + ((piece ^ (own & 7)) << 4);
  Stage stage = {0, 0};
  for (u32 number = blockIdx.x; number < total; number += gridDim.x) {
    const Tile tile = tile_of(a, number);
    const i64 first = __ldg(a.first_rows + tile.expert);
    u32 entries[4];
    find_entries(entries, a, tile, first, own);
    for (u32 begin = 0; begin < tile.rows; begin += BK) {
      u32 following[4];
      find_entries(following, a, tile, first, begin + BK + own);  // on their way while this stage is loaded
      await_phase(room.empty + 8 * stage.number, stage.parity ^ 1);
      const u32 here = room.stages + stage.number * STAGE_BYTES + to;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = begin + own + 16 * i < tile.rows;
        const u8* grad = a.grads + static_cast<i64>(entries[i] / a.divisor) * a.grad_pitch;
        const u8* row = a.rows + static_cast<i64>(entries[i] / a.row_divisor) * a.row_pitch;
        load_blocks<BM / 64>(here + i * 16 * 128, grad, there, tile.column + piece * 8, a.columns);
        load_blocks<BN / 64>(here + GRAD_BYTES + i * 16 * 128, row, there, tile.other + piece * 8, a.size);
        entries[i] = following[i];
      }
      arrive_after_copies(room.full + 8 * stage.number);
      stage.advance();
    }
  }
  await_copies();  // a thread outlives its copies
}

// Two values side by side of a row of the result.
__device__ __forceinline__ void write_pair(const Arguments& a, u64 at, const float* sums) {
  if constexpr (WIDE) *reinterpret_cast<float2*>(a.out + 4 * at) = {sums[0], sums[1]};
  else *reinterpret_cast<u32*>(a.out + 2 * at) = narrow_pair<KIND>(sums[0], sums[1]);
}

__device__ __forceinline__ void write_sums(const float (&sums)[TALL][BN / 2], const Arguments& a, const Tile& tile, u32 group) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  const u32 column = tile.column + group * 64 * TALL + warp * 16 + lane / 4, other = tile.other + 2 * (lane & 3);
#pragma unroll
  for (int m = 0; m < TALL; ++m) {
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      const u32 row = column + m * 64 + 8 * eight;
      if (row >= a.columns) continue;
      const u64 first = (static_cast<u64>(tile.expert) * a.columns + row) * a.size + other;
#pragma unroll
      for (int i = 0; i < BN / 8; ++i) {
        if (other + 8 * i < a.size) write_pair(a, first + 8 * i, sums[m] + 4 * i + 2 * eight);
      }
    }
  }
}

__device__ __forceinline__ void multiply_and_write(const Room& room, const Arguments& a, u32 total) {
  const u32 group = threadIdx.x / 128 - 1;
  const bool releases = (threadIdx.x & 31) == 0;
  Stage stage = {0, 0};
  for (u32 number = blockIdx.x; number < total; number += gridDim.x) {
    const Tile tile = tile_of(a, number);
    float sums[TALL][BN / 2] = {};
    u32 before = 0;
    for (u32 begin = 0; begin < tile.rows; begin += BK) {
      await_phase(room.full + 8 * stage.number, stage.parity);
      show_shared_writes();
      const u32 here = room.stages + stage.number * STAGE_BYTES;
      const u64 grads = blocks_descriptor(here + group * TALL * BLOCK_BYTES), rows = blocks_descriptor(here + GRAD_BYTES);
      begin_products();
#pragma unroll
      for (int i = 0; i < BK / 16; ++i) {
#pragma unroll
        for (int m = 0; m < TALL; ++m) {
          multiply<BN>(sums[m], grads + (m * BLOCK_BYTES >> 4) + (16 * 128 >> 4) * i, rows + (16 * 128 >> 4) * i,
                       begin | i);
        }
      }
      commit_products();
      await_products<1>();  // those of the stage before have ended
      if (begin > 0 && releases) arrive(room.empty + 8 * before);
      before = stage.number;
      stage.advance();
    }
    await_products<0>();
    if (tile.rows > 0 && releases) arrive(room.empty + 8 * before);
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) settle(sums[m][i]);
    }
    write_sums(sums, a, tile, group);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) outer_kernel(
    const u8* grads, const u8* rows, const int* slots, const i64* first_rows, const int* row_counts, u8* out, i64 experts,
    i64 columns, i64 size, i64 grad_pitch, i64 row_pitch, i64 divisor, i64 row_divisor) {
  extern __shared__ __align__(1024) u8 memory[];
  if (shared_address(memory) % 1024) __trap();  // stages begin where the swizzle does
  const u32 stages = shared_address(memory), barriers = stages + DEPTH * STAGE_BYTES;
  const Room room = {stages, barriers, barriers + 8 * DEPTH};
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < DEPTH; ++i) {
      open_barrier(room.full + 8 * i, 128);
      open_barrier(room.empty + 8 * i, 4 * CONSUMERS);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_previous_launch();
  const Arguments a = {grads, rows, slots, first_rows, row_counts, out, static_cast<u32>(columns), static_cast<u32>(size),
                       static_cast<u32>(divisor), static_cast<u32>(row_divisor), grad_pitch, row_pitch};
  const u32 tiles = ((a.columns + BM - 1) / BM) * ((a.size + BN - 1) / BN), total = static_cast<u32>(experts) * tiles;
  if (threadIdx.x < 128) {
    keep_registers<LOADERS_REGISTERS>();
    load(room, a, total);
  } else {
    take_registers<MULTIPLIERS_REGISTERS>();
    multiply_and_write(room, a, total);
  }
}
