"""The wrapper's place, taken by moeyard's function of the same name and arguments."""

from moeyard.integrations.vllm import moe_align_block_size

__all__ = ["moe_align_block_size"]
