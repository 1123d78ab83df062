// Router and alignment of small batches in one launch: logits -> a Routing and a whole Layout.
//
// Every block needs the ids of all tokens, in its shared memory. Of few tokens each block routes all (redundantly: that
// takes no longer than one), and one more block has only the weights to write; of more, each block of the one cluster
// routes a part and posts its ids to the others. Then the blocks align as those of align.cu do.

#pragma nv_diag_suppress 177, 186  // names and comparisons that only some kernels need

#include "align_blocks.cuh"
#include "align_tiny.cuh"
#include "route_warp.cuh"

constexpr u32 PEERS = BLOCKS_THAT_SHARE;  // 1: every block routes all tokens

extern "C" __global__ void __launch_bounds__(THREADS) route_align_kernel(
    const u8* logits, const float* bias, const u8* is_padding, float* topk_weights, int* topk_ids,
    const int* expert_map, int* sorted_token_ids, int* expert_ids, int* num_tokens_post_padded, i64* expert_offsets,
    int* expert_counts, int* route_rows, i64 num_tokens, i64 top_k, i64 top_k_groups, i64 renormalize, i64 factor,
    i64 stride, i64 num_routes, i64 num_experts, i64 num_local, i64 block_size, i64 capacity, i64 block_magic,
    i64 block_shift, i64 aligning_bytes) {
  extern __shared__ uint4 shared_words[];
  u64* mailbox = reinterpret_cast<u64*>(reinterpret_cast<u8*>(shared_words) + aligning_bytes);
  int* ids = reinterpret_cast<int*>(mailbox + 2);  // [num_routes]
  const router::Router p = {logits, bias, is_padding, topk_weights, topk_ids, num_tokens, top_k, top_k_groups,
                            renormalize, factor, stride};
  const Parameters layout = {ids, expert_map, sorted_token_ids, expert_ids, num_tokens_post_padded, expert_offsets,
                             expert_counts, route_rows, nullptr, nullptr, num_routes, num_experts, num_local,
                             block_size, capacity, block_magic, block_shift, 1};
  const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, rank = PEERS > 1 ? cluster_rank() : 0;
  if constexpr (PEERS > 1) {
    if (warp == 0) open_mailbox(mailbox, num_routes);
    greet_peers();
  }
  wait_for_previous_launch();
  const u32 token = rank + warp * PEERS;  // blocks have a warp a token at least
  const bool routes = token < num_tokens;
  router::Chosen chosen = {};
  if (routes) chosen = router::choose(p, token);
  if constexpr (PEERS > 1) {
    await_peers();
    if (routes && lane < top_k) {
#pragma unroll
      for (u32 r = 0; r < PEERS; ++r) {
        post(mailbox, reinterpret_cast<u32*>(ids) + token * top_k + lane, r, static_cast<u32>(chosen.mine));
      }
    }
    await_mail(mailbox);
  } else {
    if (blockIdx.x == gridDim.x - 1) {
      if (routes) router::finish(p, token, chosen);
      return;
    }
    if (routes && lane < top_k) ids[token * top_k + lane] = chosen.mine;
    __syncthreads();
  }
  if constexpr (HOW == TINY) align_tiny(layout);
  else align(layout);
  if (PEERS > 1 && routes) router::finish(p, token, chosen);
}
