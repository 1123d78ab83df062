"""Triton under the names by which vLLM imports it."""

import triton
import triton.language as tl

__all__ = ["tl", "triton"]
