// Defines the operators of vLLM's _moe_C that the sources of this tree implement.
#include <torch/all.h>
#include <torch/library.h>

void shuffle_rows(const torch::Tensor& input_tensor, const torch::Tensor& dst2src_map, torch::Tensor& output_tensor);
void moe_sum(torch::Tensor& input, torch::Tensor& output);

TORCH_LIBRARY(_moe_C, library) {
  library.def(
      "moe_permute(Tensor input, Tensor topk_weight, Tensor! topk_ids, Tensor token_expert_indices, "
      "Tensor? expert_map, int n_expert, int n_local_expert, int topk, int? align_block_size, "
      "Tensor! permuted_input, Tensor! expert_first_token_offset, Tensor! src_row_id2dst_row_id_map, "
      "Tensor! m_indices) -> ()");
  library.def(
      "moe_unpermute(Tensor permuted_hidden_states, Tensor topk_weights, Tensor topk_ids, "
      "Tensor src_row_id2dst_row_id_map, Tensor expert_first_token_offset, int n_expert, int n_local_expert, "
      "int topk, Tensor! hidden_states) -> ()");
  library.def("shuffle_rows(Tensor input_tensor, Tensor dst2src_map, Tensor! output_tensor) -> ()");
  library.impl("shuffle_rows", torch::kCUDA, &shuffle_rows);
  library.def("moe_sum(Tensor input, Tensor! output) -> ()");
  library.impl("moe_sum", torch::kCUDA, &moe_sum);
}
