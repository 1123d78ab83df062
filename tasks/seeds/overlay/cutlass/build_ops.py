"""Compiles this tree's CUDA sources into build/_moe_C.so, for the GPU of this machine or TORCH_CUDA_ARCH_LIST."""

import os
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
SOURCES = (
    "csrc/binding.cpp",
    "csrc/moe/moe_align_sum_kernels.cu",
    "csrc/moe/moe_permute_unpermute_op.cu",
    "csrc/moe/permute_unpermute_kernels/moe_permute_unpermute_kernel.cu",
)

if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
(HERE / "build").mkdir(exist_ok=True)
cpp_extension.load(
    "_moe_C",
    [str(HERE / source) for source in SOURCES],
    extra_include_paths=[str(HERE / "csrc"), str(HERE / "csrc" / "third_party")],
    build_directory=str(HERE / "build"),
    with_cuda=True,
    is_python_module=False,
)
