"""vLLM's classes of experts, one module per class as vLLM has them."""
