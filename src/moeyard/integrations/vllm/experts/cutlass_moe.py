"""vLLM's place of `run_cutlass_moe_fp8` since its classes of experts have a folder."""

from moeyard.integrations.vllm.cutlass_moe import run_cutlass_moe_fp8

__all__ = ["run_cutlass_moe_fp8"]
