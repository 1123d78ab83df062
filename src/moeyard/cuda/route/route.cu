// Routers: logits -> the top_k experts of every token and their weights, in one launch.
//
// A warp has a token: every lane a few consecutive experts, all of one group, so that lower lanes have lower experts.
// A word holds what is above of an expert's key (its logit, or its score and bias) and, below, the expert from the end,
// so no two words are the same. Lanes sort theirs; every round takes the largest, by one reduction of the warp, from
// the lane that has it first. Words hold all of a 16-bit logit. Where they do not hold all of float32 keys, and some of
// the best have the same bits above, the warp takes all that have, and ranks what it took by whole keys.
//
// More experts than a warp holds, or more groups: route_block.cu.

#include "route_warp.cuh"

extern "C" __global__ void __launch_bounds__(128) route_kernel(
    const u8* logits, const float* bias, const u8* is_padding, float* topk_weights, int* topk_ids, i64 num_tokens,
    i64 top_k, i64 top_k_groups, i64 renormalize, i64 factor, i64 stride) {
  const router::Router p = {logits, bias, is_padding, topk_weights, topk_ids, num_tokens, top_k, top_k_groups,
                            renormalize, factor, stride};
  const u32 token = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (token >= num_tokens) return;
  wait_for_previous_launch();
  router::finish(p, token, router::choose(p, token));
}
