"""What the layer asks of its platform: an NVIDIA GPU."""

import torch


class current_platform:  # noqa: N801 - vLLM's name
    """An NVIDIA GPU of compute capability 9."""

    @staticmethod
    def fp8_dtype() -> torch.dtype:
        """The dtype of codes."""
        return torch.float8_e4m3fn

    @staticmethod
    def supports_mx() -> bool:
        """Whether it multiplies MX formats."""
        return False
