// Which tile of a grouped product a block works on: a table of the experts that have rows, made by every block.

#pragma once

#include "device.cuh"

// A tile of the product: `rows` rows from `first_row` on, times a tile of the expert's weight rows. No rows: the end.
struct alignas(16) Tile {
  u32 expert, weight_tile, first_row, rows;
};

// How many bits of a table's entry are the expert's number. Above them is the number of its first tile: tiles of BN
// rows, numbered through over all experts that have rows.
__device__ __forceinline__ u32 expert_bits(u32 experts) { return 32 - __clz(experts - 1 | 1); }

// Fills the table and one entry behind it, whose first tile is the number of row tiles; returns that number. All
// threads call it; `sums` is 64 words that are zero. It begins with a barrier of the block and ends with one.
template <int BN>
__device__ __forceinline__ u32 make_table(u32* table, u32* sums, const int* row_counts, u32 experts) {
  const u32 bits = expert_bits(experts);
  u32 segments = 0, tiles = 0;
  for (u32 start = 0; start < experts; start += blockDim.x) {
    const u32 expert = start + threadIdx.x;
    const int rows = expert < experts ? max(__ldcg(row_counts + expert), 0) : 0;
    const u32 of_expert = (rows + BN - 1) / BN;
    u32 more_segments, more_tiles;
    __syncthreads();  // the sums of the round before have been read
    const u32 segment = segments + scan_block(rows > 0, sums, more_segments);
    const u32 first_tile = tiles + scan_block(of_expert, sums + 32, more_tiles);
    if (rows > 0) table[segment] = first_tile << bits | expert;
    segments += more_segments;
    tiles += more_tiles;
  }
  if (threadIdx.x == 0) table[segments] = tiles << bits;
  __syncthreads();
  return tiles;
}

// Tiles in the order of experts. An expert's rows are shared out evenly among as few tiles as hold them, in multiples
// of FINE: a tile of few rows would take as long as its weights do, which are those of all.
//
// Tiles of an expert come in groups of at most GROUP row tiles: inside a group all row tiles take the same tile of
// weights before the next, so that what runs at a time reads about as many rows as weights and finds most of both in
// the L2 cache. Whoever asks does so for ascending numbers below that of all tiles.
template <int FINE, int GROUP>
struct Tiles {
  const u32* place;
  u32 weight_tiles, bits;
  const i64* first_rows;
  const int* row_counts;
  u32 rows, first_row;  // of the expert at `place`; no rows: not read yet

  __device__ __forceinline__ Tile find(u32 number) {
    for (; (place[1] >> bits) * weight_tiles <= number; ++place) rows = 0;
    const u32 expert = place[0] & (1u << bits) - 1, first_tile = place[0] >> bits;
    if (rows == 0) {
      rows = __ldcg(row_counts + expert);
      first_row = __ldcg(first_rows + expert);
    }
    const u32 row_tiles = (place[1] >> bits) - first_tile;
    const u32 share = ((rows + row_tiles - 1) / row_tiles + FINE - 1) / FINE * FINE;
    const u32 inside = number - first_tile * weight_tiles, group = inside / (GROUP * weight_tiles);
    const u32 in_group = inside - group * GROUP * weight_tiles, size = min(u32(GROUP), row_tiles - group * GROUP);
    const u32 weight_tile = in_group / size, row = (group * GROUP + in_group - weight_tile * size) * share;
    return {expert, weight_tile, first_row + row, min(share, rows - row)};
  }
};

// Who works on which tile: a block begins with the one of its own number and then takes the next that nobody has.
// Multiprocessors differ by up to a third in what memory gives them, and tiles differ in rows. `counts` are two words
// of zeros, left so: tiles taken beyond the first ones, blocks that found none left. They are used once the launch
// before has ended, so launches of a stream share them.
struct Turns {
  u32* counts;

  __device__ __forceinline__ u32 next() { return gridDim.x + atomicAdd(counts, 1); }
  // Once for a block, after its last turn; what `next` gave it has decided that, so who comes last follows all turns.
  __device__ __forceinline__ void leave() {
    if (atomicAdd(counts + 1, 1) + 1 < gridDim.x) return;
    counts[0] = 0;
    counts[1] = 0;
  }
};
