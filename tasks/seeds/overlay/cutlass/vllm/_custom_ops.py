"""The operators that the layer calls.

`shuffle_rows` and `moe_sum` come from this tree's CUDA sources, through build_ops.py. The grouped product, its tables,
quantisation and the activation come from the library of vLLM's wheel that VLLM_C names (vLLM 0.25.1: `cutlass_moe_mm`
takes int64 offsets there, so they are converted, alike in every tree; `get_cutlass_moe_mm_data` takes `is_gated`).
"""

import os
from pathlib import Path

import torch

torch.ops.load_library(str(Path(__file__).resolve().parents[1] / "build" / "_moe_C.so"))
torch.ops.load_library(os.environ["VLLM_C"])


def scaled_fp8_quant(
    input: torch.Tensor,
    scale: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows: static with a scale, else dynamic per tensor or per row."""
    codes = torch.empty(input.shape, device=input.device, dtype=torch.float8_e4m3fn)
    if scale is not None:
        torch.ops._C.static_scaled_fp8_quant(codes, input, scale)
    elif use_per_token_if_dynamic:
        scale = torch.empty((input.shape[0], 1), device=input.device, dtype=torch.float32)
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, input.contiguous(), scale, None)
    else:
        scale = torch.zeros(1, device=input.device, dtype=torch.float32)
        torch.ops._C.dynamic_scaled_fp8_quant(codes, input, scale)
    return codes, scale


def shuffle_rows(input_tensor: torch.Tensor, dst2src_map: torch.Tensor) -> torch.Tensor:
    """Row dst2src_map[i] of the input as row i."""
    out = torch.empty(
        (dst2src_map.shape[0], input_tensor.shape[1]), device=input_tensor.device, dtype=input_tensor.dtype
    )
    torch.ops._moe_C.shuffle_rows(input_tensor, dst2src_map, out)
    return out


def moe_sum(input: torch.Tensor, output: torch.Tensor) -> None:
    """The sum over the second dimension."""
    torch.ops._moe_C.moe_sum(input, output)


def get_cutlass_moe_mm_data(*arguments: torch.Tensor | int) -> None:
    """Offsets, sizes and permutations of the grouped products."""
    torch.ops._C.get_cutlass_moe_mm_data(*arguments, None, True)


def cutlass_moe_mm(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    expert_offsets: torch.Tensor,
    *others: torch.Tensor | bool,
) -> None:
    """A grouped product."""
    torch.ops._C.cutlass_moe_mm(out, a, b, a_scales, b_scales, expert_offsets.to(torch.int64), *others)
