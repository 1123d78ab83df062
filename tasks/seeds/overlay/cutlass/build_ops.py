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

_NAMES = ("HALF_OPERATORS", "HALF2_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")
CONVERSIONS = [f"-U__CUDA_NO_{name}__" for name in _NAMES]
"""torch's builder takes conversions of 16-bit types away, and vLLM's build gives them back; CUTLASS needs them."""

if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
(HERE / "build").mkdir(exist_ok=True)
cpp_extension.load(
    "_moe_C",
    [str(HERE / source) for source in SOURCES],
    extra_cuda_cflags=CONVERSIONS,
    extra_include_paths=[str(HERE / "csrc"), str(HERE / "csrc" / "third_party")],
    build_directory=str(HERE / "build"),
    with_cuda=True,
    is_python_module=False,
)
