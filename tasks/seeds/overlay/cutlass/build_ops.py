"""Compiles this tree's CUDA sources into build/_moe_C.so."""

from compiled import library

library(
    "_moe_C",
    (
        "csrc/binding.cpp",
        "csrc/moe/moe_align_sum_kernels.cu",
        "csrc/moe/moe_permute_unpermute_op.cu",
        "csrc/moe/permute_unpermute_kernels/moe_permute_unpermute_kernel.cu",
    ),
)
