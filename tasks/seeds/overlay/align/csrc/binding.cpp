// Registers the operator under the name and the schema that vLLM's wrapper calls.
#include <torch/all.h>
#include <torch/library.h>

void moe_align_block_size(torch::Tensor topk_ids, int64_t num_experts, int64_t block_size,
                          torch::Tensor sorted_token_ids, torch::Tensor experts_ids,
                          torch::Tensor num_tokens_post_pad);

TORCH_LIBRARY(_moe_C, library) {
  library.def(
      "moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, "
      "Tensor! experts_ids, Tensor! num_tokens_post_pad) -> ()");
  library.impl("moe_align_block_size", torch::kCUDA, &moe_align_block_size);
}
