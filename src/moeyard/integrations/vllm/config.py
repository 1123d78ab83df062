"""vLLM's description of how a call is quantised, under its names."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FusedMoEQuantConfig:
    """How weights and rows of a call are quantised, by the names that vLLM's class of this name has.

    E experts, R rows of a weight (2I of w1, H of w2), C columns. Functions here read these names alone, so that an
    object of vLLM's own class serves as well.
    """

    quant_dtype: torch.dtype | None = None
    """float8_e4m3fn or int8: rows of both products are quantised to it, as the weights are. None: rows stay wide."""
    per_act_token_quant: bool = False
    """Whether rows have a scale each. Without `a1_scale` and `block_shape` they have one in any case."""
    per_out_ch_quant: bool = False
    """True says that weights have a scale per row, which their scales' shapes say, too."""
    block_shape: list[int] | None = None
    """[rows, columns] of a weight that share a scale; rows of products have a scale per so many columns."""
    w1_scale: Tensor | None = None
    """float32. [E], [E, 1] or [E, 1, 1]: one per matrix, of gate and up together; [E, R] or [E, R, 1]: one per row;
    with `block_shape` [E, ceil(R / rows), ceil(C / columns)]. Multiplies."""
    w2_scale: Tensor | None = None
    a1_scale: Tensor | None = None
    """One float32: the scale of the first product's rows. Computed from the rows unless given."""
    a2_scale: Tensor | None = None
    """The same of the second product; beside `a1_scale` alone."""
    w1_bias: Tensor | None = None
    """[E, 2I], dtype of the hidden states; float32 beside 16 bits is rounded to it in every call."""
    w2_bias: Tensor | None = None
    """[E, H], dtype of the hidden states, or float32 as there."""
    gemm1_alpha: float | None = None
    """Of the activation, as the two below; which activation takes which says `activation_of` of `activation.py`."""
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None

    @staticmethod
    def make(
        quant_dtype: torch.dtype | None = None,
        per_act_token_quant: bool = False,
        per_out_ch_quant: bool = False,
        block_shape: list[int] | None = None,
        **given: Any,
    ) -> "FusedMoEQuantConfig":
        """vLLM's builder; `given` are the other fields by name."""
        return FusedMoEQuantConfig(quant_dtype, per_act_token_quant, per_out_ch_quant, block_shape, **given)


FUSED_MOE_UNQUANTIZED_CONFIG = FusedMoEQuantConfig()
"""vLLM's configuration of a call without quantisation."""


def fp8_w8a8_moe_quant_config(
    w1_scale: Tensor,
    w2_scale: Tensor,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    per_act_token_quant: bool = False,
    per_out_ch_quant: bool = False,
    block_shape: list[int] | None = None,
    **gemm1: float | None,
) -> FusedMoEQuantConfig:
    """vLLM's `fp8_w8a8_moe_quant_config`: weights and rows are float8_e4m3fn. `gemm1` are the fields of that name."""
    return FusedMoEQuantConfig(
        torch.float8_e4m3fn, per_act_token_quant, per_out_ch_quant, block_shape, w1_scale, w2_scale, a1_scale,
        a2_scale, w1_bias, w2_bias, **gemm1,
    )  # fmt: skip


def int8_w8a8_moe_quant_config(
    w1_scale: Tensor,
    w2_scale: Tensor,
    a1_scale: Tensor | None,
    a2_scale: Tensor | None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    per_act_token_quant: bool = False,
) -> FusedMoEQuantConfig:
    """vLLM's `int8_w8a8_moe_quant_config`: weights and rows are int8."""
    return FusedMoEQuantConfig(
        torch.int8, per_act_token_quant, False, None, w1_scale, w2_scale, a1_scale, a2_scale, w1_bias, w2_bias
    )


def fp8_w8a16_moe_quant_config(
    w1_scale: Tensor,
    w2_scale: Tensor,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    block_shape: list[int] | None = None,
    **gemm1: float | None,
) -> FusedMoEQuantConfig:
    """vLLM's `fp8_w8a16_moe_quant_config`: weights are float8_e4m3fn, rows stay in their dtype. `gemm1` as above."""
    return _weights_alone(w1_scale, w2_scale, w1_bias, w2_bias, block_shape, gemm1)


def int8_w8a16_moe_quant_config(
    w1_scale: Tensor,
    w2_scale: Tensor,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    block_shape: list[int] | None = None,
    **gemm1: float | None,
) -> FusedMoEQuantConfig:
    """vLLM's `int8_w8a16_moe_quant_config` without zero points: weights are int8, rows stay in their dtype."""
    return _weights_alone(w1_scale, w2_scale, w1_bias, w2_bias, block_shape, gemm1)


def _weights_alone(
    w1_scale: Tensor,
    w2_scale: Tensor,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    block_shape: list[int] | None,
    gemm1: dict[str, float | None],
) -> FusedMoEQuantConfig:
    return FusedMoEQuantConfig(
        None, False, False, block_shape, w1_scale, w2_scale, None, None, w1_bias, w2_bias, **gemm1
    )


def biased_moe_quant_config(
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    gemm1_alpha: float | None = None,
    gemm1_beta: float | None = None,
    gemm1_clamp_limit: float | None = None,
) -> FusedMoEQuantConfig:
    """vLLM's `biased_moe_quant_config`: nothing is quantised, experts have biases."""
    return FusedMoEQuantConfig(
        w1_bias=w1_bias, w2_bias=w2_bias, gemm1_alpha=gemm1_alpha, gemm1_beta=gemm1_beta,
        gemm1_clamp_limit=gemm1_clamp_limit,
    )  # fmt: skip
