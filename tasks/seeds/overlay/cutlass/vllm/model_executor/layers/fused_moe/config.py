"""How a layer is quantised, as far as the CUTLASS experts ask; vLLM's own module imports its engine's configuration."""

from dataclasses import dataclass

import torch


@dataclass
class FusedMoEQuantConfig:
    """Dtype of the codes and granularity of their scales."""

    quant_dtype: torch.dtype | None = None
    per_act_token_quant: bool = False
    per_out_ch_quant: bool = False
    block_shape: list[int] | None = None
