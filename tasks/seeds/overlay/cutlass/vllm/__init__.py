"""What stands for the rest of vLLM: the modules that the CUTLASS experts import."""
