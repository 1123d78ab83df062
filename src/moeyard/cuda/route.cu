// Routers: logits -> the top_k experts of every token and their weights, in one launch.
//
// A warp has a token: every lane a few consecutive experts, all of one group, so that lower lanes have lower experts.
// Every round takes the largest key left, by one reduction of the warp, from the lane that has it. Keys of 16-bit
// logits are words that no two experts share: the logit and, below it, the expert from the end; lanes sort theirs and
// give away the first. Keys of float32 (logits, or scores with their bias) fill a word, and the place of each is sorted
// with it: of several lanes with the largest key the lowest gives it away.

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
