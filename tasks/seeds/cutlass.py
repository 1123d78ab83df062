"""vLLM's CUTLASS layer of fp8 experts, as its own benchmark drives it: granite-3.0-3b's experts, several batch sizes.

Weights are made here from a fixed seed, alike in every process, since they are too large to be sent with every call.
"""

import inspect
from typing import NamedTuple

import torch
from vllm.model_executor.layers.fused_moe.cutlass_moe import cutlass_moe_fp8

EXPERTS, HIDDEN, INTERMEDIATE = 40, 1536, 512
_LARGEST = 448.0
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Codes(NamedTuple):
    """Weights [experts, rows, columns] as float8_e4m3fn, and scales per expert or per row."""

    codes: torch.Tensor
    scales: torch.Tensor


def _weights(seed: int, rows: int, columns: int, per_row: bool) -> Codes:
    generator = torch.Generator("cuda").manual_seed(seed)
    wide = torch.randn(EXPERTS, rows, columns, device="cuda", generator=generator) / 10
    amax = wide.abs().amax((2,) if per_row else (1, 2), keepdim=True)
    scales = amax / _LARGEST
    return Codes((wide / scales).to(torch.float8_e4m3fn), scales)


def _strides() -> dict[str, torch.Tensor]:
    """The arguments that #20762 made, and that its callers make once per layer; none before it."""
    sizes = {"ab_strides1": HIDDEN, "ab_strides2": INTERMEDIATE, "c_strides1": 2 * INTERMEDIATE, "c_strides2": HIDDEN}
    wanted = inspect.signature(cutlass_moe_fp8).parameters
    return {
        name: torch.full((EXPERTS,), size, device="cuda", dtype=torch.int64)
        for name, size in sizes.items()
        if name in wanted
    }


_PER_TENSOR, _PER_CHANNEL = (
    (_weights(1, 2 * INTERMEDIATE, HIDDEN, per_row), _weights(2, HIDDEN, INTERMEDIATE, per_row))
    for per_row in (False, True)
)
_STRIDES = _strides()


def per_tensor(batches: list[Batch], scale: torch.Tensor) -> list[torch.Tensor]:
    """A scale per expert, a static one for rows: what the benchmark measures."""
    return _layers(batches, *_PER_TENSOR, a1_scale=scale)


def per_channel(batches: list[Batch], _: torch.Tensor) -> list[torch.Tensor]:
    """A scale per output channel and per token: what compressed-tensors' checkpoints have."""
    return _layers(batches, *_PER_CHANNEL, per_act_token=True)


def _layers(batches: list[Batch], w1: Codes, w2: Codes, **options: torch.Tensor | bool) -> list[torch.Tensor]:
    options |= {"w1_scale": w1.scales, "w2_scale": w2.scales, **_STRIDES}
    return [cutlass_moe_fp8(rows, w1.codes, w2.codes, factors, ids, **options) for rows, factors, ids in batches]
