"""Compiles this tree's CUDA source into build/seed_ops.so."""

from compiled import library

library("seed_ops", ("csrc/binding.cpp", "csrc/moe/moe_align_sum_kernels.cu"))
