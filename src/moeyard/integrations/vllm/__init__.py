"""vLLM 0.33's MoE operators by their own names, argument orders, output lengths and return tuples.

As a library: import the functions from here instead of from vLLM. Modules have the places that they have below
`vllm.model_executor.layers.fused_moe`, so a path may be replaced as a whole: `moeyard.integrations.vllm.router.
fused_topk_router`, `.config`, `.activation`, `.utils`; `vllm._custom_ops` is `moeyard.integrations.vllm._custom_ops`.
As a launcher,

    python -m moeyard.integrations.vllm SCRIPT [ARGUMENT ...]

runs an unchanged script whose vLLM imports find these operators. Where vLLM is installed its operators are replaced, as
by the plugin (`plugin.py`). Where it is not, the import paths of the operators exist, and nothing else of vLLM does.

Deviations from vLLM are in what it leaves undefined, and in what docs/notes/vllm.md lists: orders are stable; ids that
are out of range are dropped everywhere; the unused end of `expert_ids` stays -1 when a map is applied afterwards, where
vLLM sends it through `expert_map[-1]`; flat ids are accepted in the form that says so (`moe_align_block_size`); routers
rank by logits. Quantised experts follow vLLM 0.26: rows with a dynamic scale have one each, and the router's weight
counts once.
"""

from moeyard.integrations.vllm._custom_ops import (
    moe_sum,
    shuffle_rows,
    topk_hash_softplus_sqrt,
    topk_sigmoid,
    topk_softmax,
)
from moeyard.integrations.vllm.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    activation_without_mul,
    apply_moe_activation,
    apply_moe_activation_supported,
)
from moeyard.integrations.vllm.batched_experts import batched_experts
from moeyard.integrations.vllm.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEQuantConfig,
    biased_moe_quant_config,
    fp8_w8a8_moe_quant_config,
    fp8_w8a16_moe_quant_config,
    int8_w8a8_moe_quant_config,
    int8_w8a16_moe_quant_config,
)
from moeyard.integrations.vllm.cutlass_moe import cutlass_moe_fp8, run_cutlass_moe_fp8
from moeyard.integrations.vllm.expert_map_manager import determine_expert_map
from moeyard.integrations.vllm.experts.triton_moe import TritonExperts
from moeyard.integrations.vllm.fused_moe import (
    fused_experts,
    invoke_fused_moe_triton_kernel,
    try_get_optimal_moe_config,
)
from moeyard.integrations.vllm.moe_align_block_size import batched_moe_align_block_size, moe_align_block_size
from moeyard.integrations.vllm.moe_fused_mul_sum import moe_fused_mul_sum
from moeyard.integrations.vllm.moe_permute_unpermute import (
    MoEPermuteScratch,
    moe_permute,
    moe_permute_unpermute_supported,
    moe_unpermute,
)
from moeyard.integrations.vllm.router.fused_topk_bias_router import fused_topk_bias
from moeyard.integrations.vllm.router.fused_topk_router import fused_topk
from moeyard.integrations.vllm.router.grouped_topk_router import fused_grouped_topk, grouped_topk
from moeyard.integrations.vllm.utils import count_expert_num_tokens

__all__ = [
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    "ApplyMoEActivationConfig",
    "FusedMoEQuantConfig",
    "MoEActivation",
    "MoEPermuteScratch",
    "TritonExperts",
    "activation_without_mul",
    "apply_moe_activation",
    "apply_moe_activation_supported",
    "batched_experts",
    "batched_moe_align_block_size",
    "biased_moe_quant_config",
    "count_expert_num_tokens",
    "cutlass_moe_fp8",
    "determine_expert_map",
    "fp8_w8a8_moe_quant_config",
    "fp8_w8a16_moe_quant_config",
    "fused_experts",
    "fused_grouped_topk",
    "fused_topk",
    "fused_topk_bias",
    "grouped_topk",
    "int8_w8a8_moe_quant_config",
    "int8_w8a16_moe_quant_config",
    "invoke_fused_moe_triton_kernel",
    "moe_align_block_size",
    "moe_fused_mul_sum",
    "moe_permute",
    "moe_permute_unpermute_supported",
    "moe_sum",
    "moe_unpermute",
    "run_cutlass_moe_fp8",
    "shuffle_rows",
    "topk_hash_softplus_sqrt",
    "topk_sigmoid",
    "topk_softmax",
    "try_get_optimal_moe_config",
]
