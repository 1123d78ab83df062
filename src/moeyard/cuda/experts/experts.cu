// Rows of every expert times the expert's weights, with bias and activation: sm_90a alone. The weights' rows are the M
// side of the tensor cores' products and the rows are their N side, which may be as small as 8: so one kernel serves
// batches of any size.
//
// A block is a warpgroup that loads and one or two that multiply, 64 or 128 weight rows each. It works through tiles
// (BM weight rows x BN rows, experts_tiles.cuh) as a persistent grid does; stages of 64 values of all rows of a tile go
// round through shared memory, tile after tile without a break: `full` barriers say what has come, `empty` ones what
// has been read. Which tile comes next is known to the warpgroup that loads, and goes through shared memory with the
// tile's first stage. A tile with fewer rows than BN multiplies only as many as it has, in steps of FINE.
//
// The second warpgroup that multiplies begins some steps after the first and stays behind it, as far as stages reach:
// so one has products under way while the other writes results.
//
// Weights come by the copy engine. Where there is a gate, its box takes 8 rows of the gate half and the 8 rows of the
// up half that belong to them, in turn: a lane then holds a gate and its up in one fragment, and the activation needs
// no exchange; results are transposed in shared memory, which for the largest tiles is the stage behind a tile's last
// step. Without a gate a box takes 8 even and 8 odd rows: a lane then holds two columns side by side, and 8 lanes a
// sector of a row of results, which goes straight to memory. Transposed weights (TURNED, of backward passes) come as 64
// values of 64 columns, whose columns are side by side; lanes exchange results instead. Weights of 4 bits (TILED) come as
// tiles (`pack.py`), and registers hold what they are worth (experts_nibbles.cuh). Rows come by the copy engine too, or
// (GATHER) by cp.async from wherever the tokens lie.
//
// Programmatic launch: TABLE_READY says that the layout was there before the launch ahead began. Then only reading
// rows waits for that launch, and the first stages' weights are on their way before.

#include "experts_loads.cuh"
#include "experts_results.cuh"

__device__ __forceinline__ void multiply_and_write(const Room& room, const Arguments& a, u32 total) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, group = threadIdx.x / 128 - 1;
  Stage stage = {0, 0};
  u32 turn = 0;
  Sum sums[TALL][BN / 2] = {};
  Signals signals = {lane == 0, STAGGERS && group == 0 && lane == 0 ? min(LEAD, a.steps - 1) : ALL, 0};
  if (STAGGERS && group == 1 && blockIdx.x < total) await_phase(room.lead, 0);
  while (true) {
    await_phase(room.full + 8 * stage.number, stage.parity);
    const Tile tile = room.tiles[stage.number];
    if (tile.rows == 0) break;
    const u32 first_column = (tile.weight_tile * CONSUMERS + group) * COLUMNS_A_GROUP;
    float2 bias[TALL];
    if constexpr (SUMS <= FEW_SUMS) load_biases(bias, a, tile, first_column + column_of(warp, lane));
    if constexpr (KNOWS_ROUTES) look_up_routes(room, a, tile);
#if VALUE_BYTES == 1
    if constexpr (ROW_SCALES) ask_for_scales(room, a, tile, first_column + column_of(warp, lane));
    if constexpr (BLOCK_SCALES) multiply_used_blocks(sums, room, stage, a.steps, group, signals, tile.rows);
    else
#endif
#if TILED
      multiply_used_codes(sums, room, stage, a.steps, group, signals, tile.rows);
#else
      multiply_used(sums, room, stage, a.steps, group, signals, tile.rows);
#endif
    Scaling scaling;
    scaling.prepare(room, a, tile, first_column + column_of(warp, lane));
    if constexpr (SUMS > FEW_SUMS) load_biases(bias, a, tile, first_column + column_of(warp, lane));  // sums need registers
    signals.lead = ALL;
#if VALUE_BYTES == 1
    if constexpr (AS_CODES) write_codes(sums, bias, scaling, room, a, tile, turn);
    else
#endif
#if TILED
    if constexpr (!GATED_RESULT) write_tiled_results(sums, bias, scaling, room, a, tile, first_column);
    else
#endif
    if constexpr (TURNS_WEIGHTS) write_exchanged_results(sums, room, a, tile, first_column);
    else if constexpr (IN_STAGE) signals.held = send_gated_results(sums, bias, scaling, room, a, tile, first_column, stage);
    else if constexpr (IN_CHUNKS) write_gated_results(sums, bias, scaling, room, a, tile, first_column, turn);
    else write_results(sums, bias, scaling, room, a, tile, first_column + column_of(warp, lane));
  }
  if (IN_STAGE && signals.held) give_back(signals);
}

