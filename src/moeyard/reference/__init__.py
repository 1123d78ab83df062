"""The specification: every operator in plain PyTorch on the CPU, with wide accumulation and no cleverness.

Each function has the name and the arguments of the public operator and returns what it must return; slots and rows that
the operator leaves unwritten are zero here. Tests compare every implementation with these functions. They are never
chosen except by name. Launchers beside them let them stand in the table of implementations.
"""

from moeyard.reference.experts import activate, fused_experts, grouped_gemm
from moeyard.reference.layout import (
    batched_moe_align_block_size,
    local_experts,
    moe_align_block_size,
    moe_lora_align_block_size,
)
from moeyard.reference.router import route
from moeyard.reference.rows import combine, moe_sum, permute, permute_to_fp8, shuffle_rows

__all__ = [
    "activate",
    "batched_moe_align_block_size",
    "combine",
    "fused_experts",
    "grouped_gemm",
    "local_experts",
    "moe_align_block_size",
    "moe_lora_align_block_size",
    "moe_sum",
    "permute",
    "permute_to_fp8",
    "route",
    "shuffle_rows",
]
