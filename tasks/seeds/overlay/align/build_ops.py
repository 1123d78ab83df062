"""Compiles this tree's CUDA source into build/seed_ops.so, for the GPU of this machine or TORCH_CUDA_ARCH_LIST."""

import os
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
SOURCES = ("csrc/binding.cpp", "csrc/moe/moe_align_sum_kernels.cu")

if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
(HERE / "build").mkdir(exist_ok=True)
cpp_extension.load(
    "seed_ops",
    [str(HERE / source) for source in SOURCES],
    build_directory=str(HERE / "build"),
    with_cuda=True,
    is_python_module=False,
)