#if VALUE_BYTES == 1  // codes have scales
#define SCALE_PARAMETERS const float *weight_scales, const float *row_scales, float *result_scales,
#define SCALE_ARGUMENTS weight_scales, row_scales, result_scales
#elif TILED  // and codes in tiles maps of scales and zero points, too
#define SCALE_PARAMETERS const float* global_scales,
#define SCALE_ARGUMENTS global_scales, nullptr, nullptr
#define SCALE_MAPS const __grid_constant__ TensorMap scale_map, const __grid_constant__ TensorMap zero_map,
#define WEIGHT_MAPS weight_map, scale_map, zero_map
#else
#define SCALE_PARAMETERS
#define SCALE_ARGUMENTS nullptr, nullptr, nullptr
#endif
#if !TILED
#define SCALE_MAPS
#define WEIGHT_MAPS weight_map
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_A_PROCESSOR) experts_kernel(
    const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap row_map, SCALE_MAPS const u8* rows,
    const u16* bias, const float* factors, const int* sorted_token_ids, const i64* first_rows, const int* row_counts,
    u16* out, u32* turns, SCALE_PARAMETERS i64 experts, i64 columns, i64 size, i64 row_pitch, i64 divisor, i64 alpha, i64 beta,
    i64 limit) {
  extern __shared__ __align__(1024) u8 memory[];
  const Room room = divide(memory);
  const Weights weights = {WEIGHT_MAPS};
  constexpr u32 OF_TILE = GATED_RESULT ? BM / 2 : BM;
  const u32 weight_tiles = (columns + OF_TILE - 1) / OF_TILE;
  if (threadIdx.x == 0) {
    prefetch_map(weight_map);
    if (!GATHERS) prefetch_map(row_map);
    for (u32 i = 0; i < DEPTH; ++i) {
      open_barrier(room.full + 8 * i, 1 + 128 * (GATHERS + BLOCK_SCALES));
      open_barrier(room.empty + 8 * i, 4 * CONSUMERS);
    }
    open_barrier(room.lead, 4);
    publish_barriers();
  }
  if (threadIdx.x < 64) room.sums[threadIdx.x] = 0;
  if (!READY_BEFORE) wait_for_previous_launch();
  const u32 total = make_table<BN>(room.table, room.sums, row_counts, experts) * weight_tiles;
  const Arguments a = {rows, bias, factors, sorted_token_ids, out, turns, SCALE_ARGUMENTS, static_cast<u32>(columns),
                       static_cast<u32>((size + BK - 1) / BK), static_cast<u32>(size), static_cast<u32>(divisor),
                       row_pitch,
                       {__int_as_float(alpha), __int_as_float(beta), __int_as_float(limit)}};
  const Work tiles = {room.table, weight_tiles, expert_bits(experts), first_rows, row_counts, 0, 0};
  if (threadIdx.x < 128) {
    if constexpr (MOVES_REGISTERS) keep_registers<LOADERS_REGISTERS>();
    if constexpr (MANY_LOAD) load_by_many(weights, row_map, room, a, tiles, total);
    else if (threadIdx.x == 0) load_by_boxes(weights, row_map, room, a, tiles, total);
  } else {
    if constexpr (MOVES_REGISTERS) take_registers<MULTIPLIERS_REGISTERS>();
    multiply_and_write(room, a, total);
  }
}
