"""What stands for the rest of vLLM: the modules that the alignment's wrapper imports."""
