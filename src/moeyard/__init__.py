"""The Mixture-of-Experts layer as a stand-alone library.

Importing it imports torch and nothing else; implementations are loaded at their first call.
"""

from moeyard.activation import activate
from moeyard.checkpoints import experts_from_interleaved, load_experts, save_experts
from moeyard.combine import combine, moe_sum
from moeyard.dispatch.table import explain
from moeyard.experts import fused_experts
from moeyard.grouped_gemm import grouped_gemm
from moeyard.helptexts import add_to as _add_helptexts_to
from moeyard.layer import moe_layer
from moeyard.layout import (
    batched_moe_align_block_size,
    empty_layout,
    moe_align_block_size,
    moe_lora_align_block_size,
)
from moeyard.losses import load_balancing_loss, router_z_loss, update_selection_bias
from moeyard.pack import pack_experts, unpack_experts
from moeyard.permute import permute, permute_to_fp8, shuffle_rows
from moeyard.quant import ExpertScales, QuantScheme
from moeyard.quantize import dequantize_experts, quantize_experts
from moeyard.router import route, route_and_align
from moeyard.straight_through import straight_through_experts
from moeyard.values import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Layout, Permuted, Routing
from moeyard.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "GPT_OSS_ACTIVATION",
    "Activation",
    "ExpertScales",
    "ExpertWeights",
    "Layout",
    "Permuted",
    "QuantScheme",
    "Routing",
    "activate",
    "batched_moe_align_block_size",
    "combine",
    "dequantize_experts",
    "empty_layout",
    "experts_from_interleaved",
    "explain",
    "fused_experts",
    "grouped_gemm",
    "load_balancing_loss",
    "load_experts",
    "moe_align_block_size",
    "moe_layer",
    "moe_lora_align_block_size",
    "moe_sum",
    "pack_experts",
    "permute",
    "permute_to_fp8",
    "quantize_experts",
    "route",
    "route_and_align",
    "router_z_loss",
    "save_experts",
    "shuffle_rows",
    "straight_through_experts",
    "unpack_experts",
    "update_selection_bias",
    "warmup",
]

_add_helptexts_to(globals(), __all__)
