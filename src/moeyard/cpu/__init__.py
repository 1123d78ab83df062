"""The `cpu` implementation: numba kernels over raw addresses, without the GIL, on as many threads as torch uses."""
