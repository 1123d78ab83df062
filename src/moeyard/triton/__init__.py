"""The `triton` implementation of products, activations and experts: NVIDIA GPUs of compute capability 8.0 and later."""
